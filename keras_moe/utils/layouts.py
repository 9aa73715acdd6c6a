"""Layouts of the experts' weights in the maps that `expert_layout_map` creates."""

import weakref

import keras

# A weak reference to a layout map, the axis of its experts, and the axis inside of each
# expert, or `None`.
_layout_maps = []


def register_layout_map(layout_map, axis, inner_axis=None):
    """Makes the weights of experts that are created from now on part of a layout map.

    Args:
        layout_map: `keras.distribution.LayoutMap`.
        axis: string, the mesh axis over which experts are split.
        inner_axis: string, the mesh axis over which the inner layer of each expert is
            split. Defaults to `None`, not split.
    """
    _layout_maps[:] = [entry for entry in _layout_maps if entry[0]() is not None]
    _layout_maps.append((weakref.ref(layout_map), axis, inner_axis))


def lay_out_expert_weight(path, shape, inner=None):
    """Adds a weight to the layout map in use, split along its first axis.

    Args:
        path: string, the path of the weight, which is about to be created.
        shape: tuple that begins with the number of experts.
        inner: int, the axis of the weight that belongs to the inner layer of an expert,
            or to parts of it; `None` if it has none.

    Raises:
        ValueError: if the experts, or their inner layers, cannot be split equally.
    """
    for layout_map, axis, inner_axis in _layout_maps_in_use():
        if layout_map[path] is not None:
            continue
        size = _axis_size(layout_map, axis)
        if shape[0] % size:
            raise ValueError(
                "The number of experts must be a multiple of the size of the mesh axis "
                f"over which they are split. Received: {shape[0]} experts in {path!r}, "
                f"and the axis {axis!r} of size {size}."
            )
        layout = [axis, *[None] * (len(shape) - 1)]
        if inner_axis is not None and inner is not None:
            size = _axis_size(layout_map, inner_axis)
            if shape[inner] % size == 0:
                layout[inner] = inner_axis
            elif path.endswith("/kernel"):  # Others may have fewer parts.
                raise ValueError(
                    "The inner size of an expert must be a multiple of the size of "
                    "the mesh axis over which it is split. Received: "
                    f"{path!r} of shape {shape}, and the axis {inner_axis!r} of size "
                    f"{size}."
                )
        layout_map[path] = tuple(layout)


def inner_axes():
    """Returns the names of the mesh axes over which inner layers are split."""
    return {inner for *_, inner in _layout_maps_in_use() if inner is not None}


def _axis_size(layout_map, axis):
    mesh = layout_map.device_mesh
    return mesh.shape[mesh.axis_names.index(axis)]


def refuse_layout(layer, reason):
    """Raises an error if experts would not be split although a layout map is in use.

    Args:
        layer: experts that cannot be split.
        reason: string, why, and what to do.
    """
    for _, axis, _ in _layout_maps_in_use():
        raise ValueError(
            f"The experts of {layer.name!r}, a {type(layer).__name__}, cannot be split "
            f"over the mesh axis {axis!r}: {reason}."
        )


def _layout_maps_in_use():
    distribution = keras.distribution.distribution()
    if distribution is None:
        return []
    found = [(reference(), *axes) for reference, *axes in _layout_maps]
    mesh = distribution.device_mesh
    return [x for x in found if x[0] is not None and x[0].device_mesh is mesh]
