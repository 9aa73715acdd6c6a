"""Families: the Mixture-of-Experts models of transformers, as one table.

An entry has the settings of the layer and the tensors. It follows the modeling files of
transformers 5.24.
"""

import dataclasses

from keras_moe.convert.formats import (
    ROUTER_BIAS,
    TensorSpec,
)
from keras_moe.convert.layouts import (
    DBRX,
    DEEPSEEK,
    FUSED,
    GPT_OSS,
    NEMOTRON,
    QWEN_SHARED,
    TRANSPOSED,
    W_NAMES,
    granite,
    layouts_of,
    longcat,
    one_by_one,
)
from keras_moe.convert.settings import (
    ACTIVATIONS,
    NUM_EXPERTS,
    NUM_SELECTED,
    Activation,
    Family,
    Key,
    after_dense,
    as_wide,
    balance_loss_weight,
    check_hash,
    check_latent_bias,
    check_nllb,
    clamped_activation,
    deepseek_v2_groups,
    every_nth,
    experts_of,
    grouped_router,
    is_sparse_in_ernie,
    is_sparse_in_jamba,
    is_sparse_in_llama4,
    is_sparse_in_nemotron,
    is_sparse_in_nllb,
    is_sparse_in_switch,
    normalizes_in_dbrx,
    shared_of,
    top_k_router,
    with_identity_experts,
    with_losses,
)
from keras_moe.routers import (
    BiasBalancedMaskedRouter,
    MaskedRouter,
    SparseMixerRouter,
)


# An expert has a fixed number of slots: the factor is too small to matter.
def _fixed_capacity(default=64):
    return Key("expert_capacity", default=default)


NARROW = "moe_intermediate_size"


def _like_deepseek(k, layouts=DEEPSEEK, *, first, shared=1, **router):
    return Family(
        layouts,
        router=grouped_router(k, **router),
        experts=experts_of(NARROW),
        shared=shared_of(as_wide(shared)),
        router_class=BiasBalancedMaskedRouter,
        is_sparse=after_dense(first),
    )


def _like_qwen3(k, normalize, layouts=None, is_sparse=every_nth, d_ff=NARROW):
    return Family(
        layouts or layouts_of(),
        router=with_losses(**top_k_router(k, normalize)),
        experts=experts_of(d_ff),
        is_sparse=is_sparse,
    )


def _with_gated_shared(family, default):
    return dataclasses.replace(
        family,
        layouts=QWEN_SHARED,
        shared=shared_of(
            Key("shared_expert_intermediate_size", default=default), backbone_gate=True
        ),
    )


def _like_mixtral(k, **changes):
    family = Family(
        layouts_of(experts=W_NAMES),
        place="layers.{layer}.block_sparse_moe.",
        router=with_losses(**top_k_router(k, True)),
        experts=experts_of("intermediate_size"),
    )
    return dataclasses.replace(family, **changes)


def _everywhere(config, layer):
    return True


_NORMALIZED = Key("norm_topk_prob", default=True)
_NOT_NORMALIZED = Key("norm_topk_prob", default=False)

FAMILIES = {
    "mixtral": _like_mixtral(2),
    "minimax": _like_mixtral(2),
    "qwen2_moe": _with_gated_shared(_like_qwen3(4, _NOT_NORMALIZED), 5632),
    "qwen3_moe": _like_qwen3(8, _NOT_NORMALIZED),
    "qwen3_next": _with_gated_shared(_like_qwen3(10, _NORMALIZED), 512),
    "qwen3_5_moe_text": _with_gated_shared(
        _like_qwen3(8, True, None, _everywhere), 512
    ),
    # Files have the experts in one tensor, transposed or not.
    "qwen3_vl_moe_text": _like_qwen3(
        4, True, [*layouts_of(experts=TRANSPOSED), *layouts_of(experts=FUSED)[:1]]
    ),
    "olmoe": _like_qwen3(8, _NOT_NORMALIZED, None, _everywhere, "intermediate_size"),
    "flex_olmo": _like_qwen3(
        5, _NOT_NORMALIZED, None, _everywhere, "intermediate_size"
    ),
    "mellum": _like_qwen3(8, _NORMALIZED, None, after_dense(0)),
    "deepseek_v2": Family(
        layouts_of(shared="shared_experts"),
        router=with_losses(
            **top_k_router(
                Key(*NUM_SELECTED),
                False,
                routed_scaling_factor=Key("routed_scaling_factor", default=1.0),
                num_expert_groups=lambda c: deepseek_v2_groups(c, "n_group"),
                num_selected_groups=lambda c: deepseek_v2_groups(c, "topk_group"),
                group_score_experts=1,
            )
        ),
        experts=experts_of(NARROW),
        shared=shared_of(as_wide(2)),
        is_sparse=after_dense(0),
    ),
    "deepseek_v3": _like_deepseek(8, first=3, groups=8, selected=4, scale=2.5),
    "glm4_moe": _like_deepseek(8, first=1, scale=1.0),
    "glm4_moe_lite": _like_deepseek(4, first=1, scale=1.8),
    "glm_moe_dsa": _like_deepseek(8, first=3, scale=2.5),
    "dots1": _like_deepseek(
        Key(*NUM_SELECTED), first=0, shared=0, scale=1.0, normalize=False
    ),
    "solar_open": _like_deepseek(8, first=0, scale=1.0),
    "exaone_moe": _like_deepseek(
        8,
        layouts_of(
            bias=("e_score_correction_bias", "gate.e_score_correction_bias"),
            shared="shared_experts",
        ),
        first=1,
        scale=2.5,
    ),
    "bailing_hybrid": _like_deepseek(
        8,
        layouts_of(
            bias=("gate.expert_bias", "gate.e_score_correction_bias"),
            shared="shared_experts",
        ),
        first=2,
        groups=8,
        selected=4,
        scale=2.5,
    ),
    "kimi_linear": dataclasses.replace(
        _like_deepseek(
            8,
            layouts_of(
                bias="gate.e_score_correction_bias",
                shared="shared_experts",
                experts=W_NAMES,
            ),
            first=1,
            scale=2.446,
        ),
        place="layers.{layer}.block_sparse_moe.",
    ),
    "mimo_v2_flash": dataclasses.replace(
        _like_deepseek(8, first=1, scale=1.0), shared=None
    ),
    "mistral4": dataclasses.replace(
        _like_deepseek(
            4,
            layouts_of(shared="shared_experts", experts=FUSED),
            first=0,
            scale=1.0,
            mechanism="softmax",
        ),
        router_class=MaskedRouter,
    ),
    "deepseek_v4": Family(
        layouts_of(
            bias=("gate.bias", "gate.e_score_correction_bias"),
            shared=(("shared_experts", W_NAMES), "shared_experts"),
            experts=W_NAMES,
        ),
        place="layers.{layer}.ffn.",
        router=top_k_router(
            6,
            True,
            Key(
                "scoring_func",
                default="sqrtsoftplus",
                change=lambda name: {"sqrtsoftplus": "sqrt_softplus"}.get(name, name),
            ),
            normalization_epsilon=1e-20,
            routed_scaling_factor=Key("routed_scaling_factor", default=1.5),
        ),
        experts=experts_of(NARROW, clamped_activation(1.0, 0.0, 10.0)),
        shared=shared_of(Key(NARROW), clamped_activation(1.0, 0.0, 10.0)),
        router_class=BiasBalancedMaskedRouter,
        check=check_hash,
    ),
    "ernie4_5_moe": Family(
        layouts_of(
            bias=(
                "moe_statics.e_score_correction_bias",
                "gate.moe_statics.e_score_correction_bias",
            ),
            inserted=(0,),
            shared="shared_experts",
        ),
        router=top_k_router(
            Key("num_experts_per_tok", "moe_k", default=6),
            True,
            num_experts=Key("num_experts", "moe_num_experts", default=64),
            normalization_epsilon=Key("moe_norm_min", default=1e-12),
        ),
        experts=experts_of(
            NARROW, num_experts=Key("num_experts", "moe_num_experts", default=64)
        ),
        shared=shared_of(as_wide(2), use_bias=Key("use_bias", default=False)),
        router_class=BiasBalancedMaskedRouter,
        is_sparse=is_sparse_in_ernie,
    ),
    "minimax_m2": _like_mixtral(
        8,
        layouts=layouts_of(bias="e_score_correction_bias", experts=W_NAMES),
        router=top_k_router(8, True, "sigmoid"),
        router_class=BiasBalancedMaskedRouter,
    ),
    "lfm2_moe": Family(
        layouts_of(bias="expert_bias", experts=W_NAMES),
        place="layers.{layer}.feed_forward.",
        router=top_k_router(
            4,
            _NORMALIZED,
            "sigmoid",
            normalization_epsilon=1e-6,
            routed_scaling_factor=Key("routed_scaling_factor", default=1.0),
        ),
        experts=experts_of(NARROW, "silu"),
        router_class=lambda config: (
            BiasBalancedMaskedRouter
            if config.read("use_expert_bias", default=True)
            else MaskedRouter
        ),
        is_sparse=after_dense(2),
    ),
    "afmoe": Family(
        layouts_of(
            gate="router.gate.weight", bias="expert_bias", shared="shared_experts"
        ),
        router=top_k_router(
            6,
            True,
            "sigmoid",
            normalization_epsilon=1e-20,
            routed_scaling_factor=Key("route_scale", default=1.0),
        ),
        experts=experts_of(NARROW),
        shared=shared_of(as_wide(2)),
        router_class=BiasBalancedMaskedRouter,
        is_sparse=after_dense(1),
    ),
    "hy_v3": Family(
        layouts_of(
            gate=("router.gate.weight", "gate.weight"),
            bias=("expert_bias", "e_score_correction_bias"),
            shared=("shared_mlp", "shared_experts"),
        ),
        router=top_k_router(
            8,
            True,
            "sigmoid",
            normalization_epsilon=1e-20,
            routed_scaling_factor=Key("router_scaling_factor", default=2.826),
        ),
        experts=experts_of(NARROW),
        shared=shared_of(as_wide(1)),
        router_class=BiasBalancedMaskedRouter,
        is_sparse=after_dense(1),
    ),
    "hunyuan_v1_moe": Family(
        layouts_of(gate="gate.wg.weight", shared="shared_mlp"),
        router=top_k_router(Key("moe_topk", "num_experts_per_tok", default=1), True),
        experts=experts_of("intermediate_size"),
        shared=shared_of(Key("intermediate_size")),
    ),
    "cohere2_moe": Family(
        layouts_of(shared="shared_experts"),
        router=top_k_router(
            2,
            lambda c: (
                c.read("expert_selection_fn", default="softmax") == "softmax"
                or c.read("norm_topk_prob", default=True)
            ),
            Key("expert_selection_fn", default="softmax"),
        ),
        experts=experts_of("intermediate_size"),
        shared=shared_of(
            as_wide(0, "intermediate_size"),
            average=Key(
                "shared_expert_combination_strategy",
                default="average",
                change=lambda name: name == "average",
            ),
        ),
        is_sparse=after_dense(0),
    ),
    "granitemoe": _like_mixtral(2, layouts=granite()),
    "granitemoeshared": _like_mixtral(
        2,
        layouts=granite("block_sparse_moe."),
        place="layers.{layer}.",
        shared=shared_of(Key("shared_intermediate_size", default=0)),
        parts=("block_sparse_moe.", "shared_mlp."),
    ),
    "jamba": Family(
        layouts_of(gate="router.weight"),
        place="layers.{layer}.feed_forward.",
        router=with_losses(**top_k_router(2, False)),
        experts=experts_of("intermediate_size"),
        is_sparse=is_sparse_in_jamba,
    ),
    "dbrx": Family(
        layouts_of(gate="router.layer.weight", experts=DBRX, modules=DBRX),
        place="blocks.{layer}.ffn.",
        router=with_losses(
            "moe_jitter_eps",
            **top_k_router(
                Key("moe_top_k", default=1),
                Key(
                    "moe_normalize_expert_weights",
                    default=1.0,
                    change=normalizes_in_dbrx,
                ),
                num_experts=Key("moe_num_experts", default=4),
            ),
        ),
        experts=experts_of(
            "ffn_hidden_size",
            Key(
                "ffn_act_fn",
                default={},
                change=lambda function: ACTIVATIONS[
                    (function or {}).get("name", "silu")
                ],
            ),
            num_experts=Key("moe_num_experts", default=4),
        ),
    ),
    "phimoe": _like_mixtral(
        2,
        layouts=layouts_of(gate=("gate.weight", "router.weight"), experts=W_NAMES),
        router={
            "num_experts": Key(*NUM_EXPERTS),
            "num_selected_experts": Key(*NUM_SELECTED, default=2),
            "sparsity_threshold": Key(
                "router_jitter_noise", default=0.01, change=lambda x: 2 * x
            ),
            "jitter_noise": Key("input_jitter_noise", default=0.0),
            "use_bias": False,
            "load_balancing_loss_weight": balance_loss_weight(
                Key(*NUM_SELECTED, default=2)
            ),
        },
        router_class=SparseMixerRouter,
    ),
    "nemotron_h": Family(
        NEMOTRON,
        place="layers.{layer}.mixer.",
        router=grouped_router(2, scale=1.0),
        experts=experts_of(NARROW, Activation("mlp_hidden_act", "relu2"), gated=False),
        shared=shared_of(
            Key("moe_shared_expert_intermediate_size", default=7688),
            Activation("mlp_hidden_act", "relu2"),
            gated=False,
            use_bias=Key("mlp_bias", default=False),
        ),
        layer={"latent_dim": Key("moe_latent_size", default=None)},
        router_class=BiasBalancedMaskedRouter,
        is_sparse=is_sparse_in_nemotron,
        check=check_latent_bias,
    ),
    "longcat_flash": Family(
        longcat,
        router=top_k_router(
            12,
            False,
            num_experts=with_identity_experts,
            routed_scaling_factor=Key("routed_scaling_factor", default=6.0),
        ),
        experts=experts_of(
            "expert_ffn_hidden_size",
            num_experts=with_identity_experts,
            num_identity_experts=Key(
                "zero_expert_num", default=256, change=lambda n: n or 0
            ),
        ),
        router_class=BiasBalancedMaskedRouter,
    ),
    "gpt_oss": Family(
        layouts_of(
            TensorSpec("router.bias", (ROUTER_BIAS,)),
            gate="router.weight",
            experts=GPT_OSS,
            modules=GPT_OSS,
        ),
        router=with_losses(**top_k_router(4, True) | {"use_bias": True}),
        experts=experts_of(
            "intermediate_size", clamped_activation(1.702, 1.0, 7.0), use_bias=True
        ),
    ),
    "llama4_text": Family(
        layouts_of(
            gate="router.weight",
            shared="shared_expert",
            experts=TRANSPOSED,
            modules=TRANSPOSED,
        ),
        place="layers.{layer}.feed_forward.",
        router=with_losses(**top_k_router(1, False, "sigmoid")),
        experts=experts_of("intermediate_size"),
        shared=shared_of(Key("intermediate_size")),
        layer={"weighted_inputs": True},
        is_sparse=is_sparse_in_llama4,
    ),
    "gemma4_text": Family(
        layouts_of(
            TensorSpec("router.scale", ("router/router_weights/input_scale",)),
            TensorSpec("router.per_expert_scale", ("router/expert_scale",)),
            gate="router.proj.weight",
            experts=FUSED,
        ),
        place="layers.{layer}.",
        router=top_k_router(
            Key("top_k_experts", "num_experts_per_tok"),
            True,
            input_norm_epsilon=Key("rms_norm_eps", default=1e-6),
            use_expert_scale=True,
        ),
        experts=experts_of(
            NARROW, Activation("hidden_activation", "gelu_pytorch_tanh")
        ),
        is_sparse=lambda config, layer: config.read("enable_moe_block", default=False),
        parts=("router.", "experts."),
    ),
    "switch_transformers": Family(
        one_by_one("wi", "wo"),
        place="encoder.block.{layer}.layer.1.mlp.",
        router=with_losses(**top_k_router(lambda c: 1, False))
        | {
            "use_bias": Key("router_bias", default=False),
            "jitter_noise": Key("router_jitter_noise", default=0.01),
        },
        experts=experts_of("d_ff", Activation("dense_act_fn", "relu"), gated=False),
        layer={
            "train_capacity_factor": 1e-6,
            "eval_capacity_factor": 1e-6,
            "min_expert_capacity": _fixed_capacity(),
        },
        is_sparse=is_sparse_in_switch,
    ),
    # In transformers 5.24 only two experts of this block are used. This is the layer
    # of version 4. Token dropout is a factor, which it is in evaluation.
    "nllb-moe": Family(
        one_by_one("fc1", "fc2"),
        place="encoder.layers.{layer}.ffn.",
        router=with_losses(**top_k_router(lambda c: 2, True))
        | {
            "use_bias": Key("router_bias", default=False),
            "routed_scaling_factor": Key(
                "moe_token_dropout", default=0.2, change=lambda rate: 1 - rate
            ),
        },
        experts=experts_of(
            "encoder_ffn_dim",
            Activation("activation_function", "relu"),
            gated=False,
            use_bias=True,
        ),
        layer={
            "train_capacity_factor": 1e-6,
            "min_expert_capacity": _fixed_capacity(),
            "examples_per_group": None,
        },
        is_sparse=is_sparse_in_nllb,
        check=check_nllb,
    ),
}
# Other names of the same families.
ALIASES = {
    "switch": "switch_transformers",
    "nllb_moe": "nllb-moe",
    "qwen3_5_moe": "qwen3_5_moe_text",
    "qwen3_vl_moe": "qwen3_vl_moe_text",
    "llama4": "llama4_text",
    "gemma4": "gemma4_text",
    "kimi_k2": "deepseek_v3",
}
