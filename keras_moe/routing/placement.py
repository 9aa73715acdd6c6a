"""Placement: selections and probabilities into `Slots` or `Rows`."""

import keras

from keras_moe.kernels import (
    argsort,
    gather_rows,
    num_row_shards,
    ops,
    scatter_add_rows,
    take_elements,
)
from keras_moe.routing.selection import nonfinite_to_zero, valid_tokens
from keras_moe.routing.values import Rows, Slots, no_experts

PRIORITIES = ("choice", "token", "probability", "random")


def assign_slots(
    selection, probs, expert_capacity, priority="choice", load=None, seed=None
):
    """Assigns the slots of the selected experts, until these are full.

    Over-capacity assignments are dropped. Without a capacity there are no slots, and
    every assignment is a row. `priority` decides which assignments come first:

    - `"choice"`: all first choices before all second choices, and then earlier tokens
      before later ones (GShard);
    - `"token"`: earlier tokens, with all their choices, before later ones;
    - `"probability"`: as `"choice"`, with tokens in the order of their best
      probability (batch prioritized routing of V-MoE);
    - `"random"`: as `"choice"`, with tokens in random order (random token selection of
      DeepSpeed).

    Args:
        selection: `Selection`, `[g, t, k]`.
        probs: float32 `[g, t, e]`, all zero for a masked token.
        expert_capacity: int or scalar int32 tensor `c`; `None` for no capacity.
        priority: `"choice"`, `"token"`, `"probability"` or `"random"`. Defaults to
            `"choice"`.
        load: float32 `[g, e]`, the load to report; that of `selection` by default.
        seed: int or `keras.random.SeedGenerator`, of the random order. Defaults to
            `None`, a random seed.

    Returns:
        `Slots`; `Rows` if `expert_capacity` is `None`.

    Example:

    ```python
    probs = keras.ops.softmax(keras.random.normal((1, 6, 4)))
    selection = keras_moe.routing.top_k(probs, 2)
    slots = keras_moe.routing.assign_slots(selection, probs, expert_capacity=3)
    slots.token_index.shape  # (1, 4, 3)
    ```

    Reference:
        [Lepikhin et al., 2020](https://arxiv.org/abs/2006.16668), algorithm 1;
        [Riquelme et al., 2021](https://arxiv.org/abs/2106.05974), section 4.
    """
    if expert_capacity is None:
        return _sort_by_expert(selection, probs, load)
    groups, tokens, k = ops.shape(selection.expert_index)
    experts = selection.expert_index
    token_order = _token_order(probs, priority, seed)
    if token_order is not None:
        experts = ops.take_along_axis(experts, ops.expand_dims(token_order, -1), axis=1)
    if priority != "token":
        experts = ops.transpose(experts, (0, 2, 1))
    # The assignments of a group, in order of priority.
    experts = ops.reshape(experts, (groups, tokens * k))
    # A stable sort by expert keeps that order among the assignments of an expert.
    # Masked ones (-1) come first.
    order = argsort(experts)
    counts = _counts(experts, probs.shape[-1])  # g e
    masked = tokens * k - ops.sum(counts, axis=-1, keepdims=True)
    start = masked + ops.cumsum(counts, axis=-1) - counts
    slot = ops.arange(expert_capacity, dtype="int32")
    filled = slot < ops.expand_dims(counts, -1)  # g e c
    rank = ops.where(filled, ops.expand_dims(start, -1) + slot, -1)
    assignment = _gather_per_group(order, rank)
    if priority == "token":
        token, choice = assignment // k, assignment % k
    else:
        token, choice = assignment % tokens, assignment // tokens
    if token_order is not None:
        token = _gather_per_group(token_order, token)
    weight = ops.reshape(selection.weight, (groups, tokens * k))
    return Slots(
        token_index=ops.where(filled, token, -1),
        weight=_gather_per_group(weight, ops.where(filled, token * k + choice, -1)),
        probs=probs,
        load=_fractions(counts) if load is None else load,
        expert_index=selection.expert_index,
    )


def _token_order(probs, priority, seed):
    """Returns the tokens of each group in their order, `[g, t]`; `None` for that."""
    if priority == "probability":
        return argsort(-ops.max(nonfinite_to_zero(probs), axis=-1))
    if priority == "random":
        shape = ops.shape(probs)[:2]
        return argsort(keras.random.uniform(shape, dtype="float32", seed=seed))
    return None


def _sort_by_expert(selection, probs, load):
    """Returns `Rows` of all assignments."""
    groups, tokens, k = ops.shape(selection.expert_index)
    num_experts = probs.shape[-1]
    experts = ops.reshape(selection.expert_index, (groups, tokens * k))
    counts = _counts(experts, num_experts)  # g e
    # Each part of the groups is sorted by itself, for each shard of the experts.
    parts, shards = num_row_shards(groups, num_experts)
    sizes = ops.reshape(counts, (parts, groups // parts, num_experts))
    sizes = ops.expand_dims(ops.sum(sizes, axis=1), 1)  # parts 1 e
    rows = groups // parts * tokens * k
    experts = ops.reshape(experts, (parts, 1, rows))
    experts = ops.where(experts >= 0, experts, num_experts)
    if shards > 1:
        experts, sizes = _split_by_shard(experts, sizes, shards)
    filled = ops.arange(rows, dtype="int32") < ops.sum(sizes, axis=-1, keepdims=True)
    order = ops.where(filled, ops.cast(argsort(experts), "int32"), -1)
    order = ops.reshape(order, (parts, shards * rows))
    weight = ops.reshape(selection.weight, (parts, rows))
    return Rows(
        token_index=order // k,  # Rounded down: -1 stays.
        weight=gather_rows(weight, order),
        group_sizes=ops.reshape(sizes, (-1,)),
        probs=probs,
        load=_fractions(counts) if load is None else load,
        expert_index=selection.expert_index,
    )


def _split_by_shard(experts, sizes, shards):
    """Returns what each shard of the experts has: `[parts, shards, ...]`.

    Args:
        experts: int32 `[parts, 1, rows]`; `e` for none, as for those of other shards.
        sizes: int32 `[parts, 1, e]`; 0 for the experts of other shards.
        shards: int that divides `e`.
    """
    num_experts = sizes.shape[-1]
    shard = ops.expand_dims(ops.arange(shards, dtype="int32"), -1)
    per_shard = num_experts // shards
    of_shard = ops.arange(num_experts, dtype="int32") // per_shard == shard
    experts = ops.where(experts // per_shard == shard, experts, num_experts)
    return experts, ops.where(of_shard, sizes, 0)


def choose_tokens(probs, expert_capacity):
    """Assigns to each expert its best `c` tokens of the group (expert choice).

    Ties go to the earlier token. Masked tokens are not chosen: an expert that has no
    valid token left has empty slots.

    Args:
        probs: float32 `[g, t, e]`, all zero for a masked token.
        expert_capacity: int or scalar int32 tensor `c`, at most `t`.

    Returns:
        `Slots`.
    """
    valid = valid_tokens(probs)
    scores = ops.where(ops.expand_dims(valid, -1), nonfinite_to_zero(probs), -1.0)
    scores = ops.transpose(ops.stop_gradient(scores), (0, 2, 1))  # g e t
    token = argsort(-scores)[..., :expert_capacity]  # g e c
    filled = take_elements(scores, token) >= 0
    weight = take_elements(ops.transpose(probs, (0, 2, 1)), token)
    return Slots(
        token_index=ops.where(filled, token, -1),
        weight=ops.where(filled, weight, 0.0),
        probs=probs,
        load=_fractions(ops.sum(ops.cast(filled, "int32"), axis=-1)),
        expert_index=no_experts(probs),
    )


def compose_routings(outer, inner):
    """Combines the routings of two levels into one.

    Args:
        outer: `Slots` `[g, n, c]`, for `n` groups of experts.
        inner: `Slots` `[g·n, e, c']`, for the experts of each group, whose tokens are
            the slots of `outer`.

    Returns:
        `Slots` `[g, n·e, c']`. Weights are the products of both levels' weights;
        `probs` divides the probability of a group of experts evenly among them.
    """
    groups, n, slots = ops.shape(outer.token_index)
    _, e, c = ops.shape(inner.token_index)
    filled = inner.token_index >= 0
    slot = ops.maximum(inner.token_index, 0)
    token = _gather_per_group(ops.reshape(outer.token_index, (groups * n, slots)), slot)
    weight = _gather_per_group(ops.reshape(outer.weight, (groups * n, slots)), slot)
    shape = (groups, n * e, c)
    filled = ops.reshape(filled, shape)
    counts = ops.sum(ops.cast(filled, "int32"), axis=-1)
    return Slots(
        token_index=ops.where(filled, ops.reshape(token, shape), -1),
        weight=ops.reshape(weight * inner.weight, shape),
        probs=ops.repeat(outer.probs, e, axis=-1) / e,
        load=_fractions(counts),
        expert_index=no_experts(outer.probs),
    )


def selection_load(selection, num_experts):
    """Returns the load of a selection: float32 `[g, e]`, 1 in sum."""
    groups, tokens, k = ops.shape(selection.expert_index)
    index = ops.reshape(selection.expert_index, (groups, tokens * k))
    return _fractions(_counts(index, num_experts))


def _gather_per_group(row, index):
    """Returns `row[g, index[g, e, c]]`, 0 for -1."""
    groups, experts, capacity = ops.shape(index)
    taken = gather_rows(row, ops.reshape(index, (groups, experts * capacity)))
    return ops.reshape(taken, (groups, experts, capacity))


def _counts(index, num_experts):
    """Counts each expert in each row: `[g, n]` to int32 `[g, e]`."""
    ones = ops.ones(ops.shape(index), dtype="float32")
    return ops.cast(scatter_add_rows(ones, index, num_experts), "int32")


def _fractions(counts):
    """Returns counts `[g, e]` over their sum, 0 in an empty group."""
    counts = ops.cast(counts, "float32")
    return counts / ops.maximum(ops.sum(counts, axis=-1, keepdims=True), 1.0)


# The name of earlier versions.
place = assign_slots
