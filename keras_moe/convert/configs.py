"""Layers from the configs of models of transformers."""

import collections.abc
import json
import os
import pathlib

import keras

from keras_moe.activations import ClampedSwiGLU, clamped_swiglu
from keras_moe.convert.families import ALIASES, FAMILIES
from keras_moe.convert.settings import REQUIRED, Activation
from keras_moe.experts import FeedForwardExperts
from keras_moe.layers import MoeLayer, MoeLayerWithBackbone
from keras_moe.utils import checks

# Where the config of a model with images or sound has that of its language model.
PARTS = ("text_config", "language_config", "llm_config")
# The settings without which the same weights compute something else.
CHECKED = ("activation", "gated", "mechanism", "normalize_weights")


class Config:
    """A config as a dict, for one layer of the model.

    Args:
        values: dict.
        layer_index: int.
    """

    def __init__(self, values, layer_index=0):
        self.values, self.layer_index = values, layer_index
        kind = values.get("model_type")
        self.model_type = ALIASES.get(kind, kind)
        if self.model_type not in FAMILIES:
            raise ValueError(
                f"`model_type` must be one of {sorted([*FAMILIES, *ALIASES])}. "
                f"Received: model_type={kind!r}."
            )
        self.family = FAMILIES[self.model_type]

    def read(self, *names, default=REQUIRED):
        """Returns the value of the first name that the config has.

        Raises:
            ValueError: if it has none, and there is no default.
        """
        for name in names:
            if name in self.values:
                return self.values[name]
        if default is REQUIRED:
            raise ValueError(
                f"A config of {self.model_type!r} must have {' or '.join(names)}. "
                f"Received: {sorted(self.values)}."
            )
        return default

    @property
    def hidden_size(self):
        return self.read("d_model", "hidden_size")

    @property
    def block_shape(self):
        """The blocks of FP8; `None` if the config does not say."""
        return (self.read("quantization_config", default=None) or {}).get(
            "weight_block_size"
        )

    def settings(self, part):
        """Returns the arguments of a part of the layer: a dict.

        Args:
            part: string, `"router"`, `"experts"`, `"shared"` or `"layer"`.
        """
        return {
            name: value(self) if callable(value) else value
            for name, value in (getattr(self.family, part) or {}).items()
        }

    @property
    def num_layers(self):
        """The number of layers of the model, `None` if the config does not say."""
        kinds = self.read("layers_block_type", "hybrid_override_pattern", default=None)
        names = ("num_hidden_layers", "num_layers", "n_layers", "encoder_layers")
        return self.read(*names, default=None) if kinds is None else len(kinds)

    @property
    def sparse_layers(self):
        """A list of the indices of the layers that have experts, if it is known."""
        layers = [self.layer_index]
        if self.num_layers is not None:
            layers = range(self.num_layers)
        return [i for i in layers if self.family.is_sparse(self, i)]

    def check_layer(self):
        """Raises a ValueError if the layer has no experts, or cannot be converted."""
        index, sparse = self.layer_index, self.sparse_layers
        if index not in sparse:
            raise ValueError(
                f"`layer_index` must be that of a layer with experts, one of {sparse}. "
                f"Received: layer_index={index}."
            )
        self.family.check(self, index)


def read_config(config, layer_index=0):
    """Returns a `Config` of the language model.

    Args:
        config: config object of transformers; dict; or path of a `config.json`, or of
            the folder that has it.
        layer_index: int.
    """
    checks.whole_number("layer_index", layer_index, minimum=0)
    if isinstance(config, (str, os.PathLike)):
        path = pathlib.Path(config)
        config = json.loads(
            (path / "config.json" if path.is_dir() else path).read_text()
        )
    elif hasattr(config, "to_dict"):
        config = config.to_dict()
    if not isinstance(config, collections.abc.Mapping):
        raise TypeError(
            "`config` must be a config of transformers, a dict or a path. "
            f"Received: {type(config).__name__}."
        )
    outer = dict(config)
    for part in PARTS:
        if isinstance(outer.get(part), collections.abc.Mapping):
            inner = dict(outer[part])
            inner.setdefault("model_type", outer.get("model_type"))
            if "quantization_config" in outer:
                inner.setdefault("quantization_config", outer["quantization_config"])
            outer = inner
    # DBRX keeps the settings of its experts apart, with names of their own.
    return Config({**(outer.get("ffn_config") or {}), **outer}, layer_index)


def layer_from_config(
    config, layer_index=0, *, router_kwargs=None, experts_kwargs=None, **kwargs
):
    """Creates the Mixture-of-Experts layer of a model of transformers.

    It has the model's routing and experts, and is dropless unless the model has a
    capacity. transformers is not needed.

    Args:
        config: config object of transformers; dict; or path of a `config.json`, or of
            the folder that has it. Its `model_type` must be one of
            `keras_moe.convert.FORMATS`.
        layer_index: int, the index of the layer in the model. Defaults to 0.
        router_kwargs: dict of further arguments of the router. Defaults to `None`.
        experts_kwargs: dict of further arguments of `FeedForwardExperts`. Defaults to
            `None`.
        **kwargs: further arguments of `MoeLayer`, such as `dtype`.

    Returns:
        A `MoeLayer`, or a `MoeLayerWithBackbone` for a model with shared experts. It is
        not built.

    Raises:
        ValueError: for another family, for a layer without experts, and for settings
            that cannot be converted or are missing.
        TypeError: if an argument has another type.

    Example:

    ```python
    config = {
        "model_type": "mixtral",
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_local_experts": 4,
    }
    layer = keras_moe.convert.layer_from_config(config)
    layer(np.ones((2, 8, 16))).shape  # (2, 8, 16)
    ```
    """
    config = read_config(config, layer_index)
    config.check_layer()
    dtype = {"dtype": kwargs.get("dtype")}
    experts = checks.keyword_arguments("experts_kwargs", experts_kwargs)
    router = checks.keyword_arguments("router_kwargs", router_kwargs)
    shared = config.settings("shared")
    has_shared = bool(shared.get("backbone_d_ff"))
    name = kwargs.pop("name", None) if has_shared else None
    make_router = config.family.router_class
    if not isinstance(make_router, type):
        make_router = make_router(config)
    capacity = {"train_capacity_factor": None, "eval_capacity_factor": None}
    moe = MoeLayer(
        FeedForwardExperts(**dtype | config.settings("experts") | experts),
        make_router(**dtype | config.settings("router") | router),
        **capacity | config.settings("layer") | kwargs,
    )
    return (
        MoeLayerWithBackbone(moe, **shared, name=name, **dtype) if has_shared else moe
    )


def check_settings(layer, model_type, config=None):
    """Raises a ValueError if a layer computes something else than the family.

    Args:
        layer: `MoeLayer` or `MoeLayerWithBackbone`.
        model_type: string, a key of `FAMILIES`.
        config: `Config`, or `None` to check only what all models of the family share.
    """
    moe = getattr(layer, "moe", layer)
    parts = {"router": moe.router, "experts": moe.experts}
    if moe is not layer:
        parts["shared"] = layer.backbone
    problems = []
    for part, found in parts.items():
        for name, expected in _known_settings(model_type, part, config).items():
            value = getattr(found, name, expected)
            if name == "activation":
                value, expected = _function(value), _function(expected)
            if value != expected:
                problems.append(
                    f"`{name}` of the {part} is {_shown(value)} instead of "
                    f"{_shown(expected)}"
                )
    if problems:
        raise ValueError(
            f"The layer is not one of {model_type!r}, and was not changed: "
            f"{'; '.join(problems)}."
        )


def _known_settings(model_type, part, config):
    if config is not None:
        settings = config.settings(part)
        return {name: settings[name] for name in CHECKED if name in settings}
    settings, known = getattr(FAMILIES[model_type], part) or {}, {}
    for name in CHECKED:
        value = settings.get(name)
        if isinstance(value, Activation):
            known[name] = value.usual
        elif name in settings and not callable(value):
            known[name] = value
    return known


def _function(activation):
    if activation is clamped_swiglu:
        return ClampedSwiGLU()
    return keras.activations.get(activation)


def _shown(value):
    return repr(getattr(value, "__name__", value))
