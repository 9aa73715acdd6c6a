"""What a router is trained on besides the task. Pure functions.

Sums run over the tokens that are not masked; without any, a loss is 0.
"""

from keras import ops

# So small that its square, added up over a billion tokens, is a float32.
LARGEST = 1e14


def load_balancing_loss(probs, load, per_group=True):
    """The balance loss of the Switch Transformer.

    It is 1 at balance; when all tokens are sure of the same expert it is `e`,
    and with `k` choices `e / k`.

    `e · Σ_i f_i · P_i`, where `f_i` is the share of assignments that want
    expert `i` and `P_i` its mean probability, for each group; the mean over
    the groups counts each by its valid tokens. Only `P` has a gradient.

    Args:
        probs: float32 `[g, t, e]`: 1 in sum for a valid token, 0 for a masked
            one.
        load: float32 `[g, e]`, 1 in sum: the share of each expert in all
            wanted assignments of the group (of all `k` choices of a token),
            before any capacity.
        per_group: bool; if false, `f` and `P` are those of all groups
            together, which lets one group make up for another.

    Returns:
        A float32 scalar; 0 without a valid token.

    Reference:
        [Fedus et al., 2021](https://arxiv.org/abs/2101.03961), equations 4-6.
    """
    num_experts = probs.shape[-1]
    load = ops.stop_gradient(load)
    total = ops.sum(probs, axis=1)  # g e
    tokens = ops.stop_gradient(ops.sum(total, axis=-1, keepdims=True))  # g 1
    all_tokens = ops.maximum(ops.sum(tokens), 1.0)
    if not per_group:
        load = ops.sum(load * tokens, axis=0) / all_tokens
    return num_experts * ops.sum(load * total) / all_tokens


def router_z_loss(logits, mask=None):
    """The z-loss, which keeps a router's logits small.

    The mean over tokens of `logsumexp(logits)²`.

    Args:
        logits: float32 `[g, t, e]`.
        mask: bool `[g, t]`, false for a masked token, or `None`.

    Returns:
        A float32 scalar; 0 without a valid token.

    Reference:
        [Zoph et al., 2022](https://arxiv.org/abs/2202.08906), equation 5.
    """
    # Where its square would be beyond float32, it is bounded, without a gradient.
    sizes = ops.clip(ops.logsumexp(logits, axis=-1), -LARGEST, LARGEST)
    squares = ops.square(sizes)
    if mask is None:
        mask = ops.ones_like(squares, dtype="bool")
    valid = ops.sum(ops.cast(mask, "float32"))
    return ops.sum(ops.where(mask, squares, 0.0)) / ops.maximum(valid, 1.0)


def importance_loss(probs):
    """The importance loss: how unevenly the experts are liked.

    The squared coefficient of variation `(std / mean)²`, over the experts, of
    their importance, the sum of their probabilities: 0 where all are liked
    alike, `e - 1` where one is liked alone.

    Args:
        probs: float32 `[g, t, e]`, 0 for a masked token.

    Returns:
        A float32 scalar; 0 without a valid token.

    Reference:
        [Shazeer et al., 2017](https://arxiv.org/abs/1701.06538), equations 6-7.
    """
    importance = ops.sum(probs, axis=(0, 1))
    mean = ops.mean(importance)
    return ops.var(importance) / ops.where(mean == 0, 1.0, ops.square(mean))
