"""Placing: who gets the slots of an expert."""

from keras import ops

from keras_moe.kernels import argsort, gather_rows, row_parts, scatter_add_rows
from keras_moe.routing import Rows, Slots
from keras_moe.selection import finite, valid_tokens

PRIORITIES = ("choice", "token", "probability")


def place(selection, probs, expert_capacity, priority="choice"):
    """Tokens take slots in the experts they want, until these are full.

    What finds its expert full is dropped. Without a capacity there are no
    slots, and every choice is a row. Who comes first is the `priority`:

    - `"choice"`: all first choices before all second choices, and of the same
      choice the earlier token (GShard);
    - `"token"`: the earlier token with all its choices;
    - `"probability"`: as `"choice"`, but instead of the earlier token the one
      whose best probability is higher (V-MoE's batch prioritized routing).

    Args:
        selection: a `Selection`, `[g, t, k]`.
        probs: float32 `[g, t, e]`, all zero for a masked token.
        expert_capacity: `c`, an int or a scalar int32 tensor; `None` for none.
        priority: one of `PRIORITIES`.

    Returns:
        `Slots`; `Rows` without a capacity.

    Reference:
        [Lepikhin et al., 2020](https://arxiv.org/abs/2006.16668), algorithm 1;
        [Riquelme et al., 2021](https://arxiv.org/abs/2106.05974), section 4.
    """
    if expert_capacity is None:
        return _place_all(selection, probs)
    groups, tokens, k = ops.shape(selection.expert_index)
    wanted = selection.expert_index
    if priority == "probability":
        token_order = argsort(-ops.max(finite(probs), axis=-1))
        wanted = ops.take_along_axis(wanted, ops.expand_dims(token_order, -1), axis=1)
    if priority != "token":
        wanted = ops.transpose(wanted, (0, 2, 1))
    # One row a group, in order of priority.
    wanted = ops.reshape(wanted, (groups, tokens * k))
    # Sorted by expert, each expert's assignments are a run in that order; the
    # sort is stable on every backend. Masked ones (-1) come first.
    order = argsort(wanted)
    counts = _counts(wanted, probs.shape[-1])  # g e
    masked = tokens * k - ops.sum(counts, axis=-1, keepdims=True)
    start = masked + ops.cumsum(counts, axis=-1) - counts
    slot = ops.arange(expert_capacity, dtype="int32")
    filled = slot < ops.expand_dims(counts, -1)  # g e c
    rank = ops.where(filled, ops.expand_dims(start, -1) + slot, -1)
    place_in_row = _take(order, rank)
    if priority == "token":
        token, choice = place_in_row // k, place_in_row % k
    else:
        token, choice = place_in_row % tokens, place_in_row // tokens
    if priority == "probability":
        token = _take(token_order, token)
    weight = ops.reshape(selection.weight, (groups, tokens * k))
    return Slots(
        token_index=ops.where(filled, token, -1),
        weight=_take(weight, ops.where(filled, token * k + choice, -1)),
        probs=probs,
        load=_shares(counts),
    )


def _place_all(selection, probs):
    groups, tokens, k = ops.shape(selection.expert_index)
    experts = probs.shape[-1]
    wanted = ops.reshape(selection.expert_index, (groups, tokens * k))
    counts = _counts(wanted, experts)  # g e
    # Each part of the groups is sorted by itself, for each share of the experts.
    parts, shares = row_parts(groups, experts)
    share = ops.expand_dims(ops.arange(shares, dtype="int32"), -1)
    per_share = experts // shares
    sizes = ops.reshape(counts, (parts, 1, groups // parts, experts))
    is_here = ops.arange(experts, dtype="int32") // per_share == share
    sizes = ops.where(is_here, ops.sum(sizes, axis=2), 0)  # parts shares e
    rows = groups // parts * tokens * k
    wanted = ops.reshape(wanted, (parts, 1, rows))
    is_here = ops.logical_and(wanted >= 0, wanted // per_share == share)
    order = argsort(ops.where(is_here, wanted, experts))  # parts shares rows
    filled = ops.arange(rows, dtype="int32") < ops.sum(sizes, axis=-1, keepdims=True)
    order = ops.where(filled, ops.cast(order, "int32"), -1)
    order = ops.reshape(order, (parts, shares * rows))
    weight = ops.reshape(selection.weight, (parts, rows))
    return Rows(
        token_index=ops.where(order >= 0, order // k, -1),
        weight=gather_rows(weight, order),
        group_sizes=ops.reshape(sizes, (-1,)),
        probs=probs,
        load=_shares(counts),
    )


def compose(outer, inner):
    """Two placements one after the other, as one.

    Args:
        outer: `Slots` of `n` groups of experts: `[g, n, c]`.
        inner: `Slots` of the experts of each group, whose tokens are the slots
            of `outer`: `[g·n, e, c']`.

    Returns:
        `Slots` `[g, n·e, c']`. A weight is the product of both weights; the
        probability of a group of experts is spread evenly over them.
    """
    groups, n, slots = ops.shape(outer.token_index)
    _, e, c = ops.shape(inner.token_index)
    filled = inner.token_index >= 0
    slot = ops.maximum(inner.token_index, 0)
    token = _take(ops.reshape(outer.token_index, (groups * n, slots)), slot)
    weight = _take(ops.reshape(outer.weight, (groups * n, slots)), slot)
    shape = (groups, n * e, c)
    filled = ops.reshape(filled, shape)
    counts = ops.sum(ops.cast(filled, "int32"), axis=-1)
    return Slots(
        token_index=ops.where(filled, ops.reshape(token, shape), -1),
        weight=ops.reshape(weight * inner.weight, shape),
        probs=ops.repeat(outer.probs, e, axis=-1) / e,
        load=_shares(counts),
    )


def wanted_load(selection, num_experts):
    """float32 `[g, e]`: the share of each expert in what the tokens want."""
    groups, tokens, k = ops.shape(selection.expert_index)
    index = ops.reshape(selection.expert_index, (groups, tokens * k))
    return _shares(_counts(index, num_experts))


def experts_choose(probs, expert_capacity):
    """Each expert takes its best `c` tokens of the group.

    Of equal tokens it takes the earlier one. Masked tokens are not taken: an
    expert that runs out of valid tokens leaves slots empty.

    Args:
        probs: float32 `[g, t, e]`, all zero for a masked token.
        expert_capacity: `c`, an int or a scalar int32 tensor, at most `t`.

    Returns:
        `Slots`.
    """
    valid = valid_tokens(probs)
    scores = ops.where(ops.expand_dims(valid, -1), finite(probs), -1.0)
    scores = ops.transpose(ops.stop_gradient(scores), (0, 2, 1))  # g e t
    token = argsort(-scores)[..., :expert_capacity]  # g e c
    filled = ops.take_along_axis(scores, token, axis=-1) >= 0
    weight = ops.take_along_axis(ops.transpose(probs, (0, 2, 1)), token, axis=-1)
    return Slots(
        token_index=ops.where(filled, token, -1),
        weight=ops.where(filled, weight, 0.0),
        probs=probs,
        load=_shares(ops.sum(ops.cast(filled, "int32"), axis=-1)),
    )


def _take(row, index):
    """`row[g, index[g, e, c]]`, 0 for -1."""
    groups, experts, capacity = ops.shape(index)
    taken = gather_rows(row, ops.reshape(index, (groups, experts * capacity)))
    return ops.reshape(taken, (groups, experts, capacity))


def _counts(index, num_experts):
    """How often each expert stands in each row: `[g, n]` to int32 `[g, e]`."""
    ones = ops.ones(ops.shape(index), dtype="float32")
    return ops.cast(scatter_add_rows(ones, index, num_experts), "int32")


def _shares(counts):
    """Counts `[g, e]` as shares of their group, 0 in an empty group."""
    counts = ops.cast(counts, "float32")
    return counts / ops.maximum(ops.sum(counts, axis=-1, keepdims=True), 1.0)
