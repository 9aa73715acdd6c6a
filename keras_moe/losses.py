"""Auxiliary losses of routers, as pure functions.

Masked tokens do not count; without any valid token a loss is 0.
"""

import math

from keras_moe.kernels import ops, sum_over_replicas
from keras_moe.utils import checks

# Its square, summed over a billion tokens, is finite in float32.
LARGEST_LOGSUMEXP = 1e14
SMALLEST_PROBABILITY = 1e-30
SMALLEST_NOISE = 1e-6


def load_balancing_loss(probs, load, per_group=True, across_replicas=False):
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
        across_replicas: bool, whether `f` of all groups includes those of the other
            replicas (TensorFlow) or processes (PyTorch) of a training step. Then the
            loss is the share of this replica, and the mean over replicas is the loss
            of all groups. Defaults to `False`.

    Returns:
        A float32 scalar.

    Example:

    ```python
    layer = keras_moe.presets.mixtral(num_experts=4, d_ff=32)
    routing = layer.route(np.ones((2, 8, 16)))
    loss = keras_moe.losses.load_balancing_loss(routing.probs, routing.load)
    ```

    Reference:
        [Fedus et al., 2021](https://arxiv.org/abs/2101.03961), equations 4-6;
        [Qiu et al., 2025](https://arxiv.org/abs/2501.11873), section 3, for all groups
        and replicas.
    """
    num_experts = probs.shape[-1]
    load = ops.stop_gradient(load)
    total = ops.sum(probs, axis=1)  # g e
    tokens = ops.stop_gradient(ops.sum(total, axis=-1, keepdims=True))  # g 1
    all_tokens = ops.sum(tokens)
    if not per_group:
        loads = ops.sum(load * tokens, axis=0)
        counts = ops.stack([all_tokens, ops.ones_like(all_tokens)])
        sums = ops.concatenate([loads, counts])
        if across_replicas:
            sums = sum_over_replicas(sums)
        loads, tokens, replicas = sums[:-2], sums[-2], sums[-1]
        load = loads / ops.maximum(tokens, 1.0)
        all_tokens = tokens / replicas
    return num_experts * ops.sum(load * total) / ops.maximum(all_tokens, 1.0)


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
        valid = ops.cast(math.prod(ops.shape(squares)), "float32")
    else:
        valid = ops.sum(ops.cast(mask, "float32"))
        squares = ops.where(mask, squares, 0.0)
    return ops.sum(squares) / ops.maximum(valid, 1.0)


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
    return _squared_variation(ops.sum(probs, axis=(0, 1)))


def load_loss(logits, noisy_logits, noise_std, num_selected_experts, mask=None):
    """Computes the load loss of noisy top-k gating: the imbalance of expected loads.

    The expected load of expert `i` is the sum, over the tokens, of the probability that
    it is among the `k` best if only its own noise is drawn again:
    `Φ((logits_i - t_i) / σ_i)`, where `t_i` is the k-th largest noisy logit of the
    other experts. The loss is `(std / mean)²` of these loads over the experts: 0 if all
    are the same.

    Args:
        logits: float32 `[g, t, e]`, without noise.
        noisy_logits: float32 `[g, t, e]`, `logits` plus Gaussian noise.
        noise_std: float, or float32 that broadcasts to `[g, t, e]`, the standard
            deviation `σ` of the noise; at least 1e-6 is used.
        num_selected_experts: int, the number `k` of experts per token, below `e`.
        mask: bool `[g, t]`, false for a masked token. Defaults to `None`, no mask.

    Returns:
        A float32 scalar.

    Example:

    ```python
    logits = keras.random.normal((1, 8, 4))
    noisy = logits + 0.25 * keras.random.normal((1, 8, 4))
    loss = 0.1 * keras_moe.losses.load_loss(logits, noisy, 0.25, 2)
    ```

    Reference:
        [Shazeer et al., 2017](https://arxiv.org/abs/1701.06538), appendix A, equations
        8-11.
    """
    k = checks.whole_number(
        "num_selected_experts", num_selected_experts, maximum=logits.shape[-1] - 1
    )
    best = ops.flip(ops.sort(noisy_logits, axis=-1), axis=-1)
    kth, next_one = best[..., k - 1 : k], best[..., k : k + 1]
    # Without an expert of the k best, the next one is the k-th of the others.
    threshold = ops.where(noisy_logits >= kth, next_one, kth)
    normal = (logits - threshold) / ops.maximum(noise_std, SMALLEST_NOISE)
    probability = 0.5 * (1.0 + ops.erf(normal / math.sqrt(2)))
    if mask is not None:
        probability = ops.where(ops.expand_dims(mask, -1), probability, 0.0)
    return _squared_variation(ops.sum(probability, axis=(0, 1)))


def router_entropy_loss(probs):
    """Computes the mean entropy of the router probabilities of a token.

    `-Σ_i p_i · log p_i`: 0 for a token that is certain of one expert, `log e` for one
    that has all experts with equal probability.

    Args:
        probs: float32 `[g, t, e]`, 1 in sum for a valid token, 0 for a masked one.

    Returns:
        A float32 scalar, the mean over the valid tokens.

    Example:

    ```python
    probs = keras.ops.softmax(keras.random.normal((1, 4, 8)))
    loss = 0.0001 * keras_moe.losses.router_entropy_loss(probs)
    ```

    Reference:
        [Huang et al., 2024](https://arxiv.org/abs/2403.07652), section 3.2.
    """
    total = -ops.sum(probs * ops.log(ops.maximum(probs, SMALLEST_PROBABILITY)))
    valid = ops.cast(ops.any(probs != 0, axis=-1), "float32")
    return total / ops.maximum(ops.sum(valid), 1.0)


def _squared_variation(x):
    """Returns `(std / mean)²` of a vector, 0 if all are 0."""
    mean = ops.mean(x)
    return ops.var(x) / ops.where(mean == 0, 1.0, ops.square(mean))
