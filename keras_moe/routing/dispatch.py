"""Dispatch and combine: tokens into the experts' buffers, and outputs back to tokens.

With a capacity the buffers are `[1, e, g·c, h]`: each expert's slots of all groups side
by side, so that its work is one matrix product. Without a capacity they are rows
`[a, h]`, sorted by expert.
"""

import keras

from keras_moe.kernels import combine_rows, gather_rows, ops, weigh_rows
from keras_moe.routing.values import RouterMask, Rows, Slots, check_routing


def dispatch(tokens, routing, weighted=False):
    """Gathers tokens into the experts' buffers.

    Args:
        tokens: `[g, t, h]`.
        routing: `Slots`, `Rows` or `RouterMask`.
        weighted: bool, whether to multiply the tokens by the combine weights. Defaults
            to `False`.

    Returns:
        `[1, e, g·c, h]`, zero in empty slots; for `Rows` `[a, h]`.
    """
    check_routing(routing)
    groups, t, hidden = ops.shape(tokens)
    if isinstance(routing, Rows):
        parts, rows = ops.shape(routing.token_index)
        tokens = ops.reshape(tokens, (parts, groups * t // parts, hidden))
        rows_of_parts = gather_rows(tokens, routing.token_index)
        if weighted:
            rows_of_parts = _weigh(rows_of_parts, routing.weight)
        return ops.reshape(rows_of_parts, (parts * rows, hidden))
    if isinstance(routing, Slots):
        _, experts, capacity = ops.shape(routing.token_index)
        buffers = gather_rows(tokens, _expert_major(routing.token_index))
        if weighted:
            buffers = _weigh(buffers, _expert_major(routing.weight))
    else:
        _, _, experts, capacity = ops.shape(routing.dispatch_mask)
        mask = routing.combine_array if weighted else routing.dispatch_mask
        mask = ops.cast(mask, tokens.dtype)
        buffers = ops.einsum("gtec,gth->egch", mask, tokens)
    return ops.reshape(buffers, (1, experts, groups * capacity, hidden))


def combine(outputs, routing):
    """Sums the experts' outputs of each token, multiplied by the combine weights.

    The products and sums are computed in float32 or better; the result has the dtype
    of the outputs. A token without a slot gets 0.

    Args:
        outputs: `[1, e, g·c, h]`; for `Rows` `[a, h]`.
        routing: `Slots`, `Rows` or `RouterMask`.

    Returns:
        `[g, t, h]`.
    """
    check_routing(routing)
    dtype = outputs.dtype
    outputs = ops.cast(outputs, keras.backend.result_type(dtype, "float32"))
    if isinstance(routing, Rows):
        groups, t, _ = ops.shape(routing.probs)
        parts, _ = ops.shape(routing.token_index)
        n = groups * t // parts
        results = _weighted_sum(outputs, routing.weight, routing.token_index, n)
        results = ops.reshape(results, (groups, t, ops.shape(outputs)[-1]))
    elif isinstance(routing, Slots):
        weight, index = map(_expert_major, (routing.weight, routing.token_index))
        results = _weighted_sum(outputs, weight, index, ops.shape(routing.probs)[1])
    else:
        _, experts, _, hidden = ops.shape(outputs)
        groups, _, _, capacity = ops.shape(routing.combine_array)
        weight = ops.cast(routing.combine_array, outputs.dtype)
        outputs = ops.reshape(outputs, (experts, groups, capacity, hidden))
        results = ops.einsum("gtec,egch->gth", weight, outputs)
    return ops.cast(results, dtype)


def unweighted(routing):
    """Returns a routing whose combine weights are 1, for weighted inputs.

    Args:
        routing: `Slots`, `Rows` or `RouterMask`.
    """
    if isinstance(routing, RouterMask):
        return routing._replace(combine_array=routing.dispatch_mask)
    return routing._replace(weight=routing.assignments)


def _weighted_sum(rows, weight, token_index, num_tokens):
    """Weights rows `[..., h]` and sums them by token: `[g, num_tokens, h]`."""
    rows = ops.reshape(rows, (*ops.shape(token_index), ops.shape(rows)[-1]))
    return combine_rows(rows, ops.cast(weight, rows.dtype), token_index, num_tokens)


def _weigh(rows, weight):
    """Multiplies rows `[..., h]` by weights `[...]` of any dtype."""
    return weigh_rows(rows, ops.cast(weight, rows.dtype))


def _expert_major(x):
    """Transposes `[g, e, c]` to `[e, g, c]`, the order of the buffers."""
    return ops.transpose(x, (1, 0, 2))
