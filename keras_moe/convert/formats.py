"""Formats: the tensors of other packages' Mixture-of-Experts layers, as tables.

A format is a list of `TensorSpec`s, each of which maps a tensor to one weight of ours
or to several. Both directions of a conversion, and the checks of names and shapes,
follow from it.
"""

import dataclasses

import keras
import ml_dtypes
import numpy as np

from keras_moe.convert.decoding import Compressed
from keras_moe.convert.sources import as_numpy

EXPERT = "{expert}"


@dataclasses.dataclass(frozen=True)
class TensorSpec:
    """A tensor of another package, as a function of our weights.

    Attributes:
        name: string. With `{expert}` in it there is one tensor for each expert.
        paths: tuple of the paths of our weights below the layer, which are
            concatenated along their last axis.
        transposed: bool, whether the last two axes are swapped, as in PyTorch's linear
            layers.
        interleaved: bool, whether the weights alternate along the last axis instead of
            being concatenated.
        inserted: tuple of the axes of size 1 that our weights do not have.
        dropped: tuple of the axes of size 1 that only our weights have.
        levels: tuple, the two axes into which the expert axis is split, or `None`.
        merged: bool, whether the expert axis and the next one are one.
        num_rows: int, the length to which the expert axis is padded with experts that
            are not used, or `None`.
        optional: bool, whether some layers of the format have no such tensor.
    """

    name: str
    paths: tuple
    transposed: bool = False
    interleaved: bool = False
    inserted: tuple = ()
    dropped: tuple = ()
    levels: tuple | None = None
    merged: bool = False
    num_rows: int | None = None
    optional: bool = False

    def names(self, weights):
        """Returns the names of the tensors, one or one per expert."""
        if EXPERT not in self.name:
            return [self.name]
        experts = weights[self.paths[0]].shape[0]
        return [self.name.replace(EXPERT, str(i)) for i in range(experts)]

    def padding_names(self, weights):
        """Returns the set of the names of tensors that are not used."""
        if EXPERT not in self.name or self.num_rows is None:
            return set()
        rows = range(len(self.names(weights)), self.num_rows)
        return {self.name.replace(EXPERT, str(i)) for i in rows}

    def shape(self, weights):
        """Returns the shape of each tensor."""
        shape = list(self._whole_shape(weights))
        shape = [n for i, n in enumerate(shape) if i not in self.dropped]
        for axis in self.inserted:
            shape.insert(axis, 1)
        if self.num_rows:
            shape[0] = self.num_rows
        if self.levels:
            shape[:1] = self.levels
        if self.merged:
            shape[:2] = [shape[0] * shape[1]]
        return tuple(shape[1:] if EXPERT in self.name else shape)

    def export(self, weights):
        """Returns the tensors made of our weights: a dict by name."""
        parts = [as_numpy(weights[path]) for path in self.paths]
        if self.interleaved:
            whole = np.stack(parts, axis=-1).reshape(*parts[0].shape[:-1], -1)
        else:
            whole = np.concatenate(parts, axis=-1)
        if self.transposed:
            whole = np.swapaxes(whole, -1, -2)
        if self.num_rows:
            rows = self.num_rows - len(whole)
            whole = np.pad(whole, [(0, rows), *[(0, 0)] * (whole.ndim - 1)])
        if EXPERT not in self.name:
            return {self.name: whole.reshape(self.shape(weights))}
        shape = self.shape(weights)
        return {
            self.name.replace(EXPERT, str(i)): one.reshape(shape)
            for i, one in enumerate(whole)
        }

    def read(self, tensors, weights, path):
        """Returns the array of one of our weights, in the dtype of the weight."""
        weight, part = weights[path], self.paths.index(path)
        if path.startswith("experts/"):
            return np.stack(list(self.read_experts(tensors, weights, path)))
        whole = as_numpy(tensors[self.name]).reshape(self._whole_shape(weights))
        return self._part(whole, part).astype(_numpy_dtype(weight))

    def read_experts(self, tensors, weights, path):
        """Yields the array of each expert of one of our weights."""
        dtype, part = _numpy_dtype(weights[path]), self.paths.index(path)
        shape = self._whole_shape(weights)[1:]
        for one in self._experts(tensors, weights):
            yield self._part(one.reshape(shape), part).astype(dtype)

    def _experts(self, tensors, weights):
        """Yields the tensor, or the part of the tensor, of each expert."""
        names = self.names(weights)
        if EXPERT in self.name:
            yield from (as_numpy(tensors[name]) for name in names)
            return
        whole, experts = tensors[self.name], weights[self.paths[0]].shape[0]
        if not isinstance(whole, Compressed):  # Which is decoded expert by expert.
            rows = self.num_rows or experts
            whole = as_numpy(whole).reshape(rows, *self._whole_shape(weights)[1:])
        yield from (whole[i] for i in range(experts))

    def _whole_shape(self, weights):
        """Returns the shape of our weights together, without changes of axes."""
        *shape, last = weights[self.paths[0]].shape
        shape = [*shape, last * len(self.paths)]
        if self.transposed:
            shape[-2:] = shape[:-3:-1]
        return tuple(shape)

    def _part(self, whole, part):
        whole = np.swapaxes(whole, -1, -2) if self.transposed else whole
        n = len(self.paths)
        return whole[..., part::n] if self.interleaved else np.split(whole, n, -1)[part]


def _numpy_dtype(weight):
    name = keras.backend.standardize_dtype(weight.dtype)
    return np.dtype(getattr(ml_dtypes, name, name))


# The paths of our weights below the layer.

ROUTER = "router/router_weights/kernel"
ROUTER_BIAS = "router/router_weights/bias"
EXPERT_BIAS = "router/expert_bias"
GATE, INNER, OUTPUT = (
    f"experts/{name}/kernel" for name in ("gate", "intermediate", "output")
)
GATE_BIAS, INNER_BIAS, OUTPUT_BIAS = (
    f"experts/{name}/bias" for name in ("gate", "intermediate", "output")
)
SHARED_GATE, SHARED_INNER, SHARED_OUTPUT = (
    f"backbone/{name}/kernel" for name in ("gate", "intermediate", "output")
)


def linear(name, *paths, **options):
    return TensorSpec(name, paths, transposed=True, **options)


def gpt_oss_experts(prefix):
    """The experts of GPT-OSS, whose tensors two packages have."""
    both, biases = (GATE, INNER), (GATE_BIAS, INNER_BIAS)
    return [
        TensorSpec(f"{prefix}gate_up_proj", both, interleaved=True),
        TensorSpec(
            f"{prefix}gate_up_proj_bias", biases, interleaved=True, dropped=(1,)
        ),
        TensorSpec(f"{prefix}down_proj", (OUTPUT,)),
        TensorSpec(f"{prefix}down_proj_bias", (OUTPUT_BIAS,), dropped=(1,)),
    ]


def _of_keras_hub(*experts, shared=False):
    hub = [
        TensorSpec("sparse_feedforward_gate_dense/kernel", (ROUTER,)),
        *experts,
        TensorSpec("experts/expert_feedforward_output_dense", (OUTPUT,)),
    ]
    if shared:
        hub += _hub_shared("shared_expert_dense", "shared_expert_gate_dense")
    return [hub]


def _hub_shared(shared, gate):
    names = {"gate": SHARED_GATE, "intermediate": SHARED_INNER, "output": SHARED_OUTPUT}
    return [
        *(
            TensorSpec(f"{shared}/feedforward_{name}_dense/kernel", (path,))
            for name, path in names.items()
        ),
        TensorSpec(f"{gate}/kernel", ("backbone_gate/kernel",)),
    ]


_GATE_AND_INNER = TensorSpec("experts/expert_feedforward_gate_dense", (GATE, INNER))
_OF_HUB_QWEN3_5 = [
    TensorSpec("router_gate/kernel", (ROUTER,)),
    _GATE_AND_INNER,
    TensorSpec("experts/expert_feedforward_output_dense", (OUTPUT,)),
    *_hub_shared("shared_expert", "shared_expert_gate"),
]
_OF_HUB_GPT_OSS = [
    TensorSpec("router/router_dense/kernel", (ROUTER,)),
    TensorSpec("router/router_dense/bias", (ROUTER_BIAS,)),
    *gpt_oss_experts("experts/"),
]
_OF_HUB_GEMMA4 = [
    TensorSpec("moe_router/proj/kernel", (ROUTER,)),
    TensorSpec("moe_router/per_dim_scale", ("router/router_weights/input_scale",)),
    TensorSpec("moe_expert_bank/gate_proj", (GATE,)),
    TensorSpec("moe_expert_bank/up_proj", (INNER,)),
    TensorSpec("moe_expert_bank/down_proj", (OUTPUT,)),
    TensorSpec("moe_expert_bank/per_expert_scale", ("router/expert_scale",)),
]


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
                TensorSpec(f"{theirs}.w_gating", (f"{ours}/router_weights/kernel",))
                for theirs, ours in gates.items()
            ),
            TensorSpec("experts.w1", (INNER,), levels=levels),
            TensorSpec("experts.w2", (OUTPUT,), levels=levels),
        ]
    ]


def _of_tfm(weights):
    """The same names, except for the prefix `moe/` inside a layer with a backbone."""
    outside = any(path.startswith("backbone/") for path in weights)
    return [
        [
            TensorSpec(
                f"moe/{path}" if outside and "backbone" not in path else path, (path,)
            )
            for path in weights
        ]
    ]


# Of packages other than transformers. Each format has one or more layouts. A format
# that depends on the layer is a function of its weights.
FORMATS = {
    "keras_hub_mixtral": _of_keras_hub(
        TensorSpec("experts/expert_feedforward_gate_dense", (GATE,)),
        TensorSpec("experts/expert_feedforward_intermediate_dense", (INNER,)),
    ),
    "keras_hub_qwen_moe": _of_keras_hub(_GATE_AND_INNER, shared=True),
    "keras_hub_qwen3_moe": _of_keras_hub(_GATE_AND_INNER),
    "keras_hub_qwen3_5_moe": [_OF_HUB_QWEN3_5],
    "keras_hub_gpt_oss": [_OF_HUB_GPT_OSS],
    "keras_hub_gemma4": [_OF_HUB_GEMMA4],
    "lucidrains": _of_lucidrains,
    "tfm": _of_tfm,
}
