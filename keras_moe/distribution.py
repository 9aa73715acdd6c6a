"""Expert parallelism with `keras.distribution`."""

import keras

from keras_moe.utils.layouts import register_layout_map


def expert_layout_map(device_mesh, axis="expert"):
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

    Returns:
        A `keras.distribution.LayoutMap`.

    Raises:
        ValueError: if the mesh has no such axis; when a model is built, if the number
            of experts is not a multiple of the axis' size, or for
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
        [Lepikhin et al., 2020](https://arxiv.org/abs/2006.16668), section 3.
    """
    if axis not in device_mesh.axis_names:
        raise ValueError(
            f"`axis` must be an axis of the mesh, {device_mesh.axis_names}. "
            f"Received: axis={axis!r}."
        )
    layout_map = keras.distribution.LayoutMap(device_mesh)
    register_layout_map(layout_map, axis)
    return layout_map
