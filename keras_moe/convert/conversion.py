"""Conversion of weights between our layers and the formats of other packages."""

import os
import pathlib

import keras

from keras_moe.convert import configs
from keras_moe.convert.decoding import decoded, problem_of
from keras_moe.convert.families import ALIASES, FAMILIES
from keras_moe.convert.formats import FORMATS as OTHER_FORMATS
from keras_moe.convert.sources import open_source
from keras_moe.experts.adaptation import AdaptableDense
from keras_moe.experts.feed_forward import BaseFeedForward
from keras_moe.kernels import assign_parts
from keras_moe.layers import HierarchicalMoeLayer, MoeLayer, MoeLayerWithBackbone
from keras_moe.utils import checks
from keras_moe.utils.traversal import find_layers

# All formats and their layouts.
FORMATS = {
    **{name: family.layouts for name, family in FAMILIES.items()},
    **{alias: FAMILIES[name].layouts for alias, name in ALIASES.items()},
    **OTHER_FORMATS,
}
# Where the layers of a model may be in its files.
ROOTS = ("model.", "model.language_model.", "language_model.model.", "language_model.")
ROOTS += ("backbone.", "transformer.", "")


def load_weights(layer, source, format, *, prefix="", config=None):
    """Loads the weights of another package's layer into a layer.

    Names, shapes, dtypes and settings are checked, and all tensors are converted,
    before any weight is changed. Compressed tensors (FP8 with a scale per block, MXFP4)
    are decoded.

    Args:
        layer: built `MoeLayer`, `MoeLayerWithBackbone` or `HierarchicalMoeLayer`.
        source: dict of arrays or tensors by name; PyTorch module; layer of Keras or
            tf-keras; or path of a safetensors file, of an index of such files, or of a
            folder, from which only this layer's tensors are read.
        format: string, a key of `keras_moe.convert.FORMATS`.
        prefix: string, the prefix of the tensors' names, such as
            `"model.layers.3.mlp."`. Defaults to `""`.
        config: as for `layer_from_config`; the settings of the layer must be those of
            the config. Defaults to `None`, that of the folder. Without one, they must
            be those that all models of the format share.

    Raises:
        ValueError: if the layer and the format have different weights or settings, or
            if tensors are missing, have another shape or dtype, or are not used.
        TypeError: if an argument has another type.

    Example:

    ```python
    layer = keras_moe.presets.mixtral(num_experts=4, d_ff=32)
    layer.build((None, 8, 16))
    tensors = keras_moe.convert.to_tensors(layer, "mixtral", prefix="block.")
    keras_moe.convert.load_weights(layer, tensors, "mixtral", prefix="block.")
    ```
    """
    weights = _weights(layer)
    layouts = _layouts(format, weights)
    config = _config_beside(source) if config is None else configs.read_config(config)
    _check_settings(layer, format, config)
    tensors = _Tensors(open_source(source), prefix, format, config)
    layout = tensors.check(layouts, weights)
    arrays = {
        path: spec.read(tensors.found, weights, path)
        for spec in layout
        for path in spec.paths
    }
    for path, array in arrays.items():
        weights[path].assign(array)


def from_pretrained(folder, layer_index, *, prefix=None, **kwargs):
    """Creates a layer with the weights of a model in a folder.

    The folder has the `config.json` and the safetensors files of a model of
    transformers. Only the tensors of the layer are read, one weight after the other.

    Args:
        folder: path.
        layer_index: int, the index of the layer in the model.
        prefix: string, the prefix of the tensors' names. Defaults to `None`, that of
            the layer in the (first) stack of the model.
        **kwargs: see `layer_from_config`.

    Returns:
        A built `MoeLayer` or `MoeLayerWithBackbone`.

    Raises:
        ValueError: see `layer_from_config` and `load_weights`.
        TypeError: if an argument has another type.

    Example:

    ```python
    layer = keras_moe.convert.from_pretrained("Qwen3-30B-A3B", layer_index=0)
    ```
    """
    config = configs.read_config(folder, layer_index)
    layer = configs.layer_from_config(folder, layer_index, **kwargs)
    _build_with_zeros(layer, config.hidden_size)
    weights, source = _weights(layer), open_source(folder)
    if prefix is None:
        prefix = _find_prefix(source, config)
    tensors = _Tensors(source, prefix, config.model_type, config)
    layout = tensors.check(_layouts(config.model_type, weights), weights)
    for spec in layout:
        for path in spec.paths:
            if path.startswith("experts/"):
                parts = spec.read_experts(tensors.found, weights, path)
                assign_parts(weights[path], parts)
            else:
                weights[path].assign(spec.read(tensors.found, weights, path))
    return layer


def to_tensors(layer, format, *, prefix="", stacked=False, config=None):
    """Returns the weights of a layer in the format of another package.

    Adapters (LoRA) are merged into the kernels.

    Args:
        layer: as for `load_weights`.
        format: string, a key of `keras_moe.convert.FORMATS`.
        prefix: string, the prefix of the tensors' names. Defaults to `""`.
        stacked: bool, for the formats of transformers: whether the tensors are those of
            its modules, with all experts in one, or those of files. Defaults to
            `False`.
        config: as for `load_weights`.

    Returns:
        A dict of names to numpy arrays.

    Raises:
        ValueError: if the layer and the format have different weights or settings.
        TypeError: if an argument has another type.

    Example:

    ```python
    layer = keras_moe.presets.mixtral(num_experts=4, d_ff=32)
    layer.build((None, 8, 16))
    tensors = keras_moe.convert.to_tensors(layer, "mixtral")
    tensors["experts.0.w1.weight"].shape  # (32, 16)
    ```
    """
    weights = _weights(layer, merged=True)
    layouts = _layouts(format, weights)
    config = None if config is None else configs.read_config(config)
    _check_settings(layer, format, config)
    layout = layouts[-1 if checks.boolean("stacked", stacked) else 0]
    return {
        prefix + name: array
        for spec in layout
        for name, array in spec.export(weights).items()
    }


def _build_with_zeros(layer, hidden_size):
    """Builds a layer; random values would need memory besides that of the layer."""
    zeros = keras.initializers.Zeros()
    parts = find_layers(layer, (BaseFeedForward, AdaptableDense))
    initializers = [part.kernel_initializer for part in parts]
    for part in parts:
        part.kernel_initializer = zeros
    layer.build((None, None, hidden_size))
    for part, initializer in zip(parts, initializers, strict=True):
        part.kernel_initializer = initializer
        if isinstance(part, BaseFeedForward):  # It creates this layer when it is built.
            similar = part.intermediate_layer.kernel_initializer
            part.output_layer.kernel_initializer = similar


class _Tensors:
    """The tensors of a source that belong to a layer.

    Args:
        source: dict of names to tensors.
        prefix: string, the prefix of the names.
        format: string.
        config: `Config`, or `None`.

    Attributes:
        found: dict of the tensors, without the prefix and decoded.
    """

    def __init__(self, source, prefix, format, config):
        self.source, self.prefix = source, prefix
        family = FAMILIES.get(ALIASES.get(format, format))
        begins = tuple(prefix + part for part in (family.parts if family else ("",)))
        found = {
            name.removeprefix(prefix): tensor
            for name, tensor in source.items()
            if name.startswith(begins)
        }
        self.found = decoded(found, config.block_shape if config else None)

    def check(self, layouts, weights):
        """Returns the layout of the tensors.

        Raises:
            ValueError: if they fit no layout.
        """
        layout = max(layouts, key=lambda layout: self._num_fitting(layout, weights))
        expected, unused = {}, set()
        for spec in layout:
            expected |= dict.fromkeys(spec.names(weights), spec.shape(weights))
            unused |= spec.padding_names(weights)
        found = self.found.keys() - unused
        if not expected.keys() & found:
            raise ValueError(
                f"No tensor of this layer begins with the prefix {self.prefix!r}. "
                f"{self._known_prefixes(expected)} The layer was not changed."
            )
        problems = [f"{name} is missing" for name in sorted(expected.keys() - found)]
        problems += [f"{name} is left over" for name in sorted(found - expected.keys())]
        for name in sorted(expected.keys() & found):
            problem = problem_of(self.found[name]) or _misfit(
                tuple(self.found[name].shape), expected[name]
            )
            if problem:
                problems.append(f"{name} {problem}")
        if problems:
            raise ValueError(
                "The tensors do not fit the layer, which was not changed. With prefix "
                f"{self.prefix!r}: {'; '.join(problems)}."
            )
        return layout

    def _num_fitting(self, layout, weights):
        """Counts names, and shapes, that are as in the layout."""
        score = 0
        for spec in layout:
            for name in set(spec.names(weights)) & self.found.keys():
                shape = getattr(self.found[name], "shape", None)
                score += 1 + (shape is not None and tuple(shape) == spec.shape(weights))
        return score

    def _known_prefixes(self, expected):
        """Says with which prefixes the tensors that a layer expects are there."""
        prefixes = {
            name.removesuffix(suffix)
            for name in self.source
            for suffix in expected
            if name == suffix or name.endswith((f".{suffix}", f"/{suffix}"))
        }
        if not prefixes:
            return (
                "There is none with another prefix either; the first names are "
                f"{sorted(self.source)[:5]}."
            )
        return f"There are tensors with the prefixes {sorted(prefixes)}."


def _misfit(shape, expected):
    if shape == expected:
        return None
    is_turned = shape[:-2] + shape[:-3:-1] == expected
    turned = ", so it is transposed" if is_turned else ""
    return f"has shape {shape} instead of {expected}{turned}"


def _find_prefix(source, config):
    """Returns the prefix of the names of a layer's tensors in files."""
    place = config.family.place.format(layer=config.layer_index)
    for root in ROOTS:
        begins = tuple(f"{root}{place}{part}" for part in config.family.parts)
        if any(name.startswith(begins) for name in source):
            return root + place
    raise ValueError(
        f"No tensor's name has {place!r} in it, where {config.model_type!r} has the "
        f"layer. Pass a `prefix`. The first names are {sorted(source)[:5]}."
    )


def _config_beside(source):
    """Returns the `Config` of a folder that has one of a known family."""
    if not isinstance(source, (str, os.PathLike)):
        return None
    path = pathlib.Path(source)
    folder = path if path.is_dir() else path.parent
    if not (folder / "config.json").exists():
        return None
    return configs.read_config(folder)


def _check_settings(layer, format, config):
    model_type = ALIASES.get(format, format)
    if model_type not in FAMILIES:
        return
    if config is not None and config.model_type != model_type:
        raise ValueError(
            f"The config is one of {config.model_type!r}, not of {format!r}. "
            "The layer was not changed."
        )
    if not isinstance(layer, HierarchicalMoeLayer):
        configs.check_settings(layer, model_type, config)


def _weights(layer, merged=False):
    """Returns the weights of a layer by path, independent of its sublayers' names.

    If `merged`, the kernels are those with adapters, which are left out.
    """
    if not isinstance(layer, (MoeLayer, MoeLayerWithBackbone, HierarchicalMoeLayer)):
        raise TypeError(
            "`layer` must be a `MoeLayer`, `MoeLayerWithBackbone` or "
            f"`HierarchicalMoeLayer`. Received: {type(layer).__name__}."
        )
    if not layer.built:
        raise ValueError(f"{layer.name} must be built: it has no weights yet.")
    parts, moe = {}, layer
    if isinstance(layer, MoeLayerWithBackbone):
        moe, parts = layer.moe, {"backbone": layer.backbone}
        if layer.backbone_gate:
            parts["backbone_gate"] = layer.backbone_gate_layer
    if isinstance(moe, HierarchicalMoeLayer):
        parts |= {"outer": moe.outer_router, "inner": moe.inner_router}
    else:
        parts["router"] = moe.router
        if moe.latent_dim is not None:
            parts["latent_input"] = moe.latent_input
            parts["latent_output"] = moe.latent_output
    parts["experts"] = moe.experts
    found = {
        f"{name}/{weight.path.removeprefix(part.path + '/')}": weight
        for name, part in parts.items()
        for weight in part.weights
    }
    return _merge_adapters(found, parts) if merged else found


def _merge_adapters(weights, parts):
    kernels = {
        f"{name}/{dense.path.removeprefix(part.path + '/')}/kernel": dense.kernel
        for name, part in parts.items()
        for dense in find_layers(part, AdaptableDense)
        if dense.lora_enabled
    }
    kept = {path: w for path, w in weights.items() if "/lora_kernel_" not in path}
    return kept | kernels


def _layouts(format, weights):
    """Returns the layouts of a format, if it has a tensor for each of our weights."""
    layouts = FORMATS[checks.one_of("format", format, tuple(FORMATS))]
    if callable(layouts):
        layouts = layouts(weights)
    layouts = [
        [s for s in layout if not s.optional or weights.keys() & set(s.paths)]
        for layout in layouts
    ]
    of_format = {path for spec in layouts[0] for path in spec.paths}
    if of_format != weights.keys():
        raise ValueError(
            f"The layer and the format {format!r} must have the same weights. Only "
            f"the layer has {sorted(weights.keys() - of_format)}, only the format "
            f"{sorted(of_format - weights.keys())}."
        )
    return layouts
