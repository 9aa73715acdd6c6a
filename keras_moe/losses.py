"""Auxiliary losses of routers, as pure functions.

Masked tokens do not count; without any valid token a loss is 0.
"""

from keras import ops

# Its square, summed over a billion tokens, is finite in float32.
LARGEST_LOGSUMEXP = 1e14


def load_balancing_loss(probs, load, per_group=True):
    """Computes the load-balancing loss of the Switch Transformer.

    `e · Σ_i f_i · P_i` for each group, where `f_i` is the fraction of assignments to
    expert `i` and `P_i` its mean router probability; then the mean over the groups,
    weighted by their valid tokens. Only `P` has a gradient.

    The loss is 1 for a balanced load, and `e / k` where all tokens select the same `k`
    experts with certainty. Of a nearly uniform gate it is about 1, whatever the load.

    Args:
        probs: float32 `[g, t, e]`, 1 in sum for a valid token, 0 for a masked one.
        load: float32 `[g, e]`, 1 in sum, the fraction of the group's assignments (all
            `k` choices of its tokens, before any is dropped) that each expert has.
        per_group: bool, whether `f` and `P` are computed for each group. If `False`,
            over all groups together. Defaults to `True`.

    Returns:
        A float32 scalar.

    Example:

    ```python
    layer = keras_moe.presets.mixtral(num_experts=4, d_ff=32)
    routing = layer.route(np.ones((2, 8, 16)))
    loss = keras_moe.losses.load_balancing_loss(routing.probs, routing.load)
    ```

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
    """Computes the router z-loss, which keeps router logits small.

    The mean of `logsumexp(logits)²` over the valid tokens.

    Args:
        logits: float32 `[g, t, e]`.
        mask: bool `[g, t]`, false for a masked token. Defaults to `None`, no mask.

    Returns:
        A float32 scalar.

    Example:

    ```python
    logits = keras.random.normal((1, 4, 8))
    loss = 0.001 * keras_moe.losses.router_z_loss(logits)
    ```

    Reference:
        [Zoph et al., 2022](https://arxiv.org/abs/2202.08906), equation 5.
    """
    # Clipped, without a gradient, where the square would overflow.
    sizes = ops.clip(
        ops.logsumexp(logits, axis=-1), -LARGEST_LOGSUMEXP, LARGEST_LOGSUMEXP
    )
    squares = ops.square(sizes)
    if mask is None:
        mask = ops.ones_like(squares, dtype="bool")
    valid = ops.sum(ops.cast(mask, "float32"))
    return ops.sum(ops.where(mask, squares, 0.0)) / ops.maximum(valid, 1.0)


def importance_loss(probs):
    """Computes the importance loss: the imbalance of total router probability.

    The squared coefficient of variation `(std / mean)²`, over the experts, of their
    importance, the sum of their probabilities: 0 if it is the same for all experts,
    `e - 1` if one expert has all of it.

    Args:
        probs: float32 `[g, t, e]`, 0 for a masked token.

    Returns:
        A float32 scalar.

    Example:

    ```python
    probs = keras.ops.softmax(keras.random.normal((1, 4, 8)))
    loss = 0.1 * keras_moe.losses.importance_loss(probs)
    ```

    Reference:
        [Shazeer et al., 2017](https://arxiv.org/abs/1701.06538), equations 6-7.
    """
    importance = ops.sum(probs, axis=(0, 1))
    mean = ops.mean(importance)
    return ops.var(importance) / ops.where(mean == 0, 1.0, ops.square(mean))
