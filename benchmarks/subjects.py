"""What is measured: models of one layer, ours and those of other packages."""

import dataclasses
import importlib.util
import pathlib
import sys
from collections.abc import Callable
from typing import NamedTuple

import keras
import numpy as np

import keras_moe

# The other packages' layers with the weights of ours.
sys.path.append(str(pathlib.Path(__file__).parents[1] / "tests" / "peers"))

LENGTH = 512


class Subject(NamedTuple):
    """Two functions without arguments: outputs of a batch, and a training step."""

    forward: Callable
    step: Callable


@dataclasses.dataclass(frozen=True)
class Point:
    """Where a layer is measured.

    Attributes:
        experts: int.
        examples: int, of 512 tokens each.
        group: int, examples in a group; `None` for all.
        k: int, experts of a token.
        width: int, `h`; the experts' inner width is four times as large.
        share: float, the share of tokens that the gate sends to the first
            expert (`k = 1`); `None` for what an untrained gate does.
        length: int, tokens of an example.
    """

    experts: int = 8
    examples: int = 8
    group: int | None = None
    k: int = 2
    width: int = 256
    share: float | None = None
    length: int = LENGTH

    @property
    def d_ff(self):
        return 4 * self.width

    def inputs(self):
        """float32 `[examples, length, width]`."""
        rng = np.random.default_rng(0)
        shape = (self.examples, self.length)
        x = rng.normal(size=(*shape, self.width)).astype("float32")
        if self.share is not None:
            wanted = rng.integers(1, self.experts, size=shape)
            wanted[rng.random(shape) < self.share] = 0
            x[..., : self.experts] += 10 * np.eye(self.experts)[wanted]
        return x

    def dense(self):
        """A dense layer of as many active FLOPs: the limit."""
        return keras_moe.FeedForward(self.k * self.d_ff)

    def tokens_choose(self, factor, experts=None):
        # An identity as kernel reads the wanted expert off the input.
        kernel = None if self.share is None else "identity"
        router = keras_moe.MaskedRouter(
            self.experts, num_selected_experts=self.k, kernel_initializer=kernel
        )
        return self._layer(router, factor, experts)

    def experts_choose(self):
        router = keras_moe.ExpertsChooseMaskedRouter(self.experts)
        return self._layer(router, float(self.k))

    def weights(self):
        """What it takes to update the experts' weights, and no more."""
        return Weights(self._experts())

    def _experts(self):
        return keras_moe.FeedForwardExperts(self.experts, self.d_ff)

    def _layer(self, router, factor, experts=None):
        return keras_moe.MoeLayer(
            experts or self._experts(),
            router,
            train_capacity_factor=factor,
            eval_capacity_factor=factor,
            examples_per_group=self.group,
        )

    def models(self):
        """The three that every point has."""
        x = self.inputs()
        layers = {
            "dense": self.dense(),
            "capacity": self.tokens_choose(float(self.k)),
            "dropless": self.tokens_choose(None),
        }
        return {name: of_layer(layer, x) for name, layer in layers.items()}

    def parts(self):
        """What the three are made of, each trained alone."""
        x = self.inputs()
        rows = np.repeat(x.reshape(-1, self.width), self.k, axis=0)
        subjects = {"updating the weights": of_layer(self.weights(), x)}
        for kind, factor in (("capacity", float(self.k)), ("dropless", None)):
            experts = Experts(self._experts(), with_capacity=factor is not None)
            rest = self.tokens_choose(factor, NoExperts(self.experts))
            subjects[f"{kind}: experts"] = of_layer(experts, rows)
            subjects[f"{kind}: routing and moving"] = of_layer(rest, x)
        return subjects


class NoExperts(keras.layers.Layer):
    """Returns what it is given, so that routing and moving remain."""

    def __init__(self, num_experts):
        super().__init__()
        self.num_experts = num_experts

    def call(self, inputs, group_sizes=None):
        return inputs


class Experts(keras.layers.Layer):
    """Experts alone, on rows that lie in order, as many for each."""

    def __init__(self, experts, with_capacity):
        super().__init__()
        self.experts, self.with_capacity = experts, with_capacity

    def build(self, input_shape):
        self.experts.build((1, self.experts.num_experts, None, input_shape[-1]))

    def call(self, rows):
        shape, num_experts = keras.ops.shape(rows), self.experts.num_experts
        if self.with_capacity:
            buffers = keras.ops.reshape(rows, (1, num_experts, -1, shape[-1]))
            return keras.ops.reshape(self.experts(buffers), shape)
        sizes = keras.ops.full((num_experts,), shape[0] // num_experts, dtype="int32")
        return self.experts(rows, group_sizes=sizes)

    def compute_output_shape(self, input_shape):
        return input_shape


class Weights(keras.layers.Layer):
    """As many weights as some experts have, whose step does next to nothing else."""

    def __init__(self, experts):
        super().__init__()
        self.experts = experts

    def build(self, input_shape):
        self.experts.build((1, self.experts.num_experts, None, input_shape[-1]))

    def call(self, inputs):
        total = sum(keras.ops.sum(w) for w in self.experts.trainable_variables)
        return inputs + 1e-9 * total


def of_layer(layer, x, package=keras, jit_compile="auto"):
    """A layer in a model of Keras, or of another package with its API."""
    inputs = package.Input(x.shape[1:])
    outputs = layer(inputs)
    if isinstance(outputs, (tuple, list)):
        outputs = outputs[0]
    model = package.Model(inputs, outputs)
    model.compile(package.optimizers.SGD(1e-3), "mse", jit_compile=jit_compile)
    return Subject(
        lambda: model.predict_on_batch(x), lambda: model.train_on_batch(x, x)
    )


def of_module(module, x):
    """A module of PyTorch, whose second result, if any, is a loss."""
    import torch

    x = torch.from_numpy(x)
    optimizer = torch.optim.SGD(module.parameters(), 1e-3)

    def results():
        outputs = module(x)
        return outputs if isinstance(outputs, tuple) else (outputs, 0.0)

    def forward():
        with torch.no_grad():
            return results()[0].numpy()

    def step():
        optimizer.zero_grad()
        outputs, loss = results()
        (torch.nn.functional.mse_loss(outputs, x) + loss).backward()
        optimizer.step()

    return Subject(forward, step)


# Other packages' layers, and ours with the same weights


def peers():
    """For each backend's peers: name to `(theirs, ours)`, made when they are due."""
    backend = keras.backend.backend()
    found = {}
    for experts in (8, 64):
        point = Point(experts=experts)
        if _is_installed("keras_hub"):
            name = f"keras-hub Qwen3SparseMoeBlock, {experts} experts"
            found[name] = lambda point=point: _keras_hub(point)
        if backend == "torch" and _is_installed("transformers"):
            # One after the other, 64 experts take ten times as long.
            for how in ("eager", "grouped_mm") if experts == 8 else ("grouped_mm",):
                name = f"HF MixtralSparseMoeBlock ({how}), {experts} experts"
                found[name] = lambda point=point, how=how: _transformers(point, how)
        if backend == "torch" and _is_installed("mixture_of_experts"):
            name = f"lucidrains MoE, {experts} experts"
            found[name] = lambda point=point: _lucidrains(point)
    if backend == "tensorflow" and _is_installed("official"):
        for group, tokens in ((1, 512), (8, 4096)):
            point = Point(group=group)
            name = f"tfm MoeLayer, groups of {tokens}, 8 experts"
            found[name] = lambda point=point: _tfm(point)
    return found


def _is_installed(module):
    return importlib.util.find_spec(module) is not None


def _keras_hub(point):
    import hub

    pair = hub.pair(point.experts, point.width, point.d_ff, point.k)
    return [of_layer(layer, point.inputs()) for layer in pair]


def _transformers(point, implementation):
    import hugging

    block, layer = hugging.pair(
        point.experts, point.width, point.d_ff, point.k, implementation
    )
    return of_module(block, point.inputs()), of_layer(layer, point.inputs())


def _lucidrains(point):
    import lucidrains

    module, layer = lucidrains.pair(
        point.experts, point.width, point.d_ff, "all", train=2.0, evaluation=2.0
    )
    return of_module(module, point.inputs()), of_layer(layer, point.inputs())


def _tfm(point):
    import garden
    import tf_keras

    theirs, ours = garden.pair(
        point.experts, point.width, point.d_ff, float(point.k), point.group
    )
    x = point.inputs()
    return of_layer(theirs, x, package=tf_keras), of_layer(ours, x)
