"""Layouts of the experts' weights in the maps that `expert_layout_map` creates."""

import weakref

import keras

# Pairs of a weak reference to a layout map and the axis of its experts.
_layout_maps = []


def register_layout_map(layout_map, axis):
    """Makes the weights of experts that are created from now on part of a layout map.

    Args:
        layout_map: `keras.distribution.LayoutMap`.
        axis: string, the mesh axis over which experts are split.
    """
    _layout_maps[:] = [pair for pair in _layout_maps if pair[0]() is not None]
    _layout_maps.append((weakref.ref(layout_map), axis))


def lay_out_expert_weight(path, shape):
    """Adds a weight to the layout map in use, split along its first axis.

    Args:
        path: string, the path of the weight, which is about to be created.
        shape: tuple that begins with the number of experts.

    Raises:
        ValueError: if the experts cannot be split equally.
    """
    for layout_map, axis in _layout_maps_in_use():
        if layout_map[path] is not None:
            continue
        mesh = layout_map.device_mesh
        size = mesh.shape[mesh.axis_names.index(axis)]
        if shape[0] % size:
            raise ValueError(
                "The number of experts must be a multiple of the size of the mesh axis "
                f"over which they are split. Received: {shape[0]} experts in {path!r}, "
                f"and the axis {axis!r} of size {size}."
            )
        layout_map[path] = (axis, *[None] * (len(shape) - 1))


def refuse_layout(layer, reason):
    """Raises an error if experts would not be split although a layout map is in use.

    Args:
        layer: experts that cannot be split.
        reason: string, why, and what to do.
    """
    for _, axis in _layout_maps_in_use():
        raise ValueError(
            f"The experts of {layer.name!r}, a {type(layer).__name__}, cannot be split "
            f"over the mesh axis {axis!r}: {reason}."
        )


def _layout_maps_in_use():
    distribution = keras.distribution.distribution()
    if distribution is None:
        return []
    found = [(reference(), axis) for reference, axis in _layout_maps]
    return [
        (layout_map, axis)
        for layout_map, axis in found
        if layout_map is not None and layout_map.device_mesh is distribution.device_mesh
    ]
