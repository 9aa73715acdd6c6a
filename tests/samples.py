"""Routers and inputs that many tests share."""

from keras import ops

from keras_moe import (
    BiasBalancedMaskedRouter,
    ExpertsChooseMaskedRouter,
    MaskedRouter,
    RoundRobinRouter,
    SparseMixerRouter,
    Top2MaskedRouter,
    TopPMaskedRouter,
)

E, H, F = 4, 6, 10

# Every router class, and every option of a router.
ROUTERS = {
    "switch": lambda: MaskedRouter(E, jitter_noise=0.1, noise_std=0.1),
    "token": lambda: MaskedRouter(E, num_selected_experts=2, priority="token"),
    "probability": lambda: MaskedRouter(
        E, num_selected_experts=2, priority="probability"
    ),
    "next best": lambda: MaskedRouter(
        E,
        num_selected_experts=2,
        normalize_weights=True,
        priority="token",
        overflow="next_best",
    ),
    "gumbel": lambda: MaskedRouter(E, mechanism="gumbel"),
    "hidden layers": lambda: MaskedRouter(
        E, hidden_layers=[7], kernel_initializer="he_normal"
    ),
    "experts choose": lambda: ExpertsChooseMaskedRouter(E, mechanism="sigmoid"),
    "bias balanced": lambda: BiasBalancedMaskedRouter(
        E, num_selected_experts=2, num_expert_groups=2, bias_update_rate=0.1
    ),
    "top 2": lambda: Top2MaskedRouter(E),
    "options": lambda: MaskedRouter(
        E,
        num_selected_experts=2,
        mechanism="sqrt_softplus",
        normalize_weights=True,
        normalization_epsilon=1e-6,
        routed_scaling_factor=1.5,
        use_expert_scale=True,
        num_expert_groups=2,
        group_score_experts=1,
        input_norm_epsilon=1e-6,
        kernel_initializer="he_normal",
    ),
    "batch scope": lambda: MaskedRouter(
        E,
        num_selected_experts=2,
        priority="random",
        noise_std="learned",
        balance_scope="batch",
    ),
    "round robin": lambda: RoundRobinRouter(E, num_selected_experts=2),
    "top p": lambda: TopPMaskedRouter(
        E, threshold=0.5, normalize_weights=True, entropy_loss_weight=0.1
    ),
    "sparse mixer": lambda: SparseMixerRouter(E, sparsity_threshold=2.0),
}


def inputs(rng, *shape, h=H):
    return rng.normal(size=(*shape, h)).astype("float32")


def numpy_call(layer, x, **kwargs):
    return ops.convert_to_numpy(layer(x, **kwargs))


def prefer_first(shape, dtype=None):
    """Initializer of a gate's bias that makes every token select expert 0."""
    return ops.cast(ops.arange(shape[0]) == 0, dtype) * 100.0
