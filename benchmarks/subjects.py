"""Models to measure: single layers of this package and of other packages."""

import dataclasses
import importlib.util
import pathlib
import sys
from collections.abc import Callable
from typing import NamedTuple

import keras
import numpy as np

import keras_moe

# Modules of the first folder pair layers of other packages with ours, with equal
# weights; the second contains the demo.
for folder in ("tests/peers", "examples"):
    sys.path.append(str(pathlib.Path(__file__).parents[1] / folder))

LENGTH = 512


class Subject(NamedTuple):
    """A model to measure, as two functions without arguments.

    Attributes:
        forward: function that computes the outputs of a batch.
        step: function that runs a training step.
    """

    forward: Callable
    step: Callable


@dataclasses.dataclass(frozen=True)
class Point:
    """The parameters of a measurement, and the models and inputs that they define.

    Attributes:
        experts: int, the number of experts.
        examples: int, the number of examples in a batch.
        group: int, the number of examples in a group; `None` for the whole batch.
        k: int, the number of experts per token.
        width: int, the hidden size `h`. The inner layer of an expert is four times as
            wide.
        share: float, the fraction of tokens that the router sends to the first expert
            (for `k = 1`); `None` for an untrained gate.
        length: int, the number of tokens per example.
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
        """The inner size of an expert."""
        return 4 * self.width

    def inputs(self):
        """Returns float32 inputs `[examples, length, width]`."""
        rng = np.random.default_rng(0)
        shape = (self.examples, self.length)
        x = rng.normal(size=(*shape, self.width)).astype("float32")
        if self.share is not None:
            selected = rng.integers(1, self.experts, size=shape)
            selected[rng.random(shape) < self.share] = 0
            x[..., : self.experts] += 10 * np.eye(self.experts)[selected]
        return x

    def dense(self):
        """Returns a dense layer with the same active FLOPs."""
        return keras_moe.FeedForward(self.k * self.d_ff)

    def tokens_choose(self, factor, experts=None, **arguments):
        """Returns a token-choice layer with this capacity factor.

        Args:
            factor: float, or `None`.
            experts: layer. Defaults to `None`, feed-forward experts.
            **arguments: forwarded to the router.
        """
        # With an identity kernel, the first features of a token are its router logits.
        kernel = None if self.share is None else "identity"
        router = keras_moe.MaskedRouter(
            self.experts,
            num_selected_experts=self.k,
            kernel_initializer=kernel,
            **arguments,
        )
        return self._layer(router, factor, experts)

    def experts_choose(self):
        """Returns an expert-choice layer with a capacity factor of `k`."""
        router = keras_moe.ExpertsChooseMaskedRouter(self.experts)
        return self._layer(router, float(self.k))

    def weights(self):
        """Returns a layer with the experts' weights that computes almost nothing."""
        return WeightsOnly(self._experts())

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
        """Returns the dense model and the MoE models with a capacity and dropless."""
        x = self.inputs()
        layers = {
            "dense": self.dense(),
            "capacity": self.tokens_choose(float(self.k)),
            "dropless": self.tokens_choose(None),
        }
        return {name: keras_subject(layer, x) for name, layer in layers.items()}

    def experts_alone(self):
        """Returns models of the experts, and of the update of their weights."""
        x = self.inputs()
        rows = np.repeat(x.reshape(-1, self.width), self.k, axis=0)
        subjects = {"updating the weights": keras_subject(self.weights(), x)}
        for kind in ("capacity", "dropless"):
            experts = ExpertsOnly(self._experts(), with_capacity=kind == "capacity")
            subjects[f"{kind}: experts"] = keras_subject(experts, rows)
        return subjects

    def without_experts(self):
        """Returns models of everything but the experts, and of no layer at all."""
        x = self.inputs()
        subjects = {"no layer": keras_subject(keras.layers.Identity(), x)}
        silent = {"export_metrics": False, "load_balancing_loss_weight": 0.0}
        for kind, factor in (("capacity", float(self.k)), ("dropless", None)):
            name = f"{kind}: routing, dispatch and combine"
            for end, options in (("", {}), (", no metrics and losses", silent)):
                identity = IdentityExperts(self.experts)
                rest = self.tokens_choose(factor, identity, **options)
                subjects[name + end] = keras_subject(rest, x)
        return subjects


class IdentityExperts(keras.layers.Layer):
    """Experts that return their inputs: only routing, dispatch and combine remain."""

    def __init__(self, num_experts):
        super().__init__()
        self.num_experts = num_experts

    def call(self, inputs, group_sizes=None):
        return inputs


class ExpertsOnly(keras.layers.Layer):
    """Experts without a router, applied to equal numbers of consecutive rows."""

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


class WeightsOnly(keras.layers.Layer):
    """The weights of experts, with a step that does little but update them."""

    def __init__(self, experts):
        super().__init__()
        self.experts = experts

    def build(self, input_shape):
        self.experts.build((1, self.experts.num_experts, None, input_shape[-1]))

    def call(self, inputs):
        total = sum(keras.ops.sum(w) for w in self.experts.trainable_variables)
        return inputs + 1e-9 * total


def keras_subject(layer, x, package=keras, jit_compile="auto"):
    """Creates the subject of a Keras layer.

    Args:
        layer: layer of `package`. If it returns several outputs, the first is used.
        x: numpy array, the inputs and the targets.
        package: module with the API of Keras. Defaults to `keras`.
        jit_compile: bool or `"auto"`, see `keras.Model.compile`.

    Returns:
        A `Subject`.
    """
    inputs = package.Input(x.shape[1:])
    outputs = layer(inputs)
    if isinstance(outputs, (tuple, list)):
        outputs = outputs[0]
    model = package.Model(inputs, outputs)
    model.compile(package.optimizers.SGD(1e-3), "mse", jit_compile=jit_compile)
    return Subject(
        lambda: model.predict_on_batch(x), lambda: model.train_on_batch(x, x)
    )


def demo():
    """Returns the two models of the demo, as a dict of subjects."""
    import char_lm

    text, _, alphabet = char_lm.read_text()
    batch = next(char_lm.batches(text, seed=0))
    subjects = {}
    for name, layer in (("dense", char_lm.dense_layer), ("MoE", char_lm.moe_layer)):
        model = char_lm.build_model(layer, len(alphabet))
        char_lm.compile_model(model)
        subjects[name] = Subject(
            lambda model=model: model.predict_on_batch(batch[0]),
            lambda model=model: model.train_on_batch(*batch),
        )
    return subjects


def torch_subject(module, x):
    """Creates the subject of a PyTorch module.

    Args:
        module: `torch.nn.Module` that returns outputs, or outputs and a loss.
        x: numpy array, the inputs and the targets.

    Returns:
        A `Subject`.
    """
    import torch

    x = torch.from_numpy(x)
    optimizer = torch.optim.SGD(module.parameters(), 1e-3)

    def outputs_and_loss():
        outputs = module(x)
        return outputs if isinstance(outputs, tuple) else (outputs, 0.0)

    def forward():
        with torch.no_grad():
            return outputs_and_loss()[0].numpy()

    def step():
        optimizer.zero_grad()
        outputs, loss = outputs_and_loss()
        (torch.nn.functional.mse_loss(outputs, x) + loss).backward()
        optimizer.step()

    return Subject(forward, step)


# Layers of other packages, and ours with the same weights


def peers():
    """Returns the comparisons with other packages that this backend allows.

    Returns:
        A dict of names to functions that create `(theirs, ours)`, two subjects with
        equal weights.
    """
    backend = keras.backend.backend()
    found = {}
    for experts in (8, 64):
        point = Point(experts=experts)
        if _is_installed("keras_hub"):
            name = f"keras-hub Qwen3SparseMoeBlock, {experts} experts"
            found[name] = lambda point=point: _keras_hub(point)
        if backend == "torch" and _is_installed("transformers"):
            # "eager" computes one expert at a time, which takes ten times as long with
            # 64 experts.
            names = ("eager", "grouped_mm") if experts == 8 else ("grouped_mm",)
            for implementation in names:
                name = f"HF MixtralSparseMoeBlock ({implementation}), {experts} experts"
                found[name] = lambda point=point, implementation=implementation: (
                    _transformers(point, implementation)
                )
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
    return [keras_subject(layer, point.inputs()) for layer in pair]


def _transformers(point, implementation):
    import hugging

    block, layer = hugging.pair(
        point.experts, point.width, point.d_ff, point.k, implementation
    )
    return torch_subject(block, point.inputs()), keras_subject(layer, point.inputs())


def _lucidrains(point):
    import lucidrains

    module, layer = lucidrains.pair(
        point.experts, point.width, point.d_ff, "all", train=2.0, evaluation=2.0
    )
    return torch_subject(module, point.inputs()), keras_subject(layer, point.inputs())


def _tfm(point):
    import garden
    import tf_keras

    theirs, ours = garden.pair(
        point.experts, point.width, point.d_ff, float(point.k), point.group
    )
    x = point.inputs()
    return keras_subject(theirs, x, package=tf_keras), keras_subject(ours, x)
