"""Expert parallelism with `keras.distribution`."""

import keras

from keras_moe.utils.layouts import register_layout_map


def expert_layout_map(device_mesh, axis="expert", inner_axis=None):
    """Creates a layout map that splits experts over the devices of a mesh axis.

    The weights of `FeedForwardExperts`, whatever their names, are split along their
    expert axis: kernels, quantized or not, their scales, biases and adapters (LoRA).
    Each is added to the map when it is created. All other variables are replicated,
    unless you add entries for them: the result is an ordinary
    `keras.distribution.LayoutMap`.

    Args:
        device_mesh: `keras.distribution.DeviceMesh`.
        axis: string, the mesh axis over which experts are split. The number of experts
            must be a multiple of its size. It may be the axis of the batch. Defaults to
            `"expert"`.
        inner_axis: string, the mesh axis over which the inner layer of each expert is
            split, too (tensor parallelism): the columns of `intermediate` and `gate`,
            and the rows of `output`. It must not be the axis of the batch. Defaults to
            `None`, not split.

    Returns:
        A `keras.distribution.LayoutMap`.

    Raises:
        ValueError: if the mesh has no such axes, or they are the same; when a model is
            built, if the experts or their inner layers cannot be split equally, or for
            `HeterogeneousExperts`, which cannot be split.

    Example:

    ```python
    mesh = keras.distribution.DeviceMesh((2, 4), ["batch", "expert"])
    keras.distribution.set_distribution(
        keras.distribution.ModelParallel(
            layout_map=keras_moe.distribution.expert_layout_map(mesh),
            batch_dim_name="batch",
        )
    )
    model = build_model()  # built, compiled and fitted as on one device
    ```

    Reference:
        [Lepikhin et al., 2020](https://arxiv.org/abs/2006.16668), section 3;
        [Shoeybi et al., 2019](https://arxiv.org/abs/1909.08053), section 3, for the
        inner layer.
    """
    axes = {"axis": axis, "inner_axis": inner_axis}
    if inner_axis is None:
        del axes["inner_axis"]
    for name, value in axes.items():
        if value not in device_mesh.axis_names:
            raise ValueError(
                f"`{name}` must be an axis of the mesh, {device_mesh.axis_names}. "
                f"Received: {name}={value!r}."
            )
    if axis == inner_axis:
        raise ValueError(
            f"`axis` and `inner_axis` must be different axes. Received: {axis!r}."
        )
    layout_map = keras.distribution.LayoutMap(device_mesh)
    register_layout_map(layout_map, axis, inner_axis)
    return layout_map
