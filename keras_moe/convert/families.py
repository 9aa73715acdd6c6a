"""Families: the Mixture-of-Experts models of transformers, as one table.

An entry has the settings of the layer as functions of a model's config, or as
constants, and the tensors of its modules and files. It follows the modeling files of
transformers 5.24.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

from keras_moe.activations import ClampedSwiGLU, gelu_tanh, squared_relu
from keras_moe.convert.formats import (
    EXPERT,
    EXPERT_BIAS,
    GATE,
    GATE_BIAS,
    INNER,
    INNER_BIAS,
    OUTPUT,
    OUTPUT_BIAS,
    ROUTER,
    ROUTER_BIAS,
    SHARED_GATE,
    SHARED_INNER,
    SHARED_OUTPUT,
    TensorSpec,
    linear,
)
from keras_moe.routers import (
    BiasBalancedMaskedRouter,
    MaskedRouter,
    SparseMixerRouter,
)

# transformers' names of activations.
ACTIVATIONS = {
    **{name: name for name in ("silu", "gelu", "relu", "relu6", "sigmoid", "tanh")},
    **dict.fromkeys(("gelu_pytorch_tanh", "gelu_new"), gelu_tanh),
    "swish": "silu",
    "relu2": squared_relu,
    "mish": "mish",
    "linear": "linear",
}
NUM_EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts")
NUM_SELECTED = ("num_experts_per_tok", "num_experts_per_token", "moe_topk")
NUM_SHARED = ("n_shared_experts", "num_shared_experts", "moe_num_shared_experts")
NORMALIZE = ("norm_topk_prob", "moe_renormalize")
REQUIRED = object()


class Key:
    """A setting that is read from a config.

    Args:
        *names: strings, the names that the setting may have.
        default: the value of a config without any of them. By default it is required.
        change: function of the value. Defaults to `None`.
    """

    def __init__(self, *names, default=REQUIRED, change=None):
        self.names, self.default, self.change = names, default, change

    def __call__(self, config):
        value = config.read(*self.names, default=self.default)
        if isinstance(value, list):  # One for each layer.
            value = value[config.layer_index]
        return self.change(value) if self.change else value


class Activation(Key):
    """An activation, under its name in transformers."""

    def __init__(self, name="hidden_act", default="silu"):
        super().__init__(name, default=default, change=self._to_ours)

    @property
    def usual(self):
        return ACTIVATIONS[self.default]

    def _to_ours(self, name):
        if name not in ACTIVATIONS:
            raise ValueError(
                f"The activation must be one of {sorted(ACTIVATIONS)}. "
                f"Received: {self.names[0]}={name!r}."
            )
        return ACTIVATIONS[name]


@dataclasses.dataclass(frozen=True)
class Family:
    """A family of models.

    Settings are constants, or functions of a `Config`.

    Attributes:
        layouts: list of lists of `TensorSpec`s, that of files first, or a function of
            our weights that returns it.
        place: string, where the block is, with `{layer}` for the index of the layer.
        router: dict of the router's arguments.
        experts: dict of the experts' arguments.
        shared: dict of the arguments of `MoeLayerWithBackbone`, or `None`. Without a
            `backbone_d_ff` above 0, the layer has no shared expert.
        layer: dict of the arguments of `MoeLayer`.
        router_class: class, or a function of a `Config` that returns it.
        is_sparse: function of a `Config` and the index of a layer that says whether
            the layer has experts.
        check: function of a `Config` and the index of a layer that raises a ValueError
            for what cannot be converted.
        parts: tuple of the beginnings of the tensors' names, where the block is not
            alone in its place.
    """

    layouts: Any
    place: str = "layers.{layer}.mlp."
    router: dict = dataclasses.field(default_factory=dict)
    experts: dict = dataclasses.field(default_factory=dict)
    shared: dict | None = None
    layer: dict = dataclasses.field(default_factory=dict)
    router_class: Callable = MaskedRouter
    is_sparse: Callable = lambda config, layer: True
    check: Callable = lambda config, layer: None
    parts: tuple = ("",)


# Which layers have experts.


def _after(default):
    """The layers after the first dense ones."""

    def is_sparse(config, layer):
        kinds = config.read("mlp_layer_types", default=None)
        if kinds is not None:
            return kinds[layer] != "dense"
        names = ("first_k_dense_replace", "num_dense_layers")
        return layer >= config.read(*names, default=default)

    return is_sparse


def _every_nth(config, layer):
    step = config.read("decoder_sparse_step", default=1)
    dense = config.read("mlp_only_layers", default=None) or ()
    return layer not in dense and (layer + 1) % step == 0


def _of_ernie(config, layer):
    end = config.read("moe_layer_end_index", default=-1)
    step = config.read("moe_layer_interval", default=1)
    start = config.read("moe_layer_start_index", default=1)
    is_before_end = end == -1 or layer <= end
    return (layer + 1) % step == 0 and layer >= start and is_before_end


def _of_llama4(config, layer):
    step = config.read("interleave_moe_layer_step", default=1)
    chosen = config.read("moe_layers", default=None)
    return (layer + 1) % step == 0 if chosen is None else layer in chosen


def _of_jamba(config, layer):
    period = config.read("expert_layer_period", default=2)
    return layer % period == config.read("expert_layer_offset", default=1)


def _of_nemotron(config, layer):
    names = ("layers_block_type", "layer_types", "hybrid_override_pattern")
    return config.read(*names)[layer] in ("moe", "E")


def _of_switch(config, layer):
    layers = config.read("num_layers", default=12)
    sparse = config.read("num_sparse_encoder_layers", default=3)
    step = layers // sparse if sparse else layers
    return step == 1 or (step > 1 and layer % step == 1)


def _of_nllb(config, layer):
    step = config.read("encoder_sparse_step", default=4)
    return step > 0 and (layer + 1) % step == 0


# What cannot be converted.


def _without_hash(config, layer):
    kinds = config.read("mlp_layer_types", default=None)
    hashed = config.read("num_hash_layers", default=3)
    is_hash = layer < hashed if kinds is None else kinds[layer] == "hash_moe"
    if is_hash:
        raise ValueError(
            f"Layer {layer} selects experts by token id, not by a router (hash_moe), "
            "so it cannot be converted."
        )


def _without_latent_bias(config, layer):
    latent = config.read("moe_latent_size", default=None)
    if latent is not None and config.read("mlp_bias", default=False):
        raise ValueError("A latent projection with a bias cannot be converted.")


def _nllb_in_full(config, layer):
    policy = config.read("second_expert_policy", default="all")
    fraction = config.read("moe_eval_capacity_token_fraction", default=1.0)
    if policy != "all" or fraction != 1:
        raise ValueError(
            'Only `second_expert_policy="all"` and '
            "`moe_eval_capacity_token_fraction=1` can be converted. Received: "
            f"{policy!r} and {fraction}."
        )


def _dbrx_weights(value):
    if value not in (None, 1, 1.0):
        raise ValueError(
            "Combine weights are divided by their sum, not by another norm. "
            f"Received: moe_normalize_expert_weights={value}."
        )
    return value is not None


# Settings.


def _router(k, normalize, mechanism="softmax", **others):
    """Arguments of a router, of which most models have the same names."""
    return {
        "num_experts": Key(*NUM_EXPERTS),
        "num_selected_experts": k if callable(k) else Key(*NUM_SELECTED, default=k),
        "normalize_weights": normalize,
        "mechanism": mechanism,
        "use_bias": False,
        "load_balancing_loss_weight": 0.0,
        **others,
    }


def _balance_loss_weight(k):
    """The weight of the balance loss: theirs is `k` for a balanced load."""
    return lambda config: k(config) * config.read("router_aux_loss_coef", default=0.0)


def _with_loss(jitter="router_jitter_noise", **router):
    """A router with the losses of the config."""
    return router | {
        "load_balancing_loss_weight": _balance_loss_weight(
            router["num_selected_experts"]
        ),
        "router_z_loss_weight": Key("router_z_loss_coef", default=0.0),
        "jitter_noise": Key(jitter, default=0.0, change=lambda x: x or 0.0),
    }


def _grouped(k, *, groups=1, selected=1, scale, mechanism="sigmoid", normalize=True):
    """The router of DeepSeek-V3."""
    return _router(
        k,
        Key(*NORMALIZE, default=normalize),
        mechanism,
        normalization_epsilon=1e-20,
        routed_scaling_factor=Key("routed_scaling_factor", default=scale),
        num_expert_groups=Key("n_group", "num_expert_group", default=groups),
        num_selected_groups=Key("topk_group", default=selected),
    )


def _experts(d_ff, activation=None, gated=True, use_bias=False, **others):
    if activation is None:
        activation = Activation()
    return {
        "num_experts": Key(*NUM_EXPERTS),
        "d_ff": Key(d_ff),
        "activation": activation,
        "gated": gated,
        "use_bias": use_bias,
        **others,
    }


def _shared(d_ff, activation=None, gated=True, use_bias=False, **others):
    return {
        "backbone_d_ff": d_ff,
        "activation": activation or Activation(),
        "gated": gated,
        "use_bias": use_bias,
        **others,
    }


def _as_wide(experts=1, d_ff="moe_intermediate_size"):
    """The size of shared experts, each as wide as the others."""
    return lambda config: (
        config.read(d_ff) * (config.read(*NUM_SHARED, default=experts) or 0)
    )


def _clamped(alpha, offset, limit):
    """A clamped SwiGLU; `limit` is that of a config without one."""

    def activation(config):
        return ClampedSwiGLU(
            config.read("swiglu_limit", default=limit),
            config.read("swiglu_alpha", default=alpha) if offset else alpha,
            offset,
        )

    return activation


# Tensors. Where a name differs, it is a pair: that in files, and that in modules.

NAMES = ("gate_proj", "up_proj", "down_proj")
W_NAMES = ("w1", "w3", "w2")
FUSED = (
    linear("experts.gate_up_proj", GATE, INNER),
    linear("experts.down_proj", OUTPUT),
)


def _per_expert(gate, inner, output):
    names = {gate: GATE, inner: INNER, output: OUTPUT}
    return [linear(f"experts.{EXPERT}.{n}.weight", p) for n, p in names.items()]


def _shared_specs(name, names=NAMES):
    paths = (SHARED_GATE, SHARED_INNER, SHARED_OUTPUT)
    biases = [path.replace("kernel", "bias") for path in paths]
    return [
        *(
            linear(f"{name}.{n}.weight", path, optional=True)
            for n, path in zip(names, paths, strict=True)
        ),
        *(
            TensorSpec(f"{name}.{n}.bias", (path,), optional=True)
            for n, path in zip(names, biases, strict=True)
        ),
    ]


def _layouts(
    *others,
    gate="gate.weight",
    bias=None,
    shared=None,
    experts=NAMES,
    modules=FUSED,
    inserted=(),
):
    """Returns the layouts of files and of modules.

    Args:
        *others: further `TensorSpec`s.
        gate: name of the gate's weight, or a pair.
        bias: name of the bias for the selection, or a pair. Defaults to `None`, none.
        shared: name of the shared expert, or a pair. Defaults to `None`, none.
        experts: tuple of names of the experts' weights in files, or `TensorSpec`s.
        modules: tuple of the `TensorSpec`s of the experts in modules.
        inserted: axes of size 1 of the bias.
    """
    if isinstance(experts[0], str):
        experts = _per_expert(*experts)
    result = []
    for i, specs in enumerate((experts, modules)):
        gate_i, bias_i, shared_i = (
            x[i] if isinstance(x, tuple) else x for x in (gate, bias, shared)
        )
        layout = [linear(gate_i, ROUTER), *specs, *others]
        if bias_i:
            layout.append(
                TensorSpec(bias_i, (EXPERT_BIAS,), inserted=inserted, optional=True)
            )
        if shared_i:
            layout += _shared_specs(
                *([shared_i] if isinstance(shared_i, str) else shared_i)
            )
        result.append(layout)
    return result


_DEEPSEEK = _layouts(bias="gate.e_score_correction_bias", shared="shared_experts")
_SHARED_GATE = linear("shared_expert_gate.weight", "backbone_gate/kernel")
_QWEN_SHARED = _layouts(_SHARED_GATE, shared="shared_expert")
_TRANSPOSED = [
    TensorSpec("experts.gate_up_proj", (GATE, INNER)),
    TensorSpec("experts.down_proj", (OUTPUT,)),
]
_GPT_OSS = [
    TensorSpec("experts.gate_up_proj", (GATE, INNER), interleaved=True),
    TensorSpec("experts.down_proj", (OUTPUT,)),
    TensorSpec(
        "experts.gate_up_proj_bias",
        (GATE_BIAS, INNER_BIAS),
        interleaved=True,
        dropped=(1,),
    ),
    TensorSpec("experts.down_proj_bias", (OUTPUT_BIAS,), dropped=(1,)),
]
_DBRX = [
    linear("experts.mlp.w1", GATE, merged=True),
    linear("experts.mlp.v1", INNER, merged=True),
    TensorSpec("experts.mlp.w2", (OUTPUT,), merged=True),
]


def _granite(prefix=""):
    return _layouts(
        linear(
            "shared_mlp.input_linear.weight", SHARED_GATE, SHARED_INNER, optional=True
        ),
        linear("shared_mlp.output_linear.weight", SHARED_OUTPUT, optional=True),
        gate=(f"{prefix}router.layer.weight", f"{prefix}router.weight"),
        experts=(
            linear(f"{prefix}input_linear.weight", GATE, INNER),
            linear(f"{prefix}output_linear.weight", OUTPUT),
        ),
        modules=(
            linear(f"{prefix}experts.gate_up_proj", GATE, INNER),
            linear(f"{prefix}experts.down_proj", OUTPUT),
        ),
    )


_NEMOTRON = _layouts(
    linear("fc1_latent_proj.weight", "latent_input/kernel", optional=True),
    linear("fc2_latent_proj.weight", "latent_output/kernel", optional=True),
    bias="gate.e_score_correction_bias",
    shared="shared_experts",
    experts=(
        linear(f"experts.{EXPERT}.up_proj.weight", INNER),
        linear(f"experts.{EXPERT}.down_proj.weight", OUTPUT),
    ),
    modules=(linear("experts.up_proj", INNER), linear("experts.down_proj", OUTPUT)),
)


def _longcat(weights):
    """Their inner layers have unused rows for the identity experts."""
    total = weights[ROUTER].shape[-1]
    gate, inner, output = _per_expert(*NAMES)
    padded = (dataclasses.replace(spec, num_rows=total) for spec in (gate, inner))
    fused, down = FUSED
    return _layouts(
        gate="router.classifier.weight",
        bias="router.e_score_correction_bias",
        experts=(*padded, output),
        modules=(dataclasses.replace(fused, num_rows=total), down),
    )


def _one_by_one(inner, output):
    """Experts that modules, too, have one by one."""
    names = {inner: (INNER, INNER_BIAS), output: (OUTPUT, OUTPUT_BIAS)}
    specs = []
    for name, (kernel, bias) in names.items():
        name = f"experts.expert_{EXPERT}.{name}"
        specs.append(linear(f"{name}.weight", kernel))
        specs.append(TensorSpec(f"{name}.bias", (bias,), dropped=(1,), optional=True))
    return _layouts(
        TensorSpec("router.classifier.bias", (ROUTER_BIAS,), optional=True),
        gate="router.classifier.weight",
        experts=specs,
        modules=specs,
    )


# An expert has a fixed number of slots: the factor is too small to matter.
def _fixed_capacity(default=64):
    return Key("expert_capacity", default=default)


NARROW = "moe_intermediate_size"


def _like_deepseek(k, layouts=_DEEPSEEK, *, first, shared=1, **router):
    return Family(
        layouts,
        router=_grouped(k, **router),
        experts=_experts(NARROW),
        shared=_shared(_as_wide(shared)),
        router_class=BiasBalancedMaskedRouter,
        is_sparse=_after(first),
    )


def _like_qwen3(k, normalize, layouts=None, is_sparse=_every_nth, d_ff=NARROW):
    return Family(
        layouts or _layouts(),
        router=_with_loss(**_router(k, normalize)),
        experts=_experts(d_ff),
        is_sparse=is_sparse,
    )


def _with_gated_shared(family, default):
    return dataclasses.replace(
        family,
        layouts=_QWEN_SHARED,
        shared=_shared(
            Key("shared_expert_intermediate_size", default=default), backbone_gate=True
        ),
    )


def _like_mixtral(k, **changes):
    family = Family(
        _layouts(experts=W_NAMES),
        place="layers.{layer}.block_sparse_moe.",
        router=_with_loss(**_router(k, True)),
        experts=_experts("intermediate_size"),
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
        4, True, [*_layouts(experts=_TRANSPOSED), *_layouts(experts=FUSED)[:1]]
    ),
    "olmoe": _like_qwen3(8, _NOT_NORMALIZED, None, _everywhere, "intermediate_size"),
    "flex_olmo": _like_qwen3(
        5, _NOT_NORMALIZED, None, _everywhere, "intermediate_size"
    ),
    "mellum": _like_qwen3(8, _NORMALIZED, None, _after(0)),
    "deepseek_v2": Family(
        _layouts(shared="shared_experts"),
        router=_with_loss(
            **_router(
                Key(*NUM_SELECTED),
                False,
                routed_scaling_factor=Key("routed_scaling_factor", default=1.0),
                num_expert_groups=lambda c: _deepseek_v2_groups(c, "n_group"),
                num_selected_groups=lambda c: _deepseek_v2_groups(c, "topk_group"),
                group_score_experts=1,
            )
        ),
        experts=_experts(NARROW),
        shared=_shared(_as_wide(2)),
        is_sparse=_after(0),
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
        _layouts(
            bias=("e_score_correction_bias", "gate.e_score_correction_bias"),
            shared="shared_experts",
        ),
        first=1,
        scale=2.5,
    ),
    "bailing_hybrid": _like_deepseek(
        8,
        _layouts(
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
            _layouts(
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
            _layouts(shared="shared_experts", experts=FUSED),
            first=0,
            scale=1.0,
            mechanism="softmax",
        ),
        router_class=MaskedRouter,
    ),
    "deepseek_v4": Family(
        _layouts(
            bias=("gate.bias", "gate.e_score_correction_bias"),
            shared=(("shared_experts", W_NAMES), "shared_experts"),
            experts=W_NAMES,
        ),
        place="layers.{layer}.ffn.",
        router=_router(
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
        experts=_experts(NARROW, _clamped(1.0, 0.0, 10.0)),
        shared=_shared(Key(NARROW), _clamped(1.0, 0.0, 10.0)),
        router_class=BiasBalancedMaskedRouter,
        check=_without_hash,
    ),
    "ernie4_5_moe": Family(
        _layouts(
            bias=(
                "moe_statics.e_score_correction_bias",
                "gate.moe_statics.e_score_correction_bias",
            ),
            inserted=(0,),
            shared="shared_experts",
        ),
        router=_router(
            Key("num_experts_per_tok", "moe_k", default=6),
            True,
            num_experts=Key("num_experts", "moe_num_experts", default=64),
            normalization_epsilon=Key("moe_norm_min", default=1e-12),
        ),
        experts=_experts(
            NARROW, num_experts=Key("num_experts", "moe_num_experts", default=64)
        ),
        shared=_shared(_as_wide(2), use_bias=Key("use_bias", default=False)),
        router_class=BiasBalancedMaskedRouter,
        is_sparse=_of_ernie,
    ),
    "minimax_m2": _like_mixtral(
        8,
        layouts=_layouts(bias="e_score_correction_bias", experts=W_NAMES),
        router=_router(8, True, "sigmoid"),
        router_class=BiasBalancedMaskedRouter,
    ),
    "lfm2_moe": Family(
        _layouts(bias="expert_bias", experts=W_NAMES),
        place="layers.{layer}.feed_forward.",
        router=_router(
            4,
            _NORMALIZED,
            "sigmoid",
            normalization_epsilon=1e-6,
            routed_scaling_factor=Key("routed_scaling_factor", default=1.0),
        ),
        experts=_experts(NARROW, "silu"),
        router_class=lambda config: (
            BiasBalancedMaskedRouter
            if config.read("use_expert_bias", default=True)
            else MaskedRouter
        ),
        is_sparse=_after(2),
    ),
    "afmoe": Family(
        _layouts(
            gate="router.gate.weight", bias="expert_bias", shared="shared_experts"
        ),
        router=_router(
            6,
            True,
            "sigmoid",
            normalization_epsilon=1e-20,
            routed_scaling_factor=Key("route_scale", default=1.0),
        ),
        experts=_experts(NARROW),
        shared=_shared(_as_wide(2)),
        router_class=BiasBalancedMaskedRouter,
        is_sparse=_after(1),
    ),
    "hy_v3": Family(
        _layouts(
            gate=("router.gate.weight", "gate.weight"),
            bias=("expert_bias", "e_score_correction_bias"),
            shared=("shared_mlp", "shared_experts"),
        ),
        router=_router(
            8,
            True,
            "sigmoid",
            normalization_epsilon=1e-20,
            routed_scaling_factor=Key("router_scaling_factor", default=2.826),
        ),
        experts=_experts(NARROW),
        shared=_shared(_as_wide(1)),
        router_class=BiasBalancedMaskedRouter,
        is_sparse=_after(1),
    ),
    "hunyuan_v1_moe": Family(
        _layouts(gate="gate.wg.weight", shared="shared_mlp"),
        router=_router(Key("moe_topk", "num_experts_per_tok", default=1), True),
        experts=_experts("intermediate_size"),
        shared=_shared(Key("intermediate_size")),
    ),
    "cohere2_moe": Family(
        _layouts(shared="shared_experts"),
        router=_router(
            2,
            lambda c: (
                c.read("expert_selection_fn", default="softmax") == "softmax"
                or c.read("norm_topk_prob", default=True)
            ),
            Key("expert_selection_fn", default="softmax"),
        ),
        experts=_experts("intermediate_size"),
        shared=_shared(
            _as_wide(0, "intermediate_size"),
            average=Key(
                "shared_expert_combination_strategy",
                default="average",
                change=lambda name: name == "average",
            ),
        ),
        is_sparse=_after(0),
    ),
    "granitemoe": _like_mixtral(2, layouts=_granite()),
    "granitemoeshared": _like_mixtral(
        2,
        layouts=_granite("block_sparse_moe."),
        place="layers.{layer}.",
        shared=_shared(Key("shared_intermediate_size", default=0)),
        parts=("block_sparse_moe.", "shared_mlp."),
    ),
    "jamba": Family(
        _layouts(gate="router.weight"),
        place="layers.{layer}.feed_forward.",
        router=_with_loss(**_router(2, False)),
        experts=_experts("intermediate_size"),
        is_sparse=_of_jamba,
    ),
    "dbrx": Family(
        _layouts(gate="router.layer.weight", experts=_DBRX, modules=_DBRX),
        place="blocks.{layer}.ffn.",
        router=_with_loss(
            "moe_jitter_eps",
            **_router(
                Key("moe_top_k", default=1),
                Key("moe_normalize_expert_weights", default=1.0, change=_dbrx_weights),
                num_experts=Key("moe_num_experts", default=4),
            ),
        ),
        experts=_experts(
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
        layouts=_layouts(gate=("gate.weight", "router.weight"), experts=W_NAMES),
        router={
            "num_experts": Key(*NUM_EXPERTS),
            "num_selected_experts": Key(*NUM_SELECTED, default=2),
            "sparsity_threshold": Key(
                "router_jitter_noise", default=0.01, change=lambda x: 2 * x
            ),
            "jitter_noise": Key("input_jitter_noise", default=0.0),
            "use_bias": False,
            "load_balancing_loss_weight": _balance_loss_weight(
                Key(*NUM_SELECTED, default=2)
            ),
        },
        router_class=SparseMixerRouter,
    ),
    "nemotron_h": Family(
        _NEMOTRON,
        place="layers.{layer}.mixer.",
        router=_grouped(2, scale=1.0),
        experts=_experts(NARROW, Activation("mlp_hidden_act", "relu2"), gated=False),
        shared=_shared(
            Key("moe_shared_expert_intermediate_size", default=7688),
            Activation("mlp_hidden_act", "relu2"),
            gated=False,
            use_bias=Key("mlp_bias", default=False),
        ),
        layer={"latent_dim": Key("moe_latent_size", default=None)},
        router_class=BiasBalancedMaskedRouter,
        is_sparse=_of_nemotron,
        check=_without_latent_bias,
    ),
    "longcat_flash": Family(
        _longcat,
        router=_router(
            12,
            False,
            num_experts=lambda c: _with_identity_experts(c),
            routed_scaling_factor=Key("routed_scaling_factor", default=6.0),
        ),
        experts=_experts(
            "expert_ffn_hidden_size",
            num_experts=lambda c: _with_identity_experts(c),
            num_identity_experts=Key(
                "zero_expert_num", default=256, change=lambda n: n or 0
            ),
        ),
        router_class=BiasBalancedMaskedRouter,
    ),
    "gpt_oss": Family(
        _layouts(
            TensorSpec("router.bias", (ROUTER_BIAS,)),
            gate="router.weight",
            experts=_GPT_OSS,
            modules=_GPT_OSS,
        ),
        router=_with_loss(**_router(4, True) | {"use_bias": True}),
        experts=_experts("intermediate_size", _clamped(1.702, 1.0, 7.0), use_bias=True),
    ),
    "llama4_text": Family(
        _layouts(
            gate="router.weight",
            shared="shared_expert",
            experts=_TRANSPOSED,
            modules=_TRANSPOSED,
        ),
        place="layers.{layer}.feed_forward.",
        router=_with_loss(**_router(1, False, "sigmoid")),
        experts=_experts("intermediate_size"),
        shared=_shared(Key("intermediate_size")),
        layer={"weighted_inputs": True},
        is_sparse=_of_llama4,
    ),
    "gemma4_text": Family(
        _layouts(
            TensorSpec("router.scale", ("router/router_weights/input_scale",)),
            TensorSpec("router.per_expert_scale", ("router/expert_scale",)),
            gate="router.proj.weight",
            experts=FUSED,
        ),
        place="layers.{layer}.",
        router=_router(
            Key("top_k_experts", "num_experts_per_tok"),
            True,
            input_norm_epsilon=Key("rms_norm_eps", default=1e-6),
            use_expert_scale=True,
        ),
        experts=_experts(NARROW, Activation("hidden_activation", "gelu_pytorch_tanh")),
        is_sparse=lambda config, layer: config.read("enable_moe_block", default=False),
        parts=("router.", "experts."),
    ),
    "switch_transformers": Family(
        _one_by_one("wi", "wo"),
        place="encoder.block.{layer}.layer.1.mlp.",
        router=_with_loss(**_router(lambda c: 1, False))
        | {
            "use_bias": Key("router_bias", default=False),
            "jitter_noise": Key("router_jitter_noise", default=0.01),
        },
        experts=_experts("d_ff", Activation("dense_act_fn", "relu"), gated=False),
        layer={
            "train_capacity_factor": 1e-6,
            "eval_capacity_factor": 1e-6,
            "min_expert_capacity": _fixed_capacity(),
        },
        is_sparse=_of_switch,
    ),
    # In transformers 5.24 only two experts of this block are used. This is the layer
    # of version 4. Token dropout is a factor, which it is in evaluation.
    "nllb-moe": Family(
        _one_by_one("fc1", "fc2"),
        place="encoder.layers.{layer}.ffn.",
        router=_with_loss(**_router(lambda c: 2, True))
        | {
            "use_bias": Key("router_bias", default=False),
            "routed_scaling_factor": Key(
                "moe_token_dropout", default=0.2, change=lambda rate: 1 - rate
            ),
        },
        experts=_experts(
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
        is_sparse=_of_nllb,
        check=_nllb_in_full,
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


def _deepseek_v2_groups(config, name):
    if config.read("topk_method", default="greedy") == "greedy":
        return 1
    return config.read(name)


def _with_identity_experts(config):
    identity = config.read("zero_expert_num", default=256) or 0
    return config.read(*NUM_EXPERTS) + identity
