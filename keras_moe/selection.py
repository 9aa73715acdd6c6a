"""Choosing: which experts a token wants, and with what weight."""

from typing import Any, NamedTuple

from keras import ops

# The score of what is not to be chosen.
NEVER = float("-inf")


class Selection(NamedTuple):
    """The experts that tokens want.

    Attributes:
        expert_index: int32 `[g, t, k]`, best first; -1 for no expert.
        weight: float32 `[g, t, k]`.
    """

    expert_index: Any
    weight: Any


def finite(probs):
    """The probabilities as numbers that compare: 0 for a NaN or an infinity.

    A token whose probabilities are not finite can so be chosen or not without
    a say in what happens to the others; its weight stays what it was.
    """
    return ops.where(ops.isfinite(probs), probs, 0.0)


def valid_tokens(probs):
    """bool `[g, t]`: the tokens that are not masked (a NaN token is valid)."""
    return ops.any(probs != 0, axis=-1)


def normalized(probs):
    """Scores divided by their sum over the experts; zero where they are zero."""
    total = ops.sum(probs, axis=-1, keepdims=True)
    # The gradient has its square, which in float32 must not be 0. A NaN stays.
    least = ops.where(total == 0, 1.0, 1e-18)
    return probs / ops.where(total < 1e-18, least, total)


def top_k(probs, k, normalize=False, scores=None):
    """Each token's `k` best experts, of equals the one with the lower index.

    Args:
        probs: float32 `[g, t, e]`; all zero for a masked token.
        k: an int, at most `e`.
        normalize: whether the weights are divided by their sum.
        scores: float32 `[g, t, e]`, what to choose by, if not by `probs`;
            `-inf` for an expert that the token may not choose.

    Returns:
        A `Selection`; a masked token has -1 and weight 0.
    """
    num_experts = probs.shape[-1]
    valid = valid_tokens(probs)
    # No gradient comes through a choice.
    scores = ops.stop_gradient(finite(probs) if scores is None else scores)
    scores = ops.where(ops.expand_dims(valid, -1), scores, NEVER)
    choices, weights = [], []
    # `ops.top_k` leaves the order of equals open; `ops.argmax` does not.
    for _ in range(k):
        choice = ops.cast(ops.argmax(scores, axis=-1), "int32")
        chosen = ops.one_hot(choice, num_experts, dtype="bool")
        chosen = ops.logical_and(chosen, scores > NEVER)
        choices.append(ops.where(ops.any(chosen, axis=-1), choice, -1))
        weights.append(ops.sum(ops.where(chosen, probs, 0.0), axis=-1))
        scores = ops.where(chosen, NEVER, scores)
    index, weight = ops.stack(choices, axis=-1), ops.stack(weights, axis=-1)
    return Selection(index, normalized(weight) if normalize else weight)


def next_best(probs, k, expert_capacity, normalize=False):
    """As `top_k`, but what finds its expert full goes to the next best one.

    Tokens choose in their order; each takes its `k` best experts of those that
    still have room. All do so at once, and where an expert is wanted beyond
    its capacity it is closed to the later tokens, which choose again, until
    nobody has to: deferred acceptance, with the outcome of the one after the
    other.

    Args:
        probs: float32 `[g, t, e]`; all zero for a masked token.
        k: an int, at most `e`.
        expert_capacity: an int or a scalar int32 tensor.
        normalize: whether the weights are divided by their sum.

    Returns:
        A `Selection`; -1 and weight 0 where every expert is full.

    Reference:
        [Gale and Shapley, 1962](https://doi.org/10.1080/00029890.1962.11989827).
    """
    scores = ops.stop_gradient(finite(probs))

    def choose(open_):
        return top_k(probs, k, normalize, ops.where(open_, scores, NEVER))

    def close(open_, _):
        index = choose(open_).expert_index
        chosen = ops.any(ops.one_hot(index, probs.shape[-1], dtype="bool"), axis=2)
        taken = ops.cast(chosen, "int32")
        earlier = ops.cumsum(taken, axis=1) - taken
        has_room = earlier < expert_capacity
        again = ops.any(ops.logical_and(chosen, ops.logical_not(has_room)))
        return ops.logical_and(open_, has_room), again

    open_ = ops.ones_like(scores, dtype="bool")
    again = ops.convert_to_tensor(True)
    open_, _ = ops.while_loop(lambda _, again: again, close, (open_, again))
    return choose(open_)


def within_best_groups(scores, num_groups, num_selected):
    """Leaves a token the experts of its best groups of experts.

    A group's score is the sum of its two best experts' scores.

    Args:
        scores: float32 `[g, t, e]`.
        num_groups: an int that divides `e`: the experts, in order, are cut
            into so many groups.
        num_selected: an int: how many of these a token may choose from.

    Returns:
        `scores`, `-inf` for the experts of the other groups.

    Reference:
        [DeepSeek-AI, 2024](https://arxiv.org/abs/2412.19437), section 2.1.2.
    """
    groups, tokens, num_experts = ops.shape(scores)
    shape = (groups, tokens, num_groups, num_experts // num_groups)
    by_group = ops.reshape(scores, shape)
    of_group = ops.sum(ops.sort(by_group, axis=-1)[..., -2:], axis=-1)
    everybody = ops.ones_like(of_group)
    best = top_k(everybody, num_selected, scores=of_group).expert_index
    kept = ops.any(ops.one_hot(best, num_groups, dtype="bool"), axis=2)
    kept = ops.broadcast_to(ops.expand_dims(kept, -1), shape)
    return ops.where(ops.reshape(kept, ops.shape(scores)), scores, NEVER)
