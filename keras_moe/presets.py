"""The choices of known papers and models, as plain `MoeLayer`s.

Each function takes the number of experts `e`, the width `f` of each, and
keyword arguments of `MoeLayer`, which come before the preset's own.
"""

from keras_moe import checks
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

# Capacities.
_TWICE = {"train_capacity_factor": 2.0, "eval_capacity_factor": 2.0}
_DROPLESS = {"train_capacity_factor": None, "eval_capacity_factor": None}


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
    router = {"jitter_noise": 0.01, "load_balancing_loss_weight": 0.01}
    factors = {"train_capacity_factor": 1.25, "eval_capacity_factor": 2.0}
    return _make(num_experts, d_ff, MaskedRouter, router, _RELU, factors | kwargs)


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
    router = {
        "second_policy_train": "random",
        "second_threshold_train": 0.5,
        "second_policy_eval": "all",
        "load_balancing_loss_weight": 0.01,
    }
    return _make(num_experts, d_ff, Top2MaskedRouter, router, _RELU, _TWICE | kwargs)


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
    router = _choice(num_selected_experts, 0.02)
    return _make(num_experts, d_ff, MaskedRouter, router, _SWIGLU, _DROPLESS | kwargs)


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
    router = _choice(num_selected_experts, 0.001)
    return _make(num_experts, d_ff, MaskedRouter, router, _SWIGLU, _DROPLESS | kwargs)


def olmoe(num_experts, d_ff, *, num_selected_experts=8, **kwargs):
    """OLMoE: eight narrow SwiGLU experts a token, not normalised, dropless.

    Args:
        num_experts: int; 64 in the released model.
        d_ff: int.
        num_selected_experts: int.
        **kwargs: of `MoeLayer`; no capacity by default.

    Returns:
        A `MoeLayer`.

    Reference:
        [Muennighoff et al., 2024](https://arxiv.org/abs/2409.02060), section 2.
    """
    router = _choice(num_selected_experts, 0.01, normalize=False)
    router["router_z_loss_weight"] = 0.001
    return _make(num_experts, d_ff, MaskedRouter, router, _SWIGLU, _DROPLESS | kwargs)


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
    router = {
        "num_selected_experts": num_selected_experts,
        "num_expert_groups": num_expert_groups,
        "num_selected_groups": num_selected_groups,
        "routed_scaling_factor": 2.5,
        "bias_update_rate": 0.001,
    }
    kind = BiasBalancedMaskedRouter
    return _make(num_experts, d_ff, kind, router, _SWIGLU, _DROPLESS | kwargs)


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
    kind = ExpertsChooseMaskedRouter
    return _make(num_experts, d_ff, kind, {}, {}, _TWICE | kwargs)


def _choice(k, loss_of_k, normalize=True):
    """Softmax, the best `k`, and their weights divided by their sum or not.

    `loss_of_k` is the `router_aux_loss_coef` in the released models' configs,
    of a balance loss that is `k` at balance where ours is 1.
    """
    k = checks.whole_number("num_selected_experts", k)
    return {
        "num_selected_experts": k,
        "normalize_weights": normalize,
        "load_balancing_loss_weight": loss_of_k * k,
    }


def _make(num_experts, d_ff, router_class, router, experts, kwargs):
    """A layer from the arguments of its router, its experts and itself."""
    dtype = kwargs.get("dtype")
    return MoeLayer(
        FeedForwardExperts(num_experts, d_ff, dtype=dtype, **experts),
        router_class(num_experts, use_bias=False, dtype=dtype, **router),
        **kwargs,
    )
