"""Routing statistics: how a routing used its experts, as pure functions."""

from typing import Any, NamedTuple

from keras_moe.kernels import ops
from keras_moe.routing.selection import valid_tokens
from keras_moe.routing.values import RouterMask


class RoutingSums(NamedTuple):
    """Sums over the groups of a batch, of which the metrics of a routing are ratios.

    Attributes:
        valid: float32 scalar, the number of tokens that are not masked.
        left_behind: float32 scalar, the number of these that are in no slot.
        weight: float32 scalar, the sum of the combine weights.
        filled: float32 scalar, the number of filled slots.
        max_load: float32 scalar, the largest load of an expert over the mean load,
            which is 1 in a balanced group, summed over the groups with a load.
        groups: float32 scalar, the number of these groups.
        selected: float32 scalar, the number of selected experts, before any assignment
            is dropped; `filled` where experts choose, or if the selection is not known.
        load: float32 `[e]`, the load of each expert in tokens.
    """

    valid: Any
    left_behind: Any
    weight: Any
    filled: Any
    max_load: Any
    groups: Any
    selected: Any
    load: Any


def routing_sums(routing, valid):
    """Returns the `RoutingSums` of a batch.

    Args:
        routing: `Slots`, `Rows` or `RouterMask`.
        valid: float32 scalar, the number of tokens that are not masked.
    """
    served = ops.sum(ops.cast(routing.slots_per_token > 0, "float32"))
    filled = ops.sum(routing.assignments)
    loads = group_loads(routing)
    total = ops.sum(loads, axis=-1)
    has_load = total > 0
    # `initial` allows no groups at all.
    largest = ops.max(loads, axis=-1, initial=0.0) * loads.shape[-1]
    return RoutingSums(
        valid=valid,
        left_behind=valid - served,
        weight=ops.sum(routing.weight),
        filled=filled,
        max_load=ops.sum(largest / ops.where(has_load, total, 1.0)),
        groups=ops.sum(ops.cast(has_load, "float32")),
        selected=num_selected(routing, filled),
        load=ops.sum(loads, axis=0),
    )


def routing_ratios(sums):
    """Returns the router metrics that follow from sums of a routing.

    Args:
        sums: `RoutingSums`.

    Returns:
        A dict of float32 scalars, each 0 where its denominator is 0:
        `fraction_tokens_left_behind`, the fraction of valid tokens in no slot;
        `router_confidence`, the mean combine weight of the filled slots; `max_load`,
        the mean over the groups.
    """
    parts = ops.stack([sums.left_behind, sums.weight, sums.max_load])
    wholes = ops.stack([sums.valid, sums.filled, sums.groups])
    names = "fraction_tokens_left_behind", "router_confidence", "max_load"
    ratios = ops.unstack(parts / ops.maximum(wholes, 1.0))
    return dict(zip(names, ratios, strict=True))


def expert_load(routing):
    """Returns the load of each expert in tokens.

    Args:
        routing: `Slots`, `Rows` or `RouterMask`.

    Returns:
        float32 `[e]`, the sum over groups of `load` times the group's valid tokens;
        for a `RouterMask` the filled slots of each expert.
    """
    return ops.sum(group_loads(routing), axis=0)


def num_selected(routing, filled=None):
    """Returns the number of selected experts of all tokens.

    Args:
        routing: `Slots`, `Rows` or `RouterMask`.
        filled: float32 scalar, the number of filled slots, if it is known already.

    Returns:
        A float32 scalar. Where experts choose, or if the selection is not known, it is
        the number of filled slots.
    """
    index = getattr(routing, "expert_index", None)
    if index is None or index.shape[-1] == 0:
        return ops.sum(routing.assignments) if filled is None else filled
    return ops.sum(ops.cast(index >= 0, "float32"))


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
