"""Spreading experts over devices, with `keras.distribution`."""

import keras


def expert_layout_map(device_mesh, axis="expert"):
    """A layout map that gives each device its share of the experts.

    Kernels and biases of `FeedForwardExperts` are cut by expert along one axis of
    the mesh. All else is whole on every device, until the map is told otherwise:
    it is an ordinary `keras.distribution.LayoutMap`.

    Args:
        device_mesh: a `keras.distribution.DeviceMesh`.
        axis: string, the axis of the mesh over which experts are spread. Their
            number must be a multiple of its size. It may be the axis of the batch.

    Returns:
        A `keras.distribution.LayoutMap`.

    Raises:
        ValueError: if the mesh has no such axis.

    Example:

    ```python
    mesh = keras.distribution.DeviceMesh((2, 4), ["batch", "expert"])
    keras.distribution.set_distribution(
        keras.distribution.ModelParallel(
            layout_map=keras_moe.distribution.expert_layout_map(mesh),
            batch_dim_name="batch",
        )
    )
    model = ...  # made, compiled and fitted as on one device
    ```

    Reference:
        [Lepikhin et al., 2020](https://arxiv.org/abs/2006.16668), section 3.
    """
    if axis not in device_mesh.axis_names:
        raise ValueError(
            f"`axis` must be one of the mesh, {device_mesh.axis_names}. "
            f"Received: axis={axis!r}."
        )
    layout_map = keras.distribution.LayoutMap(device_mesh)
    layout_map[r".*experts/(gate|intermediate|output)/(kernel|bias)"] = (
        axis,
        None,
        None,
    )
    return layout_map


def to_experts(buffers, experts):
    """Buffers go to the devices of their experts, if these share the batch's axis.

    Along an axis of their own each device has the tokens already. Along the batch's
    a compiler would rather bring all experts to all tokens.

    Args:
        buffers: `[1, e, g·c, h]`; rows `[a, h]` stay where they are.
        experts: the layer to which they go.

    Returns:
        The buffers.
    """
    return _from_cut_to_cut(2, 1, buffers, experts)


def from_experts(buffers, experts):
    """The way back: see `to_experts`."""
    return _from_cut_to_cut(1, 2, buffers, experts)


def _from_cut_to_cut(before, after, buffers, experts):
    """Both ends are said, as the gradients go from the second to the first."""
    distribution = keras.distribution.distribution()
    if distribution is None or len(buffers.shape) != 4 or not experts.weights:
        return buffers
    batch, mesh = distribution.batch_dim_name, distribution.device_mesh
    layout = distribution.get_variable_layout(experts.weights[0])
    if list(layout.axes[:1]) != [batch]:
        return buffers
    for dimension in (before, after):
        axes = [batch if i == dimension else None for i in range(4)]
        layout = keras.distribution.TensorLayout(axes, mesh)
        buffers = keras.distribution.distribute_tensor(buffers, layout)
    return buffers
