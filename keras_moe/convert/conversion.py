"""Conversion of weights between our layers and the formats of other packages."""

from keras_moe.convert.formats import FORMATS
from keras_moe.convert.sources import open_source
from keras_moe.experts.adaptation import AdaptableDense
from keras_moe.layers import HierarchicalMoeLayer, MoeLayer, MoeLayerWithBackbone
from keras_moe.utils import checks
from keras_moe.utils.traversal import find_layers


def load_weights(layer, source, format, *, prefix=""):
    """Loads the weights of another package's layer into a layer.

    All names and shapes are checked before any weight is changed.

    Args:
        layer: built `MoeLayer`, `MoeLayerWithBackbone` or `HierarchicalMoeLayer`.
        source: dict of arrays or tensors by name; PyTorch module; layer of Keras or
            tf-keras; or path of a safetensors file or of a folder of them, from which
            only this layer's tensors are read.
        format: string, a key of `keras_moe.convert.FORMATS`.
        prefix: string, the prefix of the tensors' names, such as
            `"model.layers.3.mlp."`. Defaults to `""`.

    Raises:
        ValueError: if the layer and the format have different weights, or if tensors
            are missing, have another shape, or are not used.
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
    with open_source(source) as found:
        tensors = {
            name.removeprefix(prefix): tensor
            for name, tensor in found.items()
            if name.startswith(prefix)
        }
        layout = max(
            layouts,
            key=lambda layout: sum(
                name in tensors for spec in layout for name in spec.names(weights)
            ),
        )
        _check_tensors(tensors, layout, weights, prefix, found)
        for spec in layout:
            for path, value in spec.load(tensors, weights).items():
                weights[path].assign(value)


def to_tensors(layer, format, *, prefix="", stacked=False):
    """Returns the weights of a layer in the format of another package.

    Adapters (LoRA) are merged into the kernels.

    Args:
        layer: as for `load_weights`.
        format: string, a key of `keras_moe.convert.FORMATS`.
        prefix: string, the prefix of the tensors' names. Defaults to `""`.
        stacked: bool, for the formats of transformers: whether all experts are in one
            tensor, as in its modules, or each in its own, as in files. Defaults to
            `False`.

    Returns:
        A dict of names to numpy arrays.

    Raises:
        ValueError: if the layer and the format have different weights.
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
    layout = layouts[-1 if checks.boolean("stacked", stacked) else 0]
    return {
        prefix + name: array
        for spec in layout
        for name, array in spec.export(weights).items()
    }


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
    of_format = {path for spec in layouts[0] for path in spec.paths}
    if of_format != weights.keys():
        raise ValueError(
            f"The layer and the format {format!r} must have the same weights. Only "
            f"the layer has {sorted(weights.keys() - of_format)}, only the format "
            f"{sorted(of_format - weights.keys())}."
        )
    return layouts


def _check_tensors(tensors, layout, weights, prefix, found):
    expected = {
        name: spec.shape(weights) for spec in layout for name in spec.names(weights)
    }
    if not expected.keys() & tensors.keys():
        raise ValueError(
            f"No tensor of this layer begins with the prefix {prefix!r}. "
            f"{_known_prefixes(found, expected)} The layer was not changed."
        )
    problems = [f"{name} is missing" for name in sorted(expected.keys() - tensors)]
    problems += [f"{name} is left over" for name in sorted(tensors.keys() - expected)]
    for name in sorted(expected.keys() & tensors):
        shape = tuple(tensors[name].shape)
        if shape != expected[name]:
            problems.append(f"{name} has shape {shape} instead of {expected[name]}")
    if problems:
        raise ValueError(
            "The tensors do not fit the layer, which was not changed. With prefix "
            f"{prefix!r}: {'; '.join(problems)}."
        )


def _known_prefixes(found, expected):
    """Says with which prefixes the tensors that a layer expects are there."""
    prefixes = {
        name.removesuffix(suffix)
        for name in found
        for suffix in expected
        if name == suffix or name.endswith((f".{suffix}", f"/{suffix}"))
    }
    if not prefixes:
        names = sorted(found)[:5]
        return f"There is none with another prefix either; the first names are {names}."
    return f"There are tensors with the prefixes {sorted(prefixes)}."
