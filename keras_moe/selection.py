"""Choosing: which experts a token wants, and with what weight."""

from typing import Any, NamedTuple

from keras import ops


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


def top_k(probs, k, normalize=False):
    """Each token's `k` best experts, of equals the one with the lower index.

    Args:
        probs: float32 `[g, t, e]`; all zero for a masked token.
        k: an int, at most `e`.
        normalize: whether the weights are divided by their sum.

    Returns:
        A `Selection`; a masked token has -1 and weight 0.
    """
    num_experts = probs.shape[-1]
    scores = ops.stop_gradient(finite(probs))
    choices, weights = [], []
    # `ops.top_k` leaves the order of equals open; `ops.argmax` does not.
    for _ in range(k):
        choice = ops.argmax(scores, axis=-1)
        chosen = ops.one_hot(choice, num_experts, dtype="bool")
        scores = ops.where(chosen, -1.0, scores)
        choices.append(choice)
        weights.append(ops.sum(ops.where(chosen, probs, 0.0), axis=-1))
    valid = ops.expand_dims(valid_tokens(probs), -1)
    index = ops.where(valid, ops.cast(ops.stack(choices, axis=-1), "int32"), -1)
    weight = ops.stack(weights, axis=-1)
    if normalize:
        total = ops.sum(weight, axis=-1, keepdims=True)
        weight = weight / ops.where(valid, total, 1.0)
    return Selection(index, weight)
