"""Two verbs: carry tokens to the experts, and their results home.

The experts' buffers are `[1, e, g·c, h]`: the slots of all groups of an expert
side by side, so that its work is one matrix product.
"""

import keras
from keras import ops

from keras_moe.kernels import gather_rows, scatter_add_rows
from keras_moe.routing import Slots, check_routing


def dispatch(tokens, routing):
    """Carries tokens to the experts.

    Args:
        tokens: `[g, t, h]`.
        routing: `Slots` or `RouterMask`.

    Returns:
        `[1, e, g·c, h]`, zero in empty slots.
    """
    check_routing(routing)
    groups, t, hidden = ops.shape(tokens)
    if isinstance(routing, Slots):
        _, experts, capacity = ops.shape(routing.token_index)
        rows = ops.reshape(tokens, (groups * t, hidden))
        buffers = gather_rows(rows, _expert_major(routing.flat_token_index))
    else:
        _, _, experts, capacity = ops.shape(routing.dispatch_mask)
        mask = ops.cast(routing.dispatch_mask, tokens.dtype)
        buffers = ops.einsum("gtec,gth->egch", mask, tokens)
    return ops.reshape(buffers, (1, experts, groups * capacity, hidden))


def combine(outputs, routing):
    """Carries the experts' results home, each with its weight, and adds them.

    Weights and outputs meet in float32 (or better); the sum has the dtype of
    the outputs. A token without a slot gets 0.

    Args:
        outputs: `[1, e, g·c, h]`.
        routing: `Slots` or `RouterMask`.

    Returns:
        `[g, t, h]`.
    """
    check_routing(routing)
    _, experts, slots, hidden = ops.shape(outputs)
    dtype = outputs.dtype
    outputs = ops.cast(outputs, keras.backend.result_type(dtype, "float32"))
    if isinstance(routing, Slots):
        groups, t, _ = ops.shape(routing.probs)
        weight = ops.reshape(_expert_major(routing.weight), (-1, 1))
        weight = ops.cast(weight, outputs.dtype)
        rows = ops.reshape(outputs, (experts * slots, hidden)) * weight
        index = _expert_major(routing.flat_token_index)
        results = scatter_add_rows(rows, index, groups * t)
        results = ops.reshape(results, (groups, t, hidden))
    else:
        groups, _, _, capacity = ops.shape(routing.combine_array)
        weight = ops.cast(routing.combine_array, outputs.dtype)
        outputs = ops.reshape(outputs, (experts, groups, capacity, hidden))
        results = ops.einsum("gtec,egch->gth", weight, outputs)
    return ops.cast(results, dtype)


def _expert_major(x):
    """`[g, e, c]` to `[e·g·c]`, the order of the buffers."""
    return ops.reshape(ops.transpose(x, (1, 0, 2)), (-1,))
