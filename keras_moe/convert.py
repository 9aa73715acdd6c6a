"""Weights of other packages' Mixture-of-Experts layers, there and back.

A format is a list of tensors, each made of one or two weights of ours. Both
directions, the names and the shapes that are checked follow from it.
"""

import collections.abc
import contextlib
import dataclasses
import os
import pathlib

import keras
import numpy as np

from keras_moe import checks
from keras_moe.backbone import MoeLayerWithBackbone
from keras_moe.hierarchical_moe_layer import HierarchicalMoeLayer
from keras_moe.moe_layer import MoeLayer

EXPERT = "{expert}"


@dataclasses.dataclass(frozen=True)
class Tensor:
    """A tensor of another package, made of our weights.

    Attributes:
        name: string; with `{expert}` there is one for each expert.
        paths: of our weights, below the layer, whose last axes it joins.
        transposed: whether its last two axes are the other way round, as in
            PyTorch's linear layers.
        levels: how its axis of experts is cut in two, or `None`.
    """

    name: str
    paths: tuple
    transposed: bool = False
    levels: tuple | None = None

    def names(self, weights):
        if EXPERT not in self.name:
            return [self.name]
        experts = weights[self.paths[0]].shape[0]
        return [self.name.replace(EXPERT, str(i)) for i in range(experts)]

    def shape(self, weights):
        *shape, last = weights[self.paths[0]].shape
        shape = [*shape, last * len(self.paths)]
        if self.transposed:
            shape[-2:] = shape[:-3:-1]
        if self.levels:
            shape[:1] = self.levels
        return tuple(shape[1:] if EXPERT in self.name else shape)

    def give(self, weights):
        """Ours to theirs: a dict by name."""
        whole = np.concatenate([_numpy(weights[path]) for path in self.paths], axis=-1)
        if self.transposed:
            whole = np.swapaxes(whole, -1, -2)
        if EXPERT in self.name:
            return dict(zip(self.names(weights), whole, strict=True))
        return {self.name: whole.reshape(self.shape(weights))}

    def take(self, tensors, weights):
        """Theirs to ours: a dict by path."""
        parts = [_numpy(tensors[name]) for name in self.names(weights)]
        whole = np.stack(parts) if EXPERT in self.name else parts[0]
        if self.levels:
            whole = whole.reshape(-1, *whole.shape[2:])
        if self.transposed:
            whole = np.swapaxes(whole, -1, -2)
        parts = np.split(whole, len(self.paths), axis=-1)
        return dict(zip(self.paths, parts, strict=True))


# Our weights, below the layer

ROUTER = "router/router_weights/kernel"
GATE, INNER, OUTPUT = (
    f"experts/{name}/kernel" for name in ("gate", "intermediate", "output")
)
SHARED_GATE, SHARED_INNER, SHARED_OUTPUT = (
    f"backbone/{name}/kernel" for name in ("gate", "intermediate", "output")
)


def _linear(name, *paths):
    return Tensor(name, paths, transposed=True)


def _experts_of_modules():
    """As the modules of transformers 5 hold them: all experts in one."""
    return [
        _linear("experts.gate_up_proj", GATE, INNER),
        _linear("experts.down_proj", OUTPUT),
    ]


def _experts_of_files(gate="gate_proj", inner="up_proj", output="down_proj"):
    """As files hold them: one by one."""
    names = {gate: GATE, inner: INNER, output: OUTPUT}
    return [_linear(f"experts.{EXPERT}.{n}.weight", p) for n, p in names.items()]


def _shared(name):
    return [
        _linear(f"{name}.gate_proj.weight", SHARED_GATE),
        _linear(f"{name}.up_proj.weight", SHARED_INNER),
        _linear(f"{name}.down_proj.weight", SHARED_OUTPUT),
    ]


def _of_transformers(*others, **names):
    """Both layouts, that of files first."""
    gate = _linear("gate.weight", ROUTER)
    return [
        [gate, *_experts_of_files(**names), *others],
        [gate, *_experts_of_modules(), *others],
    ]


def _of_keras_hub(*experts, shared=False):
    hub = [
        Tensor("sparse_feedforward_gate_dense/kernel", (ROUTER,)),
        *experts,
        Tensor("experts/expert_feedforward_output_dense", (OUTPUT,)),
    ]
    if shared:
        names = {"gate": SHARED_GATE, "intermediate": SHARED_INNER}
        names |= {"output": SHARED_OUTPUT}
        prefix = "shared_expert_dense/feedforward"
        hub += [Tensor(f"{prefix}_{n}_dense/kernel", (p,)) for n, p in names.items()]
        hub += [Tensor("shared_expert_gate_dense/kernel", ("backbone_gate/kernel",))]
    return [hub]


_GATE_AND_INNER = Tensor("experts/expert_feedforward_gate_dense", (GATE, INNER))


def _of_lucidrains(weights):
    if "inner/router_weights/kernel" not in weights:
        gates, levels = {"gate": "router"}, None
    else:
        gates = {"gate_outer": "outer", "gate_inner": "inner"}
        outer, _, inner = weights["inner/router_weights/kernel"].shape
        levels = (outer, inner)
    return [
        [
            *(
                Tensor(f"{theirs}.w_gating", (f"{ours}/router_weights/kernel",))
                for theirs, ours in gates.items()
            ),
            Tensor("experts.w1", (INNER,), levels=levels),
            Tensor("experts.w2", (OUTPUT,), levels=levels),
        ]
    ]


def _of_tfm(weights):
    """The same names, but for what lies within a layer with a backbone."""
    outside = any(path.startswith("backbone/") for path in weights)
    return [
        [
            Tensor(
                f"moe/{path}" if outside and "backbone" not in path else path, (path,)
            )
            for path in weights
        ]
    ]


# By name: layouts, the first of which is that of files. What depends on the
# layer is a function of its weights.
FORMATS = {
    "mixtral": _of_transformers(gate="w1", inner="w3", output="w2"),
    "qwen2_moe": _of_transformers(
        *_shared("shared_expert"),
        _linear("shared_expert_gate.weight", "backbone_gate/kernel"),
    ),
    "qwen3_moe": _of_transformers(),
    "olmoe": _of_transformers(),
    "deepseek_v3": _of_transformers(
        Tensor("gate.e_score_correction_bias", ("router/expert_bias",)),
        *_shared("shared_experts"),
    ),
    "switch": [
        [
            _linear("router.classifier.weight", ROUTER),
            _linear(f"experts.expert_{EXPERT}.wi.weight", INNER),
            _linear(f"experts.expert_{EXPERT}.wo.weight", OUTPUT),
        ]
    ],
    "keras_hub_mixtral": _of_keras_hub(
        Tensor("experts/expert_feedforward_gate_dense", (GATE,)),
        Tensor("experts/expert_feedforward_intermediate_dense", (INNER,)),
    ),
    "keras_hub_qwen_moe": _of_keras_hub(_GATE_AND_INNER, shared=True),
    "keras_hub_qwen3_moe": _of_keras_hub(_GATE_AND_INNER),
    "lucidrains": _of_lucidrains,
    "tfm": _of_tfm,
}


def load_weights(layer, source, format, *, prefix=""):
    """Gives a layer the weights of another package's.

    All names and shapes are checked before anything is changed.

    Args:
        layer: a built `MoeLayer`, `MoeLayerWithBackbone` or
            `HierarchicalMoeLayer`.
        source: a dict of arrays or tensors by name; a PyTorch module; a layer
            of Keras or tf-keras; or the path of a safetensors file or of a
            folder of them, of which only this layer's tensors are read.
        format: one of `keras_moe.convert.FORMATS`.
        prefix: what the names begin with, such as `"model.layers.3.mlp."`.

    Raises:
        ValueError: if the layer has other weights than the format, or if
            tensors are missing, have another shape, or would be left over.
    """
    weights = _weights(layer)
    layouts = _layouts(format, weights)
    with _tensors_of(source) as tensors:
        tensors = {
            name.removeprefix(prefix): tensor
            for name, tensor in tensors.items()
            if name.startswith(prefix)
        }
        layout = max(
            layouts,
            key=lambda layout: sum(
                name in tensors for part in layout for name in part.names(weights)
            ),
        )
        _check_tensors(tensors, layout, weights, prefix)
        for part in layout:
            for path, value in part.take(tensors, weights).items():
                weights[path].assign(value)


def to_tensors(layer, format, *, prefix="", stacked=False):
    """A layer's weights as another package has them.

    Args:
        layer: as for `load_weights`.
        format: one of `keras_moe.convert.FORMATS`.
        prefix: what the names are to begin with.
        stacked: bool. Formats of transformers: whether all experts are in one
            tensor, as in its modules, or each by itself, as in files.

    Returns:
        A dict of numpy arrays by name.

    Raises:
        ValueError: if the layer has other weights than the format.
    """
    weights = _weights(layer)
    layouts = _layouts(format, weights)
    layout = layouts[-1 if checks.boolean("stacked", stacked) else 0]
    return {
        prefix + name: array
        for part in layout
        for name, array in part.give(weights).items()
    }


def _weights(layer):
    """A layer's weights by path, the same whatever its parts are called."""
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
    return {
        f"{name}/{weight.path.removeprefix(part.path + '/')}": weight
        for name, part in parts.items()
        for weight in part.weights
    }


def _layouts(format, weights):
    """The layouts of a format, if it has a place for each of our weights."""
    layouts = FORMATS[checks.one_of("format", format, tuple(FORMATS))]
    if callable(layouts):
        layouts = layouts(weights)
    placed = {path for part in layouts[0] for path in part.paths}
    if placed != weights.keys():
        raise ValueError(
            f"The layer and the format {format!r} must have the same weights. Only "
            f"the layer has {sorted(weights.keys() - placed)}, only the format "
            f"{sorted(placed - weights.keys())}."
        )
    return layouts


def _check_tensors(tensors, layout, weights, prefix):
    expected = {
        name: part.shape(weights) for part in layout for name in part.names(weights)
    }
    problems = [f"{name} is missing" for name in sorted(expected.keys() - tensors)]
    problems += [f"{name} is left over" for name in sorted(tensors.keys() - expected)]
    for name in sorted(expected.keys() & tensors):
        found = tuple(tensors[name].shape)
        if found != expected[name]:
            problems.append(f"{name} has shape {found} instead of {expected[name]}")
    if problems:
        raise ValueError(
            f"The tensors do not fit the layer, which was not changed. With prefix "
            f"{prefix!r}: {'; '.join(problems)}."
        )


@contextlib.contextmanager
def _tensors_of(source):
    """A source as a dict by name, of what has a shape and becomes an array."""
    if isinstance(source, (str, os.PathLike)):
        with contextlib.ExitStack() as stack:
            yield _in_files(pathlib.Path(source), stack)
    elif isinstance(source, collections.abc.Mapping):
        yield source
    elif hasattr(source, "weights"):  # First: with PyTorch ours are modules too.
        yield {_below(source, weight): weight for weight in source.weights}
    elif hasattr(source, "state_dict"):
        yield source.state_dict()
    else:
        raise TypeError(
            "`source` must be a dict, a module, a layer or a path. "
            f"Received: {type(source).__name__}."
        )


def _below(layer, weight):
    # tf-keras has no paths, but names with an output's number.
    path = getattr(weight, "path", None) or weight.name.split(":")[0]
    return f"/{path}".partition(f"/{layer.name}/")[2] or path


def _in_files(path, stack):
    from safetensors import safe_open

    files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
    if not files:
        raise ValueError(f"There is no safetensors file in {path}.")
    result = {}
    for file in files:
        opened = stack.enter_context(safe_open(file, framework="numpy"))
        names = opened.keys()
        result |= {name: Stored(opened, name) for name in names}
    return result


class Stored:
    """A tensor in an open file, which is read when it becomes an array."""

    def __init__(self, file, name):
        self.file, self.name = file, name
        self.shape = tuple(file.get_slice(name).get_shape())

    def __array__(self, dtype=None, copy=None):
        return np.asarray(self.file.get_tensor(self.name), dtype=dtype)


def _numpy(tensor):
    if isinstance(tensor, keras.Variable):
        return keras.ops.convert_to_numpy(tensor)
    if hasattr(tensor, "detach"):  # PyTorch: numpy has no bfloat16 of its own.
        tensor = tensor.detach().cpu()
        tensor = tensor.float() if tensor.is_floating_point() else tensor
    return np.asarray(tensor)
