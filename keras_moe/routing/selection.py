"""Expert selection: the experts of each token and their combine weights."""

from typing import Any, NamedTuple

from keras_moe import kernels
from keras_moe.kernels import ops

# The score of an expert that must not be selected.
EXCLUDED_SCORE = float("-inf")


class Selection(NamedTuple):
    """The experts selected for each token, before any capacity.

    Attributes:
        expert_index: int32 `[g, t, k]`, best first; -1 for no expert.
        weight: float32 `[g, t, k]`, the combine weights.

    Example:

    ```python
    # Two tokens: the first selects expert 1, the second experts 0 and 2.
    selection = keras_moe.routing.Selection(
        expert_index=keras.ops.convert_to_tensor([[[1, -1], [0, 2]]]),
        weight=keras.ops.convert_to_tensor([[[1.0, 0.0], [0.7, 0.3]]]),
    )
    ```
    """

    expert_index: Any
    weight: Any


def nonfinite_to_zero(probs):
    """Replaces NaN and infinities by 0, so that values can be compared.

    A token whose probabilities are not finite then does not affect the routing of
    other tokens.

    Args:
        probs: float tensor.

    Returns:
        A tensor of the same shape.

    Example:

    ```python
    probs = keras.ops.convert_to_tensor([0.7, float("nan")])
    keras_moe.routing.nonfinite_to_zero(probs)  # [0.7, 0.0]
    ```
    """
    return ops.where(ops.isfinite(probs), probs, 0.0)


def valid_tokens(probs):
    """Returns bool `[g, t]`, false for masked tokens (NaN counts as valid)."""
    return ops.any(probs != 0, axis=-1)


def normalized(scores, epsilon=0.0):
    """Divides scores by their sum over the last axis plus `epsilon`; zeros stay zeros.

    Args:
        scores: float tensor.
        epsilon: float. Defaults to 0.

    Returns:
        A tensor of the same shape.
    """
    total = ops.sum(scores, axis=-1, keepdims=True)
    if epsilon:
        total = total + epsilon
    # The gradient divides by the square of the sum, which must not underflow to 0.
    # NaN stays NaN.
    least = ops.where(total == 0, 1.0, 1e-18)
    return scores / ops.where(total < 1e-18, least, total)


def top_k(probs, k, normalize=False, scores=None):
    """Selects the `k` best experts of each token. Ties go to the lower index.

    Args:
        probs: float32 `[g, t, e]`, the weights; all zero for a masked token.
        k: int, at most `e`.
        normalize: bool, whether to divide a token's weights by their sum.
            Defaults to `False`.
        scores: float32 `[g, t, e]`, the values to select by; `-inf` excludes an
            expert. Defaults to `probs`.

    Returns:
        A `Selection`; -1 and weight 0 for masked tokens.

    Example:

    ```python
    probs = keras.ops.convert_to_tensor([[[0.5, 0.2, 0.3], [0.1, 0.6, 0.3]]])
    selection = keras_moe.routing.top_k(probs, 2)
    selection.expert_index  # [[[0, 2], [1, 2]]]
    ```
    """
    valid = valid_tokens(probs)
    # The selection has no gradient.
    scores = ops.stop_gradient(nonfinite_to_zero(probs) if scores is None else scores)
    scores = ops.where(ops.expand_dims(valid, -1), scores, EXCLUDED_SCORE)
    best, index = kernels.top_k(scores, k)
    selection = _weighted(probs, ops.where(best > EXCLUDED_SCORE, index, -1))
    if normalize:
        selection = selection._replace(weight=normalized(selection.weight))
    return selection


def select_given(probs, expert_index):
    """Selects given experts.

    Args:
        probs: float32 `[g, t, e]`, the weights; all zero for a masked token.
        expert_index: int `[g, t, k]`; numbers outside of 0 to e - 1 for no expert.

    Returns:
        A `Selection`; -1 and weight 0 for masked tokens.
    """
    valid = ops.expand_dims(valid_tokens(probs), -1)
    index = ops.cast(expert_index, "int32")
    is_expert = ops.logical_and(index >= 0, index < probs.shape[-1])
    return _weighted(probs, ops.where(ops.logical_and(valid, is_expert), index, -1))


def _weighted(probs, index):
    """Returns the `Selection` of an index, with probabilities as weights."""
    weight = kernels.take_elements(probs, ops.maximum(index, 0))
    return Selection(index, ops.where(index >= 0, weight, 0.0))


def next_best(probs, k, expert_capacity, normalize=False, scores=None):
    """Selects the `k` best experts that have room, token after token.

    The result is that of serving the tokens one by one. It is computed by deferred
    acceptance, for all tokens at once: an expert with more tokens than its capacity
    is closed to its later tokens, which select again, until no expert is over its
    capacity.

    Args:
        probs: float32 `[g, t, e]`; all zero for a masked token.
        k: int, at most `e`.
        expert_capacity: int or scalar int32 tensor.
        normalize: bool, whether to divide a token's weights by their sum.
            Defaults to `False`.
        scores: float32 `[g, t, e]`, the values to select by; `-inf` excludes an
            expert. Defaults to `probs`.

    Returns:
        A `Selection`; -1 and weight 0 where every expert is full.

    Reference:
        [Gale and Shapley, 1962](https://doi.org/10.1080/00029890.1962.11989827).
    """
    scores = ops.stop_gradient(nonfinite_to_zero(probs) if scores is None else scores)

    def select(open_):
        open_scores = ops.where(open_, scores, EXCLUDED_SCORE)
        return top_k(probs, k, normalize, open_scores)

    def close(open_, _):
        index = select(open_).expert_index
        selected = ops.any(ops.one_hot(index, probs.shape[-1], dtype="bool"), axis=2)
        taken = ops.cast(selected, "int32")
        earlier = ops.cumsum(taken, axis=1) - taken
        has_room = earlier < expert_capacity
        again = ops.any(ops.logical_and(selected, ops.logical_not(has_room)))
        return ops.logical_and(open_, has_room), again

    open_ = ops.ones_like(scores, dtype="bool")
    again = ops.convert_to_tensor(True)
    open_, _ = ops.while_loop(lambda _, again: again, close, (open_, again))
    return select(open_)


def within_best_groups(scores, num_groups, num_selected, num_best=2):
    """Limits each token to the experts of its best groups of experts.

    The score of a group is the sum of the scores of its best experts.

    Args:
        scores: float32 `[g, t, e]`.
        num_groups: int that divides `e`, the number of groups of consecutive
            experts.
        num_selected: int, the number of groups that a token may use.
        num_best: int, the number of best experts whose scores are summed. Defaults to
            2.

    Returns:
        `scores`, with `-inf` for the experts of the other groups.

    Reference:
        [DeepSeek-AI, 2024](https://arxiv.org/abs/2412.19437), section 2.1.2;
        [DeepSeek-AI, 2024](https://arxiv.org/abs/2405.04434), section 2.2.2, with one
        best expert.
    """
    groups, tokens, num_experts = ops.shape(scores)
    shape = (groups, tokens, num_groups, num_experts // num_groups)
    by_group = ops.reshape(scores, shape)
    group_scores = ops.sum(ops.sort(by_group, axis=-1)[..., -num_best:], axis=-1)
    all_valid = ops.ones_like(group_scores)
    best = top_k(all_valid, num_selected, scores=group_scores).expert_index
    kept = ops.any(ops.one_hot(best, num_groups, dtype="bool"), axis=2)
    kept = ops.broadcast_to(ops.expand_dims(kept, -1), shape)
    return ops.where(ops.reshape(kept, ops.shape(scores)), scores, EXCLUDED_SCORE)


# The name of earlier versions.
finite = nonfinite_to_zero
