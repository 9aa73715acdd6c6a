"""The choices of known papers and models, as plain `MoeLayer`s.

Each function takes the number of experts `e`, the width `f` of each, and
keyword arguments of `MoeLayer`, which come before the preset's own.
"""

from keras_moe.experts import FeedForwardExperts
from keras_moe.moe_layer import MoeLayer
from keras_moe.routers import (
    BiasBalancedMaskedRouter,
    ExpertsChooseMaskedRouter,
    MaskedRouter,
    Top2MaskedRouter,
)

# Experts without biases, as all but `expert_choice` have them.
_RELU = {"activation": "relu", "use_bias": False}
_SWIGLU = {"activation": "silu", "gated": True, "use_bias": False}


def switch(num_experts, d_ff, **kwargs):
    """The Switch Transformer: one expert a token, and a capacity.

    Args:
        num_experts: int.
        d_ff: int.
        **kwargs: of `MoeLayer`; capacity factors of 1.25 and 2 by default.

    Returns:
        A `MoeLayer`.

    Reference:
        [Fedus et al., 2021](https://arxiv.org/abs/2101.03961), section 2.
    """
    router = MaskedRouter(
        num_experts,
        jitter_noise=0.01,
        use_bias=False,
        load_balancing_loss_weight=0.01,
        dtype=kwargs.get("dtype"),
    )
    return _make(router, d_ff, _RELU, kwargs, train=1.25, evaluation=2.0)


def gshard(num_experts, d_ff, **kwargs):
    """GShard: the best expert, and the second best at random by its weight.

    Args:
        num_experts: int.
        d_ff: int.
        **kwargs: of `MoeLayer`; capacity factors of 2 by default.

    Returns:
        A `MoeLayer`.

    Reference:
        [Lepikhin et al., 2020](https://arxiv.org/abs/2006.16668), algorithm 1.
    """
    router = Top2MaskedRouter(
        num_experts,
        second_policy_train="random",
        second_threshold_train=0.5,
        second_policy_eval="all",
        use_bias=False,
        load_balancing_loss_weight=0.01,
        dtype=kwargs.get("dtype"),
    )
    return _make(router, d_ff, _RELU, kwargs, train=2.0, evaluation=2.0)


def mixtral(num_experts, d_ff, *, num_selected_experts=2, **kwargs):
    """Mixtral: two SwiGLU experts a token, dropless.

    Args:
        num_experts: int.
        d_ff: int.
        num_selected_experts: int.
        **kwargs: of `MoeLayer`; no capacity by default.

    Returns:
        A `MoeLayer`.

    Reference:
        [Jiang et al., 2024](https://arxiv.org/abs/2401.04088), section 2.1.
    """
    router = _normalized_choice(num_experts, num_selected_experts, 0.02, kwargs)
    return _make(router, d_ff, _SWIGLU, kwargs)


def qwen3_moe(num_experts, d_ff, *, num_selected_experts=8, **kwargs):
    """Qwen3-MoE: eight narrow SwiGLU experts a token, dropless.

    Args:
        num_experts: int; 128 in the released models.
        d_ff: int.
        num_selected_experts: int.
        **kwargs: of `MoeLayer`; no capacity by default.

    Returns:
        A `MoeLayer`.

    Reference:
        [Qwen Team, 2025](https://arxiv.org/abs/2505.09388), section 2.
    """
    router = _normalized_choice(num_experts, num_selected_experts, 0.001, kwargs)
    return _make(router, d_ff, _SWIGLU, kwargs)


def deepseek_v3(
    num_experts,
    d_ff,
    *,
    num_selected_experts=8,
    num_expert_groups=8,
    num_selected_groups=4,
    **kwargs,
):
    """DeepSeek-V3: sigmoid scores, balanced by a bias, dropless.

    The model's shared expert is `MoeLayerWithBackbone` around this layer.

    Args:
        num_experts: int; 256 in the released model.
        d_ff: int.
        num_selected_experts: int.
        num_expert_groups: int that divides `num_experts`.
        num_selected_groups: int.
        **kwargs: of `MoeLayer`; no capacity by default.

    Returns:
        A `MoeLayer`.

    Reference:
        [DeepSeek-AI, 2024](https://arxiv.org/abs/2412.19437), section 2.1.2.
    """
    router = BiasBalancedMaskedRouter(
        num_experts,
        num_selected_experts=num_selected_experts,
        num_expert_groups=num_expert_groups,
        num_selected_groups=num_selected_groups,
        routed_scaling_factor=2.5,
        bias_update_rate=0.001,
        use_bias=False,
        dtype=kwargs.get("dtype"),
    )
    return _make(router, d_ff, _SWIGLU, kwargs)


def expert_choice(num_experts, d_ff, **kwargs):
    """Expert choice: each expert takes its best tokens, twice as many in all.

    Not for decoders: it looks at later tokens.

    Args:
        num_experts: int.
        d_ff: int.
        **kwargs: of `MoeLayer`; capacity factors of 2 by default.

    Returns:
        A `MoeLayer`.

    Reference:
        [Zhou et al., 2022](https://arxiv.org/abs/2202.09368), section 3.
    """
    router = ExpertsChooseMaskedRouter(
        num_experts, use_bias=False, dtype=kwargs.get("dtype")
    )
    return _make(router, d_ff, {}, kwargs, train=2.0, evaluation=2.0)


def _normalized_choice(num_experts, k, loss_of_k, kwargs):
    """Softmax, the best `k`, and their weights divided by their sum.

    `loss_of_k` is the `router_aux_loss_coef` in the released models' configs,
    of a balance loss that is `k` at balance where ours is 1.
    """
    return MaskedRouter(
        num_experts,
        num_selected_experts=k,
        normalize_weights=True,
        use_bias=False,
        load_balancing_loss_weight=loss_of_k * k,
        dtype=kwargs.get("dtype"),
    )


def _make(router, d_ff, experts, kwargs, train=None, evaluation=None):
    experts = FeedForwardExperts(
        router.num_experts, d_ff, dtype=kwargs.get("dtype"), **experts
    )
    factors = {"train_capacity_factor": train, "eval_capacity_factor": evaluation}
    return MoeLayer(experts, router, **{**factors, **kwargs})
