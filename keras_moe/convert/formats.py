"""Formats: the tensors of other packages' Mixture-of-Experts layers, as one table.

A format is a list of `TensorSpec`s, each of which maps a tensor to one weight of ours
or to several. Both directions of a conversion, and the checks of names and shapes,
follow from it.
"""

import dataclasses

import numpy as np

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
        levels: tuple, the two axes into which the expert axis is split, or `None`.
    """

    name: str
    paths: tuple
    transposed: bool = False
    levels: tuple | None = None

    def names(self, weights):
        """Returns the names of the tensors, one or one per expert."""
        if EXPERT not in self.name:
            return [self.name]
        experts = weights[self.paths[0]].shape[0]
        return [self.name.replace(EXPERT, str(i)) for i in range(experts)]

    def shape(self, weights):
        """Returns the shape of each tensor."""
        *shape, last = weights[self.paths[0]].shape
        shape = [*shape, last * len(self.paths)]
        if self.transposed:
            shape[-2:] = shape[:-3:-1]
        if self.levels:
            shape[:1] = self.levels
        return tuple(shape[1:] if EXPERT in self.name else shape)

    def export(self, weights):
        """Returns the tensors made of our weights: a dict by name."""
        whole = np.concatenate(
            [as_numpy(weights[path]) for path in self.paths], axis=-1
        )
        if self.transposed:
            whole = np.swapaxes(whole, -1, -2)
        if EXPERT in self.name:
            return dict(zip(self.names(weights), whole, strict=True))
        return {self.name: whole.reshape(self.shape(weights))}

    def load(self, tensors, weights):
        """Returns our weights made of the tensors: a dict by path."""
        parts = [as_numpy(tensors[name]) for name in self.names(weights)]
        whole = np.stack(parts) if EXPERT in self.name else parts[0]
        if self.levels:
            whole = whole.reshape(-1, *whole.shape[2:])
        if self.transposed:
            whole = np.swapaxes(whole, -1, -2)
        parts = np.split(whole, len(self.paths), axis=-1)
        return dict(zip(self.paths, parts, strict=True))


# The paths of our weights below the layer.

ROUTER = "router/router_weights/kernel"
GATE, INNER, OUTPUT = (
    f"experts/{name}/kernel" for name in ("gate", "intermediate", "output")
)
SHARED_GATE, SHARED_INNER, SHARED_OUTPUT = (
    f"backbone/{name}/kernel" for name in ("gate", "intermediate", "output")
)


def _linear(name, *paths):
    return TensorSpec(name, paths, transposed=True)


def _experts_of_modules():
    """The experts in modules of transformers 5: all in one tensor."""
    return [
        _linear("experts.gate_up_proj", GATE, INNER),
        _linear("experts.down_proj", OUTPUT),
    ]


def _experts_of_files(gate="gate_proj", inner="up_proj", output="down_proj"):
    """The experts in files of transformers: one tensor per expert."""
    names = {gate: GATE, inner: INNER, output: OUTPUT}
    return [_linear(f"experts.{EXPERT}.{n}.weight", p) for n, p in names.items()]


def _shared(name):
    return [
        _linear(f"{name}.gate_proj.weight", SHARED_GATE),
        _linear(f"{name}.up_proj.weight", SHARED_INNER),
        _linear(f"{name}.down_proj.weight", SHARED_OUTPUT),
    ]


def _of_transformers(*others, **names):
    """Both layouts: that of files, and that of modules."""
    gate = _linear("gate.weight", ROUTER)
    return [
        [gate, *_experts_of_files(**names), *others],
        [gate, *_experts_of_modules(), *others],
    ]


def _of_keras_hub(*experts, shared=False):
    hub = [
        TensorSpec("sparse_feedforward_gate_dense/kernel", (ROUTER,)),
        *experts,
        TensorSpec("experts/expert_feedforward_output_dense", (OUTPUT,)),
    ]
    if shared:
        names = {"gate": SHARED_GATE, "intermediate": SHARED_INNER}
        names |= {"output": SHARED_OUTPUT}
        prefix = "shared_expert_dense/feedforward"
        hub += [
            TensorSpec(f"{prefix}_{n}_dense/kernel", (p,)) for n, p in names.items()
        ]
        hub += [
            TensorSpec("shared_expert_gate_dense/kernel", ("backbone_gate/kernel",))
        ]
    return [hub]


_GATE_AND_INNER = TensorSpec("experts/expert_feedforward_gate_dense", (GATE, INNER))


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


# Each format has one or more layouts, that of files first. A format that depends on the
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
        TensorSpec("gate.e_score_correction_bias", ("router/expert_bias",)),
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
        TensorSpec("experts/expert_feedforward_gate_dense", (GATE,)),
        TensorSpec("experts/expert_feedforward_intermediate_dense", (INNER,)),
    ),
    "keras_hub_qwen_moe": _of_keras_hub(_GATE_AND_INNER, shared=True),
    "keras_hub_qwen3_moe": _of_keras_hub(_GATE_AND_INNER),
    "lucidrains": _of_lucidrains,
    "tfm": _of_tfm,
}
