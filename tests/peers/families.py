"""Tiny models of transformers, one for each family of Mixture-of-Experts models."""

import operator
from typing import NamedTuple

import torch
import transformers


class Family(NamedTuple):
    """The classes, the options and the place of the MoE block of a tiny model."""

    config_class: str
    model_class: str
    kwargs: dict
    block: str
    layer_index: int = 1


SIZES = {
    "vocab_size": 20,
    "hidden_size": 8,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 4,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
# The width of the experts has another name where the model may have dense layers, of
# another width.
ONLY_EXPERTS = {"num_experts_per_tok": 2, "intermediate_size": 12}
BESIDE_DENSE = {
    "num_experts_per_tok": 2,
    "intermediate_size": 10,
    "moe_intermediate_size": 12,
}
GROUPS = {"n_group": 2, "topk_group": 1, "routed_scaling_factor": 1.7}
# The options of DeepSeek-V3's layer, which many families have.
GROUPED = {**BESIDE_DENSE, **GROUPS, "n_routed_experts": 6, "n_shared_experts": 2}
LATENT_ATTENTION = {
    "q_lora_rank": 4,
    "kv_lora_rank": 4,
    "qk_nope_head_dim": 4,
    "qk_rope_head_dim": 4,
    "v_head_dim": 4,
}
LINEAR_ATTENTION = {
    "linear_key_head_dim": 4,
    "linear_value_head_dim": 4,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 2,
}
SECOND_IS_SPARSE = {"mlp_layer_types": ["dense", "sparse"]}


def _decoder(name, block, *options, config_class=None, **kwargs):
    """Returns the family of a language model with the layers `model.layers`."""
    for option in reversed(options):
        kwargs = {**option, **kwargs}
    return Family(
        config_class or f"{name}Config",
        f"{name}ForCausalLM",
        {**SIZES, **kwargs},
        f"model.layers.1.{block}".rstrip("."),
    )


def _with_images(name, block, text, vision, layers="model.language_model.layers"):
    """Returns the family of a model whose language model is one of its parts."""
    return Family(
        f"{name}Config",
        f"{name}ForConditionalGeneration",
        {"text_config": text, "vision_config": vision},
        f"{layers}.1.{block}".rstrip("."),
    )


FAMILIES = {
    "mixtral": _decoder("Mixtral", "mlp", ONLY_EXPERTS, num_local_experts=4),
    "minimax": _decoder("MiniMax", "mlp", ONLY_EXPERTS, num_local_experts=4),
    "minimax_m2": _decoder("MiniMaxM2", "mlp", ONLY_EXPERTS, num_local_experts=4),
    "qwen2_moe": _decoder(
        "Qwen2Moe",
        "mlp",
        BESIDE_DENSE,
        num_experts=4,
        shared_expert_intermediate_size=10,
    ),
    "qwen3_moe": _decoder(
        "Qwen3Moe", "mlp", BESIDE_DENSE, num_experts=4, norm_topk_prob=True
    ),
    "qwen3_next": _decoder(
        "Qwen3Next",
        "mlp",
        BESIDE_DENSE,
        LINEAR_ATTENTION,
        num_experts=4,
        shared_expert_intermediate_size=10,
    ),
    "olmoe": _decoder("Olmoe", "mlp", ONLY_EXPERTS, num_experts=4),
    "flex_olmo": _decoder("FlexOlmo", "mlp", ONLY_EXPERTS, num_experts=4),
    "mellum": _decoder("Mellum", "mlp", BESIDE_DENSE, num_experts=4),
    "deepseek_v2": _decoder(
        "DeepseekV2",
        "mlp",
        GROUPED,
        LATENT_ATTENTION,
        first_k_dense_replace=1,
        topk_method="group_limited_greedy",
    ),
    "deepseek_v3": _decoder(
        "DeepseekV3", "mlp", GROUPED, LATENT_ATTENTION, first_k_dense_replace=1
    ),
    "deepseek_v4": _decoder(
        "DeepseekV4",
        "mlp",
        num_experts_per_tok=2,
        moe_intermediate_size=12,
        n_routed_experts=4,
        routed_scaling_factor=1.7,
        swiglu_limit=0.9,
        mlp_layer_types=["hash_moe", "moe"],
        layer_types=["sliding_attention"] * 2,
        num_key_value_heads=1,
        q_lora_rank=4,
        o_lora_rank=4,
        o_groups=2,
        hc_mult=2,
        partial_rotary_factor=0.5,
    ),
    "glm4_moe": _decoder("Glm4Moe", "mlp", GROUPED, first_k_dense_replace=1),
    "glm4_moe_lite": _decoder(
        "Glm4MoeLite", "mlp", GROUPED, LATENT_ATTENTION, SECOND_IS_SPARSE
    ),
    "glm_moe_dsa": _decoder(
        "GlmMoeDsa",
        "mlp",
        GROUPED,
        LATENT_ATTENTION,
        first_k_dense_replace=1,
        index_topk=2,
        index_head_dim=4,
        index_n_heads=2,
    ),
    "dots1": _decoder(
        "Dots1", "mlp", GROUPED, first_k_dense_replace=1, norm_topk_prob=True
    ),
    "solar_open": _decoder("SolarOpen", "mlp", GROUPED),
    "kimi_linear": _decoder(
        "KimiLinear",
        "mlp",
        BESIDE_DENSE,
        GROUPS,
        LATENT_ATTENTION,
        SECOND_IS_SPARSE,
        num_local_experts=6,
        n_shared_experts=2,
        linear_head_dim=4,
        linear_num_heads=2,
    ),
    "exaone_moe": _decoder(
        "ExaoneMoe",
        "mlp",
        BESIDE_DENSE,
        GROUPS,
        num_experts=6,
        num_shared_experts=2,
    ),
    "mimo_v2_flash": _decoder(
        "MiMoV2Flash",
        "mlp",
        BESIDE_DENSE,
        GROUPS,
        SECOND_IS_SPARSE,
        n_routed_experts=6,
        v_head_dim=4,
    ),
    "bailing_hybrid": _decoder(
        "BailingHybrid",
        "mlp",
        BESIDE_DENSE,
        GROUPS,
        LATENT_ATTENTION,
        first_k_dense_replace=1,
        num_local_experts=6,
        n_shared_experts=2,
    ),
    "mistral4": _decoder("Mistral4", "mlp", GROUPED, LATENT_ATTENTION),
    "nemotron_h": _decoder(
        "NemotronH",
        "mixer",
        GROUPED,
        layers_block_type=["full_attention", "moe"],
        moe_shared_expert_intermediate_size=10,
    ),
    "hy_v3": _decoder(
        "HYV3",
        "mlp",
        BESIDE_DENSE,
        SECOND_IS_SPARSE,
        num_experts=4,
        num_shared_experts=2,
        router_scaling_factor=1.7,
    ),
    "hunyuan_v1_moe": _decoder("HunYuanMoEV1", "mlp", ONLY_EXPERTS, num_experts=4),
    "ernie4_5_moe": _decoder(
        "Ernie4_5_Moe",
        "mlp",
        BESIDE_DENSE,
        moe_num_experts=4,
        moe_num_shared_experts=2,
    ),
    "lfm2_moe": _decoder(
        "Lfm2Moe",
        "feed_forward",
        BESIDE_DENSE,
        num_experts=4,
        num_dense_layers=1,
        routed_scaling_factor=1.7,
        layer_types=["conv", "full_attention"],
    ),
    "afmoe": _decoder(
        "Afmoe",
        "mlp",
        BESIDE_DENSE,
        num_experts=4,
        num_shared_experts=2,
        route_scale=1.7,
    ),
    "cohere2_moe": _decoder(
        "Cohere2Moe",
        "mlp",
        ONLY_EXPERTS,
        num_experts=4,
        num_shared_experts=2,
        expert_selection_fn="sigmoid",
    ),
    "granitemoe": _decoder(
        "GraniteMoe", "block_sparse_moe", ONLY_EXPERTS, num_local_experts=4
    ),
    "granitemoeshared": _decoder(
        "GraniteMoeShared",
        "",
        ONLY_EXPERTS,
        num_local_experts=4,
        shared_intermediate_size=10,
    ),
    "jamba": _decoder(
        "Jamba",
        "feed_forward",
        ONLY_EXPERTS,
        num_experts=4,
        attn_layer_period=2,
        attn_layer_offset=1,
        mamba_d_state=2,
        mamba_expand=1,
    ),
    "phimoe": _decoder(
        "Phimoe", "mlp", ONLY_EXPERTS, num_local_experts=4, router_jitter_noise=0.2
    ),
    "longcat_flash": _decoder(
        "LongcatFlash",
        "mlp",
        LATENT_ATTENTION,
        num_hidden_layers=4,  # two of attention in each decoder layer
        ffn_hidden_size=10,
        expert_ffn_hidden_size=12,
        n_routed_experts=4,
        zero_expert_num=2,
        moe_topk=2,
        routed_scaling_factor=1.7,
    ),
    "gpt_oss": _decoder(
        "GptOss", "mlp", ONLY_EXPERTS, num_local_experts=4, swiglu_limit=0.9
    ),
    "dbrx": Family(
        "DbrxConfig",
        "DbrxForCausalLM",
        {
            "vocab_size": 20,
            "d_model": 8,
            "n_heads": 2,
            "n_layers": 2,
            "attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0},
            "ffn_config": {
                "hidden_size": 8,
                "ffn_hidden_size": 12,
                "moe_num_experts": 4,
                "moe_top_k": 2,
            },
        },
        "transformer.blocks.1.ffn",
    ),
    "switch_transformers": Family(
        "SwitchTransformersConfig",
        "SwitchTransformersForConditionalGeneration",
        {
            "vocab_size": 20,
            "d_model": 8,
            "d_kv": 4,
            "d_ff": 12,
            "num_heads": 2,
            "num_layers": 2,
            "num_sparse_encoder_layers": 1,
            "num_decoder_layers": 2,
            "num_sparse_decoder_layers": 1,
            "num_experts": 4,
        },
        "encoder.block.1.layer.1.mlp",
    ),
    "nllb_moe": Family(
        "NllbMoeConfig",
        "NllbMoeForConditionalGeneration",
        {
            "vocab_size": 20,
            "max_position_embeddings": 32,
            "d_model": 8,
            "encoder_layers": 2,
            "encoder_attention_heads": 2,
            "encoder_ffn_dim": 12,
            "encoder_sparse_step": 2,
            "decoder_layers": 2,
            "decoder_attention_heads": 2,
            "decoder_ffn_dim": 12,
            "decoder_sparse_step": 2,
            "num_experts": 4,
        },
        "model.encoder.layers.1.ffn",
    ),
}
# Of these the language model is also part of a model with images, and its options are
# the `text_config` of the whole.
LLAMA4 = {
    **SIZES,
    **ONLY_EXPERTS,
    "intermediate_size_mlp": 10,
    "num_local_experts": 4,
}
GEMMA4 = {
    **SIZES,
    "intermediate_size": 10,
    "moe_intermediate_size": 12,
    "enable_moe_block": True,
    "num_experts": 4,
    "top_k_experts": 2,
    "global_head_dim": 4,
    "hidden_size_per_layer_input": 0,
    "vocab_size_per_layer_input": 20,
}
QWEN3_5 = {
    **SIZES,
    **LINEAR_ATTENTION,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 12,
    "shared_expert_intermediate_size": 10,
}
QWEN3_VL = {**SIZES, **BESIDE_DENSE, "num_experts": 4}
QWEN_VISION = {
    "depth": 1,
    "hidden_size": 8,
    "intermediate_size": 8,
    "num_heads": 2,
    "patch_size": 2,
    "out_hidden_size": 8,
    "num_position_embeddings": 4,
}
GEMMA4_VISION = {
    "hidden_size": 8,
    "intermediate_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 4,
    "patch_size": 2,
    "position_embedding_size": 4,
}
LLAMA4_VISION = {
    "hidden_size": 8,
    "intermediate_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 4,
    "patch_size": 2,
    "vision_output_dim": 8,
    "projector_input_dim": 8,
    "projector_output_dim": 8,
}
FAMILIES.update(
    {
        "llama4_text": _decoder(
            "Llama4", "feed_forward", LLAMA4, config_class="Llama4TextConfig"
        ),
        "llama4": _with_images(
            "Llama4",
            "feed_forward",
            LLAMA4,
            LLAMA4_VISION,
            layers="language_model.model.layers",
        ),
        "gemma4_text": _decoder("Gemma4", "", GEMMA4, config_class="Gemma4TextConfig"),
        "gemma4": _with_images("Gemma4", "", GEMMA4, GEMMA4_VISION),
        "qwen3_5_moe_text": _decoder(
            "Qwen3_5Moe", "mlp", QWEN3_5, config_class="Qwen3_5MoeTextConfig"
        ),
        "qwen3_5_moe": _with_images("Qwen3_5Moe", "mlp", QWEN3_5, QWEN_VISION),
        "qwen3_vl_moe": _with_images(
            "Qwen3VLMoe",
            "mlp",
            QWEN3_VL,
            {**QWEN_VISION, "deepstack_visual_indexes": []},
        ),
    }
)


def make(model_type, **changes):
    """Returns `(config, model, block)`, with random weights in the block.

    Args:
        model_type: str, a key of `FAMILIES`.
        **changes: further options of the config.
    """
    family = FAMILIES[model_type]
    config_class = getattr(transformers, family.config_class)
    config = config_class(**{**family.kwargs, **changes})
    model = getattr(transformers, family.model_class)(config).eval()
    block = operator.attrgetter(family.block)(model)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, tensor in block.state_dict().items():
            if not tensor.is_floating_point():
                continue
            is_balance = name.endswith(("correction_bias", "expert_bias"))
            std = 0.1 if is_balance else tensor.shape[-1] ** -0.5
            tensor.normal_(std=std, generator=generator)
    return config, model, block


def forward(block, x, model_type):
    """Returns the output of the MoE part of a block in evaluation, of the shape of `x`.

    Args:
        block: the block of `make`.
        x: a tensor `[b, t, h]`; for Gemma 4 a pair, what the experts and what the
            router see.
        model_type: str, a key of `FAMILIES`.
    """
    if model_type == "granitemoeshared":
        return block.block_sparse_moe(x) + block.shared_mlp(x)
    if model_type.startswith("gemma4"):
        inputs, router_inputs = (part.flatten(0, 1) for part in x)
        _, weights, indices = block.router(router_inputs)
        return block.experts(inputs, indices, weights).view(x[0].shape)
    if model_type == "nllb_moe":
        # `block.experts` of transformers 5 takes the one-hot mask of the selected
        # experts for their numbers, so only experts 0 and 1 run there.
        _, weights, _ = block.router(x.flatten(0, 1))
        outputs = sum(
            weights[:, e].view(*x.shape[:2], 1) * block.experts[f"expert_{e}"](x)
            for e in range(block.num_experts)
        )
        return outputs * (1 - block.experts.moe_token_dropout)
    output = block(x)
    return (output[0] if isinstance(output, tuple) else output).view(x.shape)
