"""What a router is trained on besides the task. Pure functions.

Sums run over the tokens that are not masked; without any, a loss is 0.
"""

from keras import ops


def load_balancing_loss(probs, load):
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

    Returns:
        A float32 scalar; 0 without a valid token.

    Reference:
        [Fedus et al., 2021](https://arxiv.org/abs/2101.03961), equations 4-6.
    """
    num_experts = probs.shape[-1]
    total = ops.sum(probs, axis=1)  # g e
    valid = ops.stop_gradient(ops.sum(total))
    loss = num_experts * ops.sum(ops.stop_gradient(load) * total)
    return loss / ops.maximum(valid, 1.0)


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
    squares = ops.square(ops.logsumexp(logits, axis=-1))
    if mask is None:
        mask = ops.ones_like(squares, dtype="bool")
    valid = ops.sum(ops.cast(mask, "float32"))
    return ops.sum(ops.where(mask, squares, 0.0)) / ops.maximum(valid, 1.0)
