"""Presets: the settings of known papers and models, as ready-made layers.

Each function takes the number of experts `e` and the size `f` of each. All other
arguments have the values of the paper or of the released model as defaults.

Presets with a capacity drop tokens where similar tokens are routed together; see
"Which settings?" in the documentation.
"""

from keras_moe.activations import clamped_swiglu
from keras_moe.experts import FeedForwardExperts
from keras_moe.layers import MoeLayer, MoeLayerWithBackbone
from keras_moe.routers import (
    BiasBalancedMaskedRouter,
    ExpertsChooseMaskedRouter,
    MaskedRouter,
    Top2MaskedRouter,
)
from keras_moe.utils import checks

# Experts without biases, as in all of these but `expert_choice`.
_RELU = {"activation": "relu", "use_bias": False}
_SWIGLU = {"activation": "silu", "gated": True, "use_bias": False}


def switch(
    num_experts,
    d_ff,
    *,
    train_capacity_factor=1.25,
    eval_capacity_factor=2.0,
    router_kwargs=None,
    experts_kwargs=None,
    **kwargs,
):
    """Creates the layer of the Switch Transformer: one expert per token.

    Similar tokens of a group select the same experts, so with groups of one example
    these capacity factors drop many tokens of real text. `examples_per_group=None`
    drops few, and a factor of `None` drops none.

    Args:
        num_experts: int, the number of experts `e`.
        d_ff: int, the size `f` of an expert's inner layer.
        train_capacity_factor: see `MoeLayer`. Defaults to 1.25.
        eval_capacity_factor: see `MoeLayer`. Defaults to 2.
        router_kwargs: dict of further arguments of the router. Defaults to `None`.
        experts_kwargs: dict of further arguments of `FeedForwardExperts`. Defaults to
            `None`.
        **kwargs: further arguments of `MoeLayer`.

    Returns:
        A `MoeLayer`.

    Example:

    ```python
    layer = keras_moe.presets.switch(num_experts=8, d_ff=64)
    layer(np.ones((2, 32, 16))).shape  # (2, 32, 16)
    ```

    Reference:
        [Fedus et al., 2021](https://arxiv.org/abs/2101.03961), section 2.
    """
    router = {"jitter_noise": 0.01, "load_balancing_loss_weight": 0.01}
    return _moe_layer(
        num_experts,
        d_ff,
        MaskedRouter,
        router,
        _RELU,
        router_kwargs,
        experts_kwargs,
        train_capacity_factor=train_capacity_factor,
        eval_capacity_factor=eval_capacity_factor,
        **kwargs,
    )


def gshard(
    num_experts,
    d_ff,
    *,
    train_capacity_factor=2.0,
    eval_capacity_factor=2.0,
    router_kwargs=None,
    experts_kwargs=None,
    **kwargs,
):
    """Creates the layer of GShard: the best expert, and the second best at random.

    The second expert is used with a probability of twice its combine weight.

    Similar tokens of a group select the same experts, so with groups of one example
    these capacity factors drop many tokens of real text. `examples_per_group=None`
    drops few, and a factor of `None` drops none.

    Args:
        num_experts: int, the number of experts `e`.
        d_ff: int, the size `f` of an expert's inner layer.
        train_capacity_factor: see `MoeLayer`. Defaults to 2.
        eval_capacity_factor: see `MoeLayer`. Defaults to 2.
        router_kwargs: dict of further arguments of the router. Defaults to `None`.
        experts_kwargs: dict of further arguments of `FeedForwardExperts`. Defaults to
            `None`.
        **kwargs: further arguments of `MoeLayer`.

    Returns:
        A `MoeLayer`.

    Example:

    ```python
    layer = keras_moe.presets.gshard(num_experts=8, d_ff=64)
    layer(np.ones((2, 32, 16))).shape  # (2, 32, 16)
    ```

    Reference:
        [Lepikhin et al., 2020](https://arxiv.org/abs/2006.16668), algorithm 1.
    """
    router = {
        "second_policy_train": "random",
        "second_threshold_train": 0.5,
        "second_policy_eval": "all",
        "load_balancing_loss_weight": 0.01,
    }
    return _moe_layer(
        num_experts,
        d_ff,
        Top2MaskedRouter,
        router,
        _RELU,
        router_kwargs,
        experts_kwargs,
        train_capacity_factor=train_capacity_factor,
        eval_capacity_factor=eval_capacity_factor,
        **kwargs,
    )


def mixtral(
    num_experts,
    d_ff,
    *,
    num_selected_experts=2,
    train_capacity_factor=None,
    eval_capacity_factor=None,
    router_kwargs=None,
    experts_kwargs=None,
    **kwargs,
):
    """Creates the layer of Mixtral: two SwiGLU experts per token, dropless.

    Args:
        num_experts: int, the number of experts `e`; 8 in the released
            models.
        d_ff: int, the size `f` of an expert's inner layer.
        num_selected_experts: int, the experts per token. Defaults to 2.
        train_capacity_factor: see `MoeLayer`. Defaults to `None`, no capacity.
        eval_capacity_factor: see `MoeLayer`. Defaults to `None`, no capacity.
        router_kwargs: dict of further arguments of the router. Defaults to `None`.
        experts_kwargs: dict of further arguments of `FeedForwardExperts`. Defaults to
            `None`.
        **kwargs: further arguments of `MoeLayer`.

    Returns:
        A `MoeLayer`.

    Example:

    ```python
    layer = keras_moe.presets.mixtral(num_experts=8, d_ff=64)
    layer(np.ones((2, 32, 16))).shape  # (2, 32, 16)
    ```

    Reference:
        [Jiang et al., 2024](https://arxiv.org/abs/2401.04088), section 2.1.
    """
    router = _top_k(num_selected_experts, loss_at_k=0.02)
    return _moe_layer(
        num_experts,
        d_ff,
        MaskedRouter,
        router,
        _SWIGLU,
        router_kwargs,
        experts_kwargs,
        train_capacity_factor=train_capacity_factor,
        eval_capacity_factor=eval_capacity_factor,
        **kwargs,
    )


def qwen2_moe(
    num_experts,
    d_ff,
    *,
    shared_d_ff=None,
    num_selected_experts=4,
    train_capacity_factor=None,
    eval_capacity_factor=None,
    router_kwargs=None,
    experts_kwargs=None,
    **kwargs,
):
    """Creates the layer of Qwen2-MoE: four SwiGLU experts per token, and a shared one.

    The combine weights are not normalized. A gate scales the output of the shared
    expert, which processes every token.

    Args:
        num_experts: int, the number of experts `e`; 60 or 64 in the
            released models.
        d_ff: int, the size `f` of an expert's inner layer.
        shared_d_ff: int, the size of the shared expert's inner layer. Defaults to
            `None`, four times `d_ff`.
        num_selected_experts: int, the experts per token. Defaults to 4.
        train_capacity_factor: see `MoeLayer`. Defaults to `None`, no capacity.
        eval_capacity_factor: see `MoeLayer`. Defaults to `None`, no capacity.
        router_kwargs: dict of further arguments of the router. Defaults to `None`.
        experts_kwargs: dict of further arguments of `FeedForwardExperts`. Defaults to
            `None`.
        **kwargs: further arguments of `MoeLayer`.

    Returns:
        A `MoeLayerWithBackbone`, whose backbone is the shared expert.

    Example:

    ```python
    layer = keras_moe.presets.qwen2_moe(num_experts=8, d_ff=32)
    layer(np.ones((2, 32, 16))).shape  # (2, 32, 16)
    ```

    Reference:
        [Qwen Team, 2024](https://arxiv.org/abs/2407.10671), section 2.2.2.
    """
    router = _top_k(num_selected_experts, loss_at_k=0.001, normalize=False)
    name = kwargs.pop("name", None)
    moe = _moe_layer(
        num_experts,
        d_ff,
        MaskedRouter,
        router,
        _SWIGLU,
        router_kwargs,
        experts_kwargs,
        train_capacity_factor=train_capacity_factor,
        eval_capacity_factor=eval_capacity_factor,
        **kwargs,
    )
    return _with_shared_expert(moe, d_ff, shared_d_ff, 4, name, backbone_gate=True)


def qwen3_moe(
    num_experts,
    d_ff,
    *,
    num_selected_experts=8,
    train_capacity_factor=None,
    eval_capacity_factor=None,
    router_kwargs=None,
    experts_kwargs=None,
    **kwargs,
):
    """Creates the layer of Qwen3-MoE: eight narrow SwiGLU experts per token, dropless.

    The balance loss is that of the whole batch.

    Args:
        num_experts: int, the number of experts `e`; 128 in the released
            models.
        d_ff: int, the size `f` of an expert's inner layer.
        num_selected_experts: int, the experts per token. Defaults to 8.
        train_capacity_factor: see `MoeLayer`. Defaults to `None`, no capacity.
        eval_capacity_factor: see `MoeLayer`. Defaults to `None`, no capacity.
        router_kwargs: dict of further arguments of the router. Defaults to `None`.
        experts_kwargs: dict of further arguments of `FeedForwardExperts`. Defaults to
            `None`.
        **kwargs: further arguments of `MoeLayer`.

    Returns:
        A `MoeLayer`.

    Example:

    ```python
    layer = keras_moe.presets.qwen3_moe(num_experts=16, d_ff=32)
    layer(np.ones((2, 32, 16))).shape  # (2, 32, 16)
    ```

    Reference:
        [Qwen Team, 2025](https://arxiv.org/abs/2505.09388), section 2.
    """
    router = _top_k(num_selected_experts, loss_at_k=0.001)
    router["balance_scope"] = "batch"
    return _moe_layer(
        num_experts,
        d_ff,
        MaskedRouter,
        router,
        _SWIGLU,
        router_kwargs,
        experts_kwargs,
        train_capacity_factor=train_capacity_factor,
        eval_capacity_factor=eval_capacity_factor,
        **kwargs,
    )


def olmoe(
    num_experts,
    d_ff,
    *,
    num_selected_experts=8,
    train_capacity_factor=None,
    eval_capacity_factor=None,
    router_kwargs=None,
    experts_kwargs=None,
    **kwargs,
):
    """Creates the layer of OLMoE: eight narrow SwiGLU experts per token, dropless.

    The combine weights are not normalized.

    Args:
        num_experts: int, the number of experts `e`; 64 in the released
            model.
        d_ff: int, the size `f` of an expert's inner layer.
        num_selected_experts: int, the experts per token. Defaults to 8.
        train_capacity_factor: see `MoeLayer`. Defaults to `None`, no capacity.
        eval_capacity_factor: see `MoeLayer`. Defaults to `None`, no capacity.
        router_kwargs: dict of further arguments of the router. Defaults to `None`.
        experts_kwargs: dict of further arguments of `FeedForwardExperts`. Defaults to
            `None`.
        **kwargs: further arguments of `MoeLayer`.

    Returns:
        A `MoeLayer`.

    Example:

    ```python
    layer = keras_moe.presets.olmoe(num_experts=16, d_ff=32)
    layer(np.ones((2, 32, 16))).shape  # (2, 32, 16)
    ```

    Reference:
        [Muennighoff et al., 2024](https://arxiv.org/abs/2409.02060), section 2.
    """
    router = _top_k(num_selected_experts, loss_at_k=0.01, normalize=False)
    router["router_z_loss_weight"] = 0.001
    return _moe_layer(
        num_experts,
        d_ff,
        MaskedRouter,
        router,
        _SWIGLU,
        router_kwargs,
        experts_kwargs,
        train_capacity_factor=train_capacity_factor,
        eval_capacity_factor=eval_capacity_factor,
        **kwargs,
    )


def deepseek_v3(
    num_experts,
    d_ff,
    *,
    num_selected_experts=8,
    num_expert_groups=8,
    num_selected_groups=4,
    routed_scaling_factor=2.5,
    train_capacity_factor=None,
    eval_capacity_factor=None,
    router_kwargs=None,
    experts_kwargs=None,
    **kwargs,
):
    """Creates the layer of DeepSeek-V3: sigmoid scores, balanced by a bias, dropless.

    For the model's shared expert, put the layer into a `MoeLayerWithBackbone`.

    Args:
        num_experts: int, the number of experts `e`; 256 in the released
            model.
        d_ff: int, the size `f` of an expert's inner layer.
        num_selected_experts: int, the experts per token. Defaults to 8.
        num_expert_groups: int that divides `num_experts`. Defaults to 8.
        num_selected_groups: int, the groups that a token may use. Defaults to 4.
        routed_scaling_factor: float above 0, by which the combine weights are
            multiplied. Defaults to 2.5.
        train_capacity_factor: see `MoeLayer`. Defaults to `None`, no capacity.
        eval_capacity_factor: see `MoeLayer`. Defaults to `None`, no capacity.
        router_kwargs: dict of further arguments of the router. Defaults to `None`.
        experts_kwargs: dict of further arguments of `FeedForwardExperts`. Defaults to
            `None`.
        **kwargs: further arguments of `MoeLayer`.

    Returns:
        A `MoeLayer`.

    Example:

    ```python
    layer = keras_moe.presets.deepseek_v3(num_experts=16, d_ff=32)
    layer(np.ones((2, 32, 16))).shape  # (2, 32, 16)
    ```

    Reference:
        [DeepSeek-AI, 2024](https://arxiv.org/abs/2412.19437), section 2.1.2.
    """
    router = _balanced_by_bias(
        num_selected_experts,
        num_expert_groups=num_expert_groups,
        num_selected_groups=num_selected_groups,
        routed_scaling_factor=routed_scaling_factor,
    )
    return _moe_layer(
        num_experts,
        d_ff,
        BiasBalancedMaskedRouter,
        router,
        _SWIGLU,
        router_kwargs,
        experts_kwargs,
        train_capacity_factor=train_capacity_factor,
        eval_capacity_factor=eval_capacity_factor,
        **kwargs,
    )


def deepseek_v2(
    num_experts,
    d_ff,
    *,
    num_selected_experts=6,
    num_expert_groups=8,
    num_selected_groups=3,
    routed_scaling_factor=16.0,
    shared_d_ff=None,
    train_capacity_factor=None,
    eval_capacity_factor=None,
    router_kwargs=None,
    experts_kwargs=None,
    **kwargs,
):
    """Creates the layer of DeepSeek-V2: groups of experts, and a shared expert.

    The combine weights are not normalized. A group of experts is as good as its best
    expert.

    Args:
        num_experts: int, the number of experts `e`; 160 or 64 in the
            released models.
        d_ff: int, the size `f` of an expert's inner layer.
        num_selected_experts: int, the experts per token. Defaults to 6.
        num_expert_groups: int that divides `num_experts`. Defaults to 8.
        num_selected_groups: int, the groups that a token may use. Defaults to 3.
        routed_scaling_factor: float above 0, by which the combine weights are
            multiplied. Defaults to 16.
        shared_d_ff: int, the size of the shared expert's inner layer. Defaults to
            `None`, twice `d_ff`.
        train_capacity_factor: see `MoeLayer`. Defaults to `None`, no capacity.
        eval_capacity_factor: see `MoeLayer`. Defaults to `None`, no capacity.
        router_kwargs: dict of further arguments of the router. Defaults to `None`.
        experts_kwargs: dict of further arguments of `FeedForwardExperts`. Defaults to
            `None`.
        **kwargs: further arguments of `MoeLayer`.

    Returns:
        A `MoeLayerWithBackbone`, whose backbone is the shared expert.

    Example:

    ```python
    layer = keras_moe.presets.deepseek_v2(num_experts=16, d_ff=32)
    layer(np.ones((2, 32, 16))).shape  # (2, 32, 16)
    ```

    Reference:
        [DeepSeek-AI, 2024](https://arxiv.org/abs/2405.04434), section 2.2.
    """
    router = _top_k(num_selected_experts, loss_at_k=0.001, normalize=False) | {
        "num_expert_groups": num_expert_groups,
        "num_selected_groups": num_selected_groups,
        "group_score_experts": 1,
        "routed_scaling_factor": routed_scaling_factor,
    }
    name = kwargs.pop("name", None)
    moe = _moe_layer(
        num_experts,
        d_ff,
        MaskedRouter,
        router,
        _SWIGLU,
        router_kwargs,
        experts_kwargs,
        train_capacity_factor=train_capacity_factor,
        eval_capacity_factor=eval_capacity_factor,
        **kwargs,
    )
    return _with_shared_expert(moe, d_ff, shared_d_ff, 2, name)


def glm4_moe(
    num_experts,
    d_ff,
    *,
    num_selected_experts=8,
    routed_scaling_factor=1.0,
    shared_d_ff=None,
    train_capacity_factor=None,
    eval_capacity_factor=None,
    router_kwargs=None,
    experts_kwargs=None,
    **kwargs,
):
    """Creates the layer of GLM-4.5: sigmoid scores, a bias, and a shared expert.

    Args:
        num_experts: int, the number of experts `e`; 128 or 160 in the
            released models.
        d_ff: int, the size `f` of an expert's inner layer.
        num_selected_experts: int, the experts per token. Defaults to 8.
        routed_scaling_factor: float above 0, by which the combine weights are
            multiplied. Defaults to 1.
        shared_d_ff: int, the size of the shared expert's inner layer. Defaults to
            `None`, `d_ff`.
        train_capacity_factor: see `MoeLayer`. Defaults to `None`, no capacity.
        eval_capacity_factor: see `MoeLayer`. Defaults to `None`, no capacity.
        router_kwargs: dict of further arguments of the router. Defaults to `None`.
        experts_kwargs: dict of further arguments of `FeedForwardExperts`. Defaults to
            `None`.
        **kwargs: further arguments of `MoeLayer`.

    Returns:
        A `MoeLayerWithBackbone`, whose backbone is the shared expert.

    Example:

    ```python
    layer = keras_moe.presets.glm4_moe(num_experts=16, d_ff=32)
    layer(np.ones((2, 32, 16))).shape  # (2, 32, 16)
    ```

    Reference:
        [GLM-4.5 Team, 2025](https://arxiv.org/abs/2508.06471), section 2.1.
    """
    router = _balanced_by_bias(
        num_selected_experts, routed_scaling_factor=routed_scaling_factor
    )
    name = kwargs.pop("name", None)
    moe = _moe_layer(
        num_experts,
        d_ff,
        BiasBalancedMaskedRouter,
        router,
        _SWIGLU,
        router_kwargs,
        experts_kwargs,
        train_capacity_factor=train_capacity_factor,
        eval_capacity_factor=eval_capacity_factor,
        **kwargs,
    )
    return _with_shared_expert(moe, d_ff, shared_d_ff, 1, name)


def kimi_k2(
    num_experts,
    d_ff,
    *,
    num_selected_experts=8,
    routed_scaling_factor=2.827,
    shared_d_ff=None,
    train_capacity_factor=None,
    eval_capacity_factor=None,
    router_kwargs=None,
    experts_kwargs=None,
    **kwargs,
):
    """Creates the layer of Kimi K2: that of DeepSeek-V3, without groups of experts.

    Args:
        num_experts: int, the number of experts `e`; 384 in the
            released models.
        d_ff: int, the size `f` of an expert's inner layer.
        num_selected_experts: int, the experts per token. Defaults to 8.
        routed_scaling_factor: float above 0, by which the combine weights are
            multiplied. Defaults to 2.827.
        shared_d_ff: int, the size of the shared expert's inner layer. Defaults to
            `None`, `d_ff`.
        train_capacity_factor: see `MoeLayer`. Defaults to `None`, no capacity.
        eval_capacity_factor: see `MoeLayer`. Defaults to `None`, no capacity.
        router_kwargs: dict of further arguments of the router. Defaults to `None`.
        experts_kwargs: dict of further arguments of `FeedForwardExperts`. Defaults to
            `None`.
        **kwargs: further arguments of `MoeLayer`.

    Returns:
        A `MoeLayerWithBackbone`, whose backbone is the shared expert.

    Example:

    ```python
    layer = keras_moe.presets.kimi_k2(num_experts=16, d_ff=32)
    layer(np.ones((2, 32, 16))).shape  # (2, 32, 16)
    ```

    Reference:
        [Kimi Team, 2025](https://arxiv.org/abs/2507.20534), section 2.3.
    """
    router = _balanced_by_bias(
        num_selected_experts, routed_scaling_factor=routed_scaling_factor
    )
    name = kwargs.pop("name", None)
    moe = _moe_layer(
        num_experts,
        d_ff,
        BiasBalancedMaskedRouter,
        router,
        _SWIGLU,
        router_kwargs,
        experts_kwargs,
        train_capacity_factor=train_capacity_factor,
        eval_capacity_factor=eval_capacity_factor,
        **kwargs,
    )
    return _with_shared_expert(moe, d_ff, shared_d_ff, 1, name)


def minimax_m2(
    num_experts,
    d_ff,
    *,
    num_selected_experts=8,
    train_capacity_factor=None,
    eval_capacity_factor=None,
    router_kwargs=None,
    experts_kwargs=None,
    **kwargs,
):
    """Creates the layer of MiniMax-M2: sigmoid scores and a bias, dropless.

    Args:
        num_experts: int, the number of experts `e`; 256 in the
            released models.
        d_ff: int, the size `f` of an expert's inner layer.
        num_selected_experts: int, the experts per token. Defaults to 8.
        train_capacity_factor: see `MoeLayer`. Defaults to `None`, no capacity.
        eval_capacity_factor: see `MoeLayer`. Defaults to `None`, no capacity.
        router_kwargs: dict of further arguments of the router. Defaults to `None`.
        experts_kwargs: dict of further arguments of `FeedForwardExperts`. Defaults to
            `None`.
        **kwargs: further arguments of `MoeLayer`.

    Returns:
        A `MoeLayer`.

    Example:

    ```python
    layer = keras_moe.presets.minimax_m2(num_experts=16, d_ff=32)
    layer(np.ones((2, 32, 16))).shape  # (2, 32, 16)
    ```

    Reference:
        [MiniMax, 2025](https://huggingface.co/MiniMaxAI/MiniMax-M2).
    """
    router = _balanced_by_bias(num_selected_experts)
    return _moe_layer(
        num_experts,
        d_ff,
        BiasBalancedMaskedRouter,
        router,
        _SWIGLU,
        router_kwargs,
        experts_kwargs,
        train_capacity_factor=train_capacity_factor,
        eval_capacity_factor=eval_capacity_factor,
        **kwargs,
    )


def ernie4_5(
    num_experts,
    d_ff,
    *,
    num_selected_experts=6,
    shared_d_ff=None,
    train_capacity_factor=None,
    eval_capacity_factor=None,
    router_kwargs=None,
    experts_kwargs=None,
    **kwargs,
):
    """Creates the layer of ERNIE 4.5: softmax scores, a bias, and a shared expert.

    Args:
        num_experts: int, the number of experts `e`; 64 in the
            released models.
        d_ff: int, the size `f` of an expert's inner layer.
        num_selected_experts: int, the experts per token. Defaults to 6.
        shared_d_ff: int, the size of the shared expert's inner layer. Defaults to
            `None`, twice `d_ff`.
        train_capacity_factor: see `MoeLayer`. Defaults to `None`, no capacity.
        eval_capacity_factor: see `MoeLayer`. Defaults to `None`, no capacity.
        router_kwargs: dict of further arguments of the router. Defaults to `None`.
        experts_kwargs: dict of further arguments of `FeedForwardExperts`. Defaults to
            `None`.
        **kwargs: further arguments of `MoeLayer`.

    Returns:
        A `MoeLayerWithBackbone`, whose backbone is the shared expert.

    Example:

    ```python
    layer = keras_moe.presets.ernie4_5(num_experts=16, d_ff=32)
    layer(np.ones((2, 32, 16))).shape  # (2, 32, 16)
    ```

    Reference:
        [Baidu, 2025](https://ernie.baidu.com/blog/publication/ERNIE_Technical_Report.pdf),
        section 2.2.
    """
    router = _balanced_by_bias(
        num_selected_experts, mechanism="softmax", normalization_epsilon=1e-12
    )
    name = kwargs.pop("name", None)
    moe = _moe_layer(
        num_experts,
        d_ff,
        BiasBalancedMaskedRouter,
        router,
        _SWIGLU,
        router_kwargs,
        experts_kwargs,
        train_capacity_factor=train_capacity_factor,
        eval_capacity_factor=eval_capacity_factor,
        **kwargs,
    )
    return _with_shared_expert(moe, d_ff, shared_d_ff, 2, name)


def gpt_oss(
    num_experts,
    d_ff,
    *,
    num_selected_experts=4,
    train_capacity_factor=None,
    eval_capacity_factor=None,
    router_kwargs=None,
    experts_kwargs=None,
    **kwargs,
):
    """Creates the layer of GPT-OSS: four experts with biases, and a clamped SwiGLU.

    The combine weights are a softmax over the selected experts.

    Args:
        num_experts: int, the number of experts `e`; 32 or 128 in the
            released models.
        d_ff: int, the size `f` of an expert's inner layer.
        num_selected_experts: int, the experts per token. Defaults to 4.
        train_capacity_factor: see `MoeLayer`. Defaults to `None`, no capacity.
        eval_capacity_factor: see `MoeLayer`. Defaults to `None`, no capacity.
        router_kwargs: dict of further arguments of the router. Defaults to `None`.
        experts_kwargs: dict of further arguments of `FeedForwardExperts`. Defaults to
            `None`.
        **kwargs: further arguments of `MoeLayer`.

    Returns:
        A `MoeLayer`.

    Example:

    ```python
    layer = keras_moe.presets.gpt_oss(num_experts=16, d_ff=32)
    layer(np.ones((2, 32, 16))).shape  # (2, 32, 16)
    ```

    Reference:
        [OpenAI, 2025](https://arxiv.org/abs/2508.10925), section 2.2.
    """
    router = {
        "num_selected_experts": num_selected_experts,
        "normalize_weights": True,
        "use_bias": True,
    }
    return _moe_layer(
        num_experts,
        d_ff,
        MaskedRouter,
        router,
        {"activation": clamped_swiglu, "gated": True},
        router_kwargs,
        experts_kwargs,
        train_capacity_factor=train_capacity_factor,
        eval_capacity_factor=eval_capacity_factor,
        **kwargs,
    )


def llama4(
    num_experts,
    d_ff,
    *,
    num_selected_experts=1,
    shared_d_ff=None,
    train_capacity_factor=None,
    eval_capacity_factor=None,
    router_kwargs=None,
    experts_kwargs=None,
    **kwargs,
):
    """Creates the layer of Llama 4: one expert per token, and a shared expert.

    The combine weight, a sigmoid, multiplies the input of the expert.

    Args:
        num_experts: int, the number of experts `e`; 16 or 128 in the
            released models.
        d_ff: int, the size `f` of an expert's inner layer.
        num_selected_experts: int, the experts per token. Defaults to 1.
        shared_d_ff: int, the size of the shared expert's inner layer. Defaults to
            `None`, `d_ff`.
        train_capacity_factor: see `MoeLayer`. Defaults to `None`, no capacity.
        eval_capacity_factor: see `MoeLayer`. Defaults to `None`, no capacity.
        router_kwargs: dict of further arguments of the router. Defaults to `None`.
        experts_kwargs: dict of further arguments of `FeedForwardExperts`. Defaults to
            `None`.
        **kwargs: further arguments of `MoeLayer`.

    Returns:
        A `MoeLayerWithBackbone`, whose backbone is the shared expert.

    Example:

    ```python
    layer = keras_moe.presets.llama4(num_experts=16, d_ff=32)
    layer(np.ones((2, 32, 16))).shape  # (2, 32, 16)
    ```

    Reference:
        [Meta, 2025](https://ai.meta.com/blog/llama-4-multimodal-intelligence/).
    """
    router = _top_k(num_selected_experts, loss_at_k=0.001, normalize=False) | {
        "mechanism": "sigmoid"
    }
    name = kwargs.pop("name", None)
    moe = _moe_layer(
        num_experts,
        d_ff,
        MaskedRouter,
        router,
        _SWIGLU,
        router_kwargs,
        experts_kwargs,
        train_capacity_factor=train_capacity_factor,
        eval_capacity_factor=eval_capacity_factor,
        weighted_inputs=True,
        **kwargs,
    )
    return _with_shared_expert(moe, d_ff, shared_d_ff, 1, name)


def granite(
    num_experts,
    d_ff,
    *,
    num_selected_experts=8,
    train_capacity_factor=None,
    eval_capacity_factor=None,
    router_kwargs=None,
    experts_kwargs=None,
    **kwargs,
):
    """Creates the layer of Granite 3.0: eight narrow SwiGLU experts per token.

    The combine weights are a softmax over the selected experts.

    Args:
        num_experts: int, the number of experts `e`; 32 or 40 in the
            released models.
        d_ff: int, the size `f` of an expert's inner layer.
        num_selected_experts: int, the experts per token. Defaults to 8.
        train_capacity_factor: see `MoeLayer`. Defaults to `None`, no capacity.
        eval_capacity_factor: see `MoeLayer`. Defaults to `None`, no capacity.
        router_kwargs: dict of further arguments of the router. Defaults to `None`.
        experts_kwargs: dict of further arguments of `FeedForwardExperts`. Defaults to
            `None`.
        **kwargs: further arguments of `MoeLayer`.

    Returns:
        A `MoeLayer`.

    Example:

    ```python
    layer = keras_moe.presets.granite(num_experts=16, d_ff=32)
    layer(np.ones((2, 32, 16))).shape  # (2, 32, 16)
    ```

    Reference:
        [IBM, 2024](https://github.com/ibm-granite/granite-3.0-language-models).
    """
    router = _top_k(num_selected_experts, loss_at_k=0.001)
    return _moe_layer(
        num_experts,
        d_ff,
        MaskedRouter,
        router,
        _SWIGLU,
        router_kwargs,
        experts_kwargs,
        train_capacity_factor=train_capacity_factor,
        eval_capacity_factor=eval_capacity_factor,
        **kwargs,
    )


def expert_choice(
    num_experts,
    d_ff,
    *,
    train_capacity_factor=2.0,
    eval_capacity_factor=2.0,
    router_kwargs=None,
    experts_kwargs=None,
    **kwargs,
):
    """Creates an expert-choice layer: experts select tokens, two per token on average.

    Not for decoders: the routing of a token depends on later tokens.

    Args:
        num_experts: int, the number of experts `e`.
        d_ff: int, the size `f` of an expert's inner layer.
        train_capacity_factor: see `MoeLayer`. Defaults to 2.
        eval_capacity_factor: see `MoeLayer`. Defaults to 2.
        router_kwargs: dict of further arguments of the router. Defaults to `None`.
        experts_kwargs: dict of further arguments of `FeedForwardExperts`. Defaults to
            `None`.
        **kwargs: further arguments of `MoeLayer`.

    Returns:
        A `MoeLayer`.

    Example:

    ```python
    layer = keras_moe.presets.expert_choice(num_experts=8, d_ff=64)
    layer(np.ones((2, 32, 16))).shape  # (2, 32, 16)
    ```

    Reference:
        [Zhou et al., 2022](https://arxiv.org/abs/2202.09368), section 3.
    """
    router = {}
    return _moe_layer(
        num_experts,
        d_ff,
        ExpertsChooseMaskedRouter,
        router,
        {},
        router_kwargs,
        experts_kwargs,
        train_capacity_factor=train_capacity_factor,
        eval_capacity_factor=eval_capacity_factor,
        **kwargs,
    )


def _top_k(k, loss_at_k, normalize=True):
    """Returns the arguments of a router with a softmax over all experts.

    `loss_at_k` is `router_aux_loss_coef` in the config of the released model. It weighs
    a balance loss that is `k` for a balanced load, where ours is 1.
    """
    k = checks.whole_number("num_selected_experts", k)
    return {
        "num_selected_experts": k,
        "normalize_weights": normalize,
        "load_balancing_loss_weight": loss_at_k * k,
    }


def _balanced_by_bias(k, **router):
    """Returns the arguments of a router with sigmoid scores and a bias."""
    return {"num_selected_experts": k, "bias_update_rate": 0.001, **router}


def _with_shared_expert(moe, d_ff, shared_d_ff, times, name, **kwargs):
    """Adds a shared expert, by default so many times as wide as the others."""
    if shared_d_ff is None:
        shared_d_ff = times * checks.whole_number("d_ff", d_ff)
    return MoeLayerWithBackbone(
        moe,
        checks.whole_number("shared_d_ff", shared_d_ff),
        name=name,
        dtype=moe.experts.dtype_policy,
        **_SWIGLU,
        **kwargs,
    )


def _moe_layer(
    num_experts,
    d_ff,
    make_router,
    router,
    experts,
    router_kwargs,
    experts_kwargs,
    **kwargs,
):
    """Creates a layer of a preset's router and experts and the user's arguments."""
    dtype = {"dtype": kwargs.get("dtype")}
    experts = (
        dtype | experts | checks.keyword_arguments("experts_kwargs", experts_kwargs)
    )
    router = dtype | router | checks.keyword_arguments("router_kwargs", router_kwargs)
    return MoeLayer(
        FeedForwardExperts(num_experts, d_ff, **experts),
        make_router(num_experts, **{"use_bias": False} | router),
        **kwargs,
    )
