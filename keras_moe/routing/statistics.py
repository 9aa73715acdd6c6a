"""Routing statistics: how a routing used its experts, as pure functions."""

from keras import ops

from keras_moe.routing.selection import valid_tokens
from keras_moe.routing.values import RouterMask


def routing_statistics(routing, valid):
    """Returns the router metrics that follow from the routing alone.

    Args:
        routing: `Slots`, `Rows` or `RouterMask`.
        valid: float32 scalar, the number of tokens that are not masked.

    Returns:
        A dict of float32 scalars, each 0 where its denominator is 0:
        `fraction_tokens_left_behind`, the fraction of valid tokens in no slot;
        `router_confidence`, the mean combine weight of the filled slots;
        `expert_usage`, the fraction of slots that are filled or, dropless, of experts
        with at least one token.
    """
    served = ops.sum(ops.cast(routing.slots_per_token > 0, "float32"))
    return {
        "fraction_tokens_left_behind": _ratio(valid - served, valid),
        "router_confidence": _ratio(
            ops.sum(routing.weight), ops.sum(routing.assignments)
        ),
        "expert_usage": routing.expert_usage,
    }


def expert_load(routing):
    """Returns the load of each expert in tokens.

    Args:
        routing: `Slots`, `Rows` or `RouterMask`.

    Returns:
        float32 `[e]`, the sum over groups of `load` times the group's valid tokens;
        for a `RouterMask` the filled slots of each expert.
    """
    return ops.sum(group_loads(routing), axis=0)


def num_selected(routing):
    """Returns the number of selected experts of all tokens.

    Args:
        routing: `Slots`, `Rows` or `RouterMask`.

    Returns:
        A float32 scalar. Where experts choose, or if the selection is not known, it is
        the number of filled slots.
    """
    index = getattr(routing, "expert_index", None)
    if index is None or index.shape[-1] == 0:
        return ops.sum(routing.assignments)
    return ops.sum(ops.cast(index >= 0, "float32"))


def max_loads(loads):
    """Returns the largest expert load of the groups, relative to their mean load.

    Args:
        loads: float32 `[g, e]`, the result of `group_loads`.

    Returns:
        A pair of float32 scalars: the sum over the groups with a valid token of
        `max(load) / mean(load)`, which is 1 for a balanced group; and the number of
        these groups.
    """
    total = ops.sum(loads, axis=-1)
    # `initial` allows no groups at all.
    largest = ops.max(loads, axis=-1, initial=0.0) * loads.shape[-1]
    relative = largest / ops.where(total > 0, total, 1.0)
    return ops.sum(relative), ops.sum(ops.cast(total > 0, "float32"))


def mean_max_load(max_loads):
    """Returns the mean over the groups, 0 without any: see `max_loads`."""
    total, groups = max_loads
    return _ratio(total, groups)


def group_loads(routing):
    """Returns the load of each expert in each group, in tokens: float32 `[g, e]`.

    Args:
        routing: `Slots`, `Rows` or `RouterMask`.
    """
    if isinstance(routing, RouterMask):
        return ops.sum(routing.assignments, axis=2)
    # A NaN token counts as valid.
    valid = ops.cast(valid_tokens(routing.probs), "float32")
    return routing.load * ops.sum(valid, axis=1, keepdims=True)


def _ratio(part, whole):
    return part / ops.maximum(whole, 1.0)
