"""Sharding of the experts' buffers under `keras.distribution`.

If experts and batch are split over the same mesh axis, tokens move to the device of
their expert and their outputs move back. These constraints make that an all-to-all;
without them a compiler moves all experts to all tokens. On a mesh axis of their own,
the experts' devices have the tokens already, and nothing is constrained.
"""

import keras


def shard_by_expert(buffers, experts):
    """Moves buffers to the devices of their experts.

    Args:
        buffers: `[1, e, g·c, h]`; rows `[a, h]` are returned unchanged.
        experts: the layer that the buffers are for.

    Returns:
        The buffers.
    """
    return _reshard(buffers, experts, source_axis=2, target_axis=1)


def shard_by_group(buffers, experts):
    """Moves buffers back to the devices of their groups: see `shard_by_expert`."""
    return _reshard(buffers, experts, source_axis=1, target_axis=2)


def _reshard(buffers, experts, source_axis, target_axis):
    """Constrains both shardings, since gradients move from the target to the source."""
    distribution = keras.distribution.distribution()
    if distribution is None or len(buffers.shape) != 4 or not experts.weights:
        return buffers
    batch, mesh = distribution.batch_dim_name, distribution.device_mesh
    layout = distribution.get_variable_layout(experts.weights[0])
    # Before Keras 3.15 that of a variable is the sharding of the backend.
    axes = layout.axes if hasattr(layout, "axes") else layout.spec
    if tuple(axes[:1]) != (batch,):
        return buffers
    for sharded_axis in (source_axis, target_axis):
        axes = [batch if axis == sharded_axis else None for axis in range(4)]
        layout = keras.distribution.TensorLayout(axes, mesh)
        buffers = keras.distribution.distribute_tensor(buffers, layout)
    return buffers
