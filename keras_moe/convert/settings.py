"""Settings of the models of transformers, as functions of a model's config.

The default of a setting is that of transformers 5.24.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

from keras_moe.activations import ClampedSwiGLU, gelu_tanh, squared_relu
from keras_moe.routers import MaskedRouter

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


def after_dense(default):
    """The layers after the first dense ones."""

    def is_sparse(config, layer):
        kinds = config.read("mlp_layer_types", default=None)
        if kinds is not None:
            return kinds[layer] != "dense"
        names = ("first_k_dense_replace", "num_dense_layers")
        return layer >= config.read(*names, default=default)

    return is_sparse


def every_nth(config, layer):
    step = config.read("decoder_sparse_step", default=1)
    dense = config.read("mlp_only_layers", default=None) or ()
    return layer not in dense and (layer + 1) % step == 0


def is_sparse_in_ernie(config, layer):
    end = config.read("moe_layer_end_index", default=-1)
    step = config.read("moe_layer_interval", default=1)
    start = config.read("moe_layer_start_index", default=1)
    is_before_end = end == -1 or layer <= end
    return (layer + 1) % step == 0 and layer >= start and is_before_end


def is_sparse_in_llama4(config, layer):
    step = config.read("interleave_moe_layer_step", default=1)
    chosen = config.read("moe_layers", default=None)
    return (layer + 1) % step == 0 if chosen is None else layer in chosen


def is_sparse_in_jamba(config, layer):
    period = config.read("expert_layer_period", default=2)
    return layer % period == config.read("expert_layer_offset", default=1)


def is_sparse_in_nemotron(config, layer):
    names = ("layers_block_type", "layer_types", "hybrid_override_pattern")
    return config.read(*names)[layer] in ("moe", "E")


def is_sparse_in_switch(config, layer):
    layers = config.read("num_layers", default=12)
    sparse = config.read("num_sparse_encoder_layers", default=3)
    step = layers // sparse if sparse else layers
    return step == 1 or (step > 1 and layer % step == 1)


def is_sparse_in_nllb(config, layer):
    step = config.read("encoder_sparse_step", default=4)
    return step > 0 and (layer + 1) % step == 0


# What cannot be converted.


def check_hash(config, layer):
    kinds = config.read("mlp_layer_types", default=None)
    hashed = config.read("num_hash_layers", default=3)
    is_hash = layer < hashed if kinds is None else kinds[layer] == "hash_moe"
    if is_hash:
        raise ValueError(
            f"Layer {layer} selects experts by token id, not by a router (hash_moe), "
            "so it cannot be converted."
        )


def check_latent_bias(config, layer):
    latent = config.read("moe_latent_size", default=None)
    if latent is not None and config.read("mlp_bias", default=False):
        raise ValueError("A latent projection with a bias cannot be converted.")


def check_nllb(config, layer):
    policy = config.read("second_expert_policy", default="all")
    fraction = config.read("moe_eval_capacity_token_fraction", default=1.0)
    if policy != "all" or fraction != 1:
        raise ValueError(
            'Only `second_expert_policy="all"` and '
            "`moe_eval_capacity_token_fraction=1` can be converted. Received: "
            f"{policy!r} and {fraction}."
        )


def normalizes_in_dbrx(value):
    if value not in (None, 1, 1.0):
        raise ValueError(
            "Combine weights are divided by their sum, not by another norm. "
            f"Received: moe_normalize_expert_weights={value}."
        )
    return value is not None


# Settings.


def top_k_router(k, normalize, mechanism="softmax", **others):
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


def balance_loss_weight(k):
    """The weight of the balance loss: theirs is `k` for a balanced load."""
    return lambda config: k(config) * config.read("router_aux_loss_coef", default=0.0)


def with_losses(jitter="router_jitter_noise", **router):
    """A router with the losses of the config."""
    return router | {
        "load_balancing_loss_weight": balance_loss_weight(
            router["num_selected_experts"]
        ),
        "router_z_loss_weight": Key("router_z_loss_coef", default=0.0),
        "jitter_noise": Key(jitter, default=0.0, change=lambda x: x or 0.0),
    }


def grouped_router(
    k, *, groups=1, selected=1, scale, mechanism="sigmoid", normalize=True
):
    """The router of DeepSeek-V3."""
    return top_k_router(
        k,
        Key(*NORMALIZE, default=normalize),
        mechanism,
        normalization_epsilon=1e-20,
        routed_scaling_factor=Key("routed_scaling_factor", default=scale),
        num_expert_groups=Key("n_group", "num_expert_group", default=groups),
        num_selected_groups=Key("topk_group", default=selected),
    )


def experts_of(d_ff, activation=None, gated=True, use_bias=False, **others):
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


def shared_of(d_ff, activation=None, gated=True, use_bias=False, **others):
    return {
        "backbone_d_ff": d_ff,
        "activation": activation or Activation(),
        "gated": gated,
        "use_bias": use_bias,
        **others,
    }


def as_wide(experts=1, d_ff="moe_intermediate_size"):
    """The size of shared experts, each as wide as the others."""
    return lambda config: (
        config.read(d_ff) * (config.read(*NUM_SHARED, default=experts) or 0)
    )


def clamped_activation(alpha, offset, limit):
    """A clamped SwiGLU; `limit` is that of a config without one."""

    def activation(config):
        return ClampedSwiGLU(
            config.read("swiglu_limit", default=limit),
            config.read("swiglu_alpha", default=alpha) if offset else alpha,
            offset,
        )

    return activation


def deepseek_v2_groups(config, name):
    if config.read("topk_method", default="greedy") == "greedy":
        return 1
    return config.read(name)


def with_identity_experts(config):
    identity = config.read("zero_expert_num", default=256) or 0
    return config.read(*NUM_EXPERTS) + identity
