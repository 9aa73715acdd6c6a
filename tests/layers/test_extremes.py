"""Extreme values: results stay finite, and nonfinite tokens do not affect others."""

import functools

import keras
import numpy as np
import pytest
from keras import ops
from layer_check import functional
from samples import ROUTERS, E, F, H, inputs
from versions import logs_of_batch

from keras_moe import (
    FeedForwardExperts,
    HierarchicalMoeLayer,
    MaskedRouter,
    MoeLayer,
    RouterMask,
    SoftMoeLayer,
    Top2MaskedRouter,
)

B, T = 3, 8
POSITION = 1, 3  # the example and the token that are changed


class DenseRouter(MaskedRouter):
    """Returns the routing as a `RouterMask`."""

    def compute_routing(self, probs, expert_capacity, training=None):
        slots = super().compute_routing(probs, expert_capacity, training)
        return RouterMask(slots.dispatch_mask, slots.combine_array)

    def load_balancing_loss(self, routing):
        return ops.zeros(())


def make_experts():
    return FeedForwardExperts(E, F, kernel_initializer="he_normal")


def make_moe(router, factor=2.0):
    router.router_z_loss_weight = 0.1
    return MoeLayer(
        make_experts(),
        router,
        train_capacity_factor=factor,
        eval_capacity_factor=factor,
    )


def make_hierarchical(factor=2.0):
    return HierarchicalMoeLayer(
        make_experts(),
        Top2MaskedRouter(2, name="outer", router_z_loss_weight=0.1),
        Top2MaskedRouter(2, name="inner", router_z_loss_weight=0.1),
        train_capacity_factor=factor,
        eval_capacity_factor=factor,
        min_expert_capacity=1,
    )


def make_soft(factor=2.0):
    return SoftMoeLayer(make_experts(), slots_per_expert=int(max(factor, 1)))


LAYERS = {
    **{
        name: lambda factor=2.0, make=make: make_moe(make(), factor)
        for name, make in ROUTERS.items()
    },
    "sigmoid": lambda factor=2.0: make_moe(
        MaskedRouter(
            E, num_selected_experts=2, normalize_weights=True, mechanism="sigmoid"
        ),
        factor,
    ),
    "no capacity": lambda: make_moe(MaskedRouter(E, num_selected_experts=2), None),
    "masks": lambda factor=2.0: make_moe(DenseRouter(E), factor),
    "soft": make_soft,
    "two levels": make_hierarchical,
}
# Layers in which a token affects its whole group.
MIXING = "masks", "soft"
WITH_CAPACITY = sorted(set(LAYERS) - {"no capacity"})
# `make test` runs these layers, `make test-all` all layers.
QUICK = "next best", "sigmoid", "soft"


def each_layer(names):
    return pytest.mark.parametrize(
        "name",
        [
            name if name in QUICK else pytest.param(name, marks=pytest.mark.thorough)
            for name in names
        ],
    )


class TrainingStep:
    """A layer's training step as a function of weights and inputs, compiled once."""

    def __init__(self, layer, shape=(B, T, H)):
        self.layer = layer
        layer.build(shape)
        self.weights = [ops.convert_to_numpy(w) for w in layer.trainable_variables]
        self.gradients_of_all = gradient_of(functools.partial(self._loss, True))
        self.gradients_of_task = gradient_of(functools.partial(self._loss, False))

    def _loss(self, add_losses, weights, x, counted, mask):
        """Returns the loss over the counted tokens, and (outputs, losses, state)."""
        state = [v.value for v in self.layer.non_trainable_variables]
        outputs, state, losses = self.layer.stateless_call(
            weights, state, x, mask=mask, training=True, return_losses=True
        )
        loss = ops.mean(ops.abs(ops.where(counted, outputs, 0.0)))
        return loss + sum(losses) if add_losses else loss, (outputs, losses, state)

    def __call__(self, x, counted=None, mask=None, scale=1.0, bias=None):
        """Returns everything that a step computes, as a dict of numpy arrays.

        Args:
            x: `[B, T, H]`.
            counted: bool `[B, T, 1]`, the tokens that the task's loss includes. If
                given, the losses of the routers, which are means over all tokens,
                are not added.
            mask: the layer's mask.
            scale: factor of the gates' kernels.
            bias: bias of all experts in all gates; not changed by default.
        """
        weights = list(self.weights)
        for i, v in enumerate(self.layer.trainable_variables):
            if "router_weights/kernel" in v.path or v.name == "scale":
                weights[i] = weights[i] * np.float32(scale)
            if "router_weights/bias" in v.path and bias is not None:
                weights[i] = np.full_like(weights[i], bias)
        gradient = self.gradients_of_all if counted is None else self.gradients_of_task
        # Never `None`, for which another program would be compiled.
        if counted is None:
            counted = np.ones((*x.shape[:-1], 1), bool)
        if mask is None:
            mask = np.ones(x.shape[:-1], bool)
        found = gradient(weights, x, counted, mask)
        (loss, (outputs, losses, state)), (weight_gradients, input_gradient) = found
        results = {
            f"gradient of {v.path}": g
            for v, g in zip(
                self.layer.trainable_variables, weight_gradients, strict=True
            )
        }
        results |= {
            v.path: s
            for v, s in zip(self.layer.non_trainable_variables, state, strict=True)
        }
        results |= {f"loss {i}": part for i, part in enumerate(losses)}
        results |= {
            "loss": loss,
            "outputs": outputs,
            "gradient of inputs": input_gradient,
        }
        return {n: ops.convert_to_numpy(a) for n, a in results.items() if a is not None}


def gradient_of(function):
    """Returns a function for the value and the gradients by the first two arguments."""
    name = keras.backend.backend()
    if name == "jax":
        import jax

        return jax.jit(jax.value_and_grad(function, argnums=(0, 1), has_aux=True))

    def gradient(weights, x, *others):
        if name == "tensorflow":
            import tensorflow as tf

            weights, x = [tf.convert_to_tensor(w) for w in weights], tf.constant(x)
            with tf.GradientTape() as tape:
                tape.watch((weights, x))
                value = function(weights, x, *others)
            return value, tape.gradient(value[0], (weights, x))
        import torch

        weights = [torch.tensor(w, requires_grad=True) for w in weights]
        x = torch.tensor(x, requires_grad=True)
        value = function(weights, x, *others)
        value[0].backward()
        return value, ([w.grad for w in weights], x.grad)

    return gradient


@functools.cache
def training_step(name):
    keras.utils.set_random_seed(1)
    return TrainingStep(LAYERS[name]())


def nonfinite_parts(found):
    return [name for name, array in found.items() if not np.isfinite(array).all()]


# Changes of tokens or of the gates. All values are in the range of float32.
EXTREMES = {
    "no change": {},
    "a token of 0": {"token": 0},
    "a large token": {"token": 1e30},
    "a large negative token": {"token": -1e30},
    "tokens of 1e30": {"token": 1e30, "everywhere": True},
    "tokens of 0": {"token": 0, "everywhere": True},
    "tokens of 1e-30": {"token": 1e-30, "everywhere": True},
    "confident gates": {"scale": 1e3},
    "very confident gates": {"scale": 1e6},
    "a large token and very confident gates": {"scale": 1e6, "token": 1e30},
    "biases of 1e4": {"bias": 1e4},
    "biases of -40": {"bias": -40.0},
    "biases of -60": {"bias": -60.0},
    "biases of -95": {"bias": -95.0},
    "biases of -1e4": {"bias": -1e4},
}


@each_layer(LAYERS)
def test_extreme_values_give_finite_results(name, rng):
    step = training_step(name)
    nonfinite = {}
    for case, change in EXTREMES.items():
        change = dict(change)
        x = inputs(rng, B, T)
        if "token" in change:
            position = ... if change.pop("everywhere", False) else POSITION
            x[position] = change.pop("token")
        nonfinite[case] = nonfinite_parts(step(x, **change))
    nonfinite = {case: names for case, names in nonfinite.items() if names}
    assert not nonfinite, nonfinite


@each_layer(LAYERS)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_nonfinite_token_does_not_affect_others(name, value, rng):
    x = inputs(rng, B, T)
    x[POSITION] = value
    counted = np.ones((B, T, 1), bool)
    counted[POSITION[:1] if name in MIXING else POSITION] = False
    found = training_step(name)(x, counted)
    for part in ("outputs", "gradient of inputs"):
        assert np.isfinite(np.where(counted, found[part], 0)).all(), part
    # Its own output is nonfinite, or 0 if no expert selects it.
    assert (
        not np.isfinite(found["outputs"][POSITION]).any()
        or not found["outputs"][POSITION].any()
    )
    assert np.isfinite(found["loss"])
    for path, array in found.items():
        # This bias affects the routing of the next step.
        assert not path.endswith("expert_bias") or np.isfinite(array).all()


@each_layer(LAYERS)
def test_all_tokens_masked(name, rng):
    # Masked tokens may be nonfinite.
    x = np.full((B, T, H), np.nan, "float32")
    found = training_step(name)(x, mask=np.zeros((B, T), bool))
    assert nonfinite_parts(found) == []
    assert not found["outputs"].any() and not found["loss"]
    assert not found["gradient of inputs"].any()


@each_layer(LAYERS)
@pytest.mark.parametrize(
    "shape", [(5, 1), pytest.param((1, 1), marks=pytest.mark.thorough)]
)
def test_one_token(name, shape, rng):
    step = TrainingStep(LAYERS[name](), (*shape, H))
    found = step(inputs(rng, *shape))
    assert nonfinite_parts(found) == []
    assert found["outputs"].any()


@each_layer(WITH_CAPACITY)
def test_one_slot(name, rng):
    step = TrainingStep(LAYERS[name](1e-6))
    nonfinite = {}
    for scale in (1.0, 1e6):
        found = step(inputs(rng, B, T), scale=scale)
        nonfinite[scale] = nonfinite_parts(found)
        routed = found["outputs"].any(axis=-1).sum(axis=-1)
        assert (routed == T if name == "soft" else routed <= E).all()
        # An expert that a token has in turn may have a weight of 0.
        assert (routed >= 1).all() or (name == "round robin" and scale > 1)
    assert not any(nonfinite.values()), nonfinite


@each_layer(LAYERS)
def test_float16_with_loss_scaling(name, rng, policy):
    """A step that overflows changes no weight; later steps train."""
    policy("mixed_float16")
    layer = LAYERS[name]()
    model = functional(layer, (T, H))
    model.compile(keras.optimizers.SGD(0.01, clipnorm=1.0), "mse")
    for weight in layer.trainable_weights:
        if "router_weights/kernel" in weight.path:
            weight.assign(weight * 1e6)
    assert isinstance(model.optimizer, keras.optimizers.LossScaleOptimizer)
    x = inputs(rng, B, T)
    # Infinite in float16.
    overflowing = x.copy()
    overflowing[POSITION] = 1e30
    before = [np.copy(w) for w in model.get_weights()]
    model.train_on_batch(overflowing, x)
    for weight, a, b in zip(model.weights, before, model.get_weights(), strict=True):
        assert np.isfinite(b).all(), weight.path
        assert not weight.trainable or (a == b).all(), weight.path
    # The loss scale is halved until the gradients, about 1e6 times the usual, fit.
    logs = [logs_of_batch(model.train_on_batch, x, x) for _ in range(6)]
    assert all(np.isfinite(values["loss"]) for values in logs)
    after = model.get_weights()
    assert all(np.isfinite(w).all() for w in after)
    changed = [not np.array_equal(a, b) for a, b in zip(before, after, strict=True)]
    assert any(changed)
