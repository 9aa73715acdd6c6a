"""Extreme numbers: what is finite stays finite, what is not stays where it is."""

import functools

import keras
import numpy as np
import pytest
from keras import ops
from layer_check import functional
from samples import ROUTERS, E, F, H

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
BAD = 1, 3  # the example and the token that get a bad number


class Masks(MaskedRouter):
    """Returns dense arrays."""

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


def make_two_levels(factor=2.0):
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
    "masks": lambda factor=2.0: make_moe(Masks(E), factor),
    "soft": make_soft,
    "two levels": make_two_levels,
}
# Those that mix the tokens of a group.
MIX = "masks", "soft"
WITH_CAPACITY = sorted(set(LAYERS) - {"no capacity"})
# The others take their seconds in `make test-all`.
QUICK = "next best", "sigmoid", "soft"


def each(names):
    return pytest.mark.parametrize(
        "name",
        [
            name if name in QUICK else pytest.param(name, marks=pytest.mark.thorough)
            for name in names
        ],
    )


class Learner:
    """A layer's training step, compiled once, of weights and inputs as they come."""

    def __init__(self, layer, shape=(B, T, H)):
        self.layer = layer
        layer.build(shape)
        self.weights = [ops.convert_to_numpy(w) for w in layer.trainable_variables]
        self.of_all = gradient_of(functools.partial(self._loss, True))
        self.of_task = gradient_of(functools.partial(self._loss, False))

    def _loss(self, adds, weights, x, counted, mask):
        """The task's loss, of the tokens that count, and all else there is."""
        state = [v.value for v in self.layer.non_trainable_variables]
        outputs, state, losses = self.layer.stateless_call(
            weights, state, x, mask=mask, training=True, return_losses=True
        )
        loss = ops.mean(ops.abs(ops.where(counted, outputs, 0.0)))
        return loss + sum(losses) if adds else loss, (outputs, losses, state)

    def __call__(self, x, counted=None, mask=None, scale=1.0, bias=None):
        """Everything a step computes, as numpy arrays, by name.

        Args:
            x: `[B, T, H]`.
            counted: bool `[B, T, 1]`, which tokens the task's loss counts; the
                router's losses, which are means over all tokens, then do not.
            mask: the layer's mask.
            scale: by which the gates' kernels are multiplied.
            bias: of all experts in all gates; as it is by default.
        """
        weights = list(self.weights)
        for i, v in enumerate(self.layer.trainable_variables):
            if "router_weights/kernel" in v.path or v.name == "scale":
                weights[i] = weights[i] * np.float32(scale)
            if "router_weights/bias" in v.path and bias is not None:
                weights[i] = np.full_like(weights[i], bias)
        gradient = self.of_all if counted is None else self.of_task
        # Always there, as each absence would be compiled for itself.
        if counted is None:
            counted = np.ones((*x.shape[:-1], 1), bool)
        if mask is None:
            mask = np.ones(x.shape[:-1], bool)
        found = gradient(weights, x, counted, mask)
        (loss, (outputs, losses, state)), (of_weights, of_inputs) = found
        named = {
            f"gradient of {v.path}": g
            for v, g in zip(self.layer.trainable_variables, of_weights, strict=True)
        }
        named |= {
            v.path: s
            for v, s in zip(self.layer.non_trainable_variables, state, strict=True)
        }
        named |= {f"loss {i}": part for i, part in enumerate(losses)}
        named |= {"loss": loss, "outputs": outputs, "gradient of inputs": of_inputs}
        return {n: ops.convert_to_numpy(a) for n, a in named.items() if a is not None}


def gradient_of(function):
    """`function`'s value and its gradients by its first two arguments."""
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
def learner(name):
    keras.utils.set_random_seed(1)
    return Learner(LAYERS[name]())


def inputs(rng, *shape):
    return rng.normal(size=(*shape, H)).astype("float32")


def not_finite(found):
    return [name for name, array in found.items() if not np.isfinite(array).all()]


# Of a token, or of the gates: none is out of the reach of float32.
EXTREMES = {
    "as it is": {},
    "a token of 0": {"token": 0},
    "a large token": {"token": 1e30},
    "a large negative token": {"token": -1e30},
    "tokens of 1e30": {"token": 1e30, "everywhere": True},
    "tokens of 0": {"token": 0, "everywhere": True},
    "tokens of 1e-30": {"token": 1e-30, "everywhere": True},
    "sure gates": {"scale": 1e3},
    "very sure gates": {"scale": 1e6},
    "large tokens and sure gates": {"scale": 1e6, "token": 1e30},
    "sure of every expert": {"bias": 1e4},
    "no liking for any expert": {"bias": -40.0},
    "less": {"bias": -60.0},
    "hardly a number": {"bias": -95.0},
    "none": {"bias": -1e4},
}


@each(LAYERS)
def test_the_finite_stays_finite(name, rng):
    learn = learner(name)
    wrong = {}
    for what, change in EXTREMES.items():
        change = dict(change)
        x = inputs(rng, B, T)
        if "token" in change:
            where = ... if change.pop("everywhere", False) else BAD
            x[where] = change.pop("token")
        wrong[what] = not_finite(learn(x, **change))
    wrong = {what: names for what, names in wrong.items() if names}
    assert not wrong, wrong


@each(LAYERS)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_bad_token_spoils_nobody_else(name, bad, rng):
    x = inputs(rng, B, T)
    x[BAD] = bad
    counted = np.ones((B, T, 1), bool)
    counted[BAD[:1] if name in MIX else BAD] = False
    found = learner(name)(x, counted)
    for part in ("outputs", "gradient of inputs"):
        assert np.isfinite(np.where(counted, found[part], 0)).all(), part
    # Or it was not chosen.
    assert (
        not np.isfinite(found["outputs"][BAD]).any() or not found["outputs"][BAD].any()
    )
    assert np.isfinite(found["loss"])
    for path, value in found.items():
        # What decides about the tokens of the next step.
        assert not path.endswith("expert_bias") or np.isfinite(value).all()


@each(LAYERS)
def test_all_tokens_masked(name, rng):
    # Even of bad numbers.
    x = np.full((B, T, H), np.nan, "float32")
    found = learner(name)(x, mask=np.zeros((B, T), bool))
    assert not_finite(found) == []
    assert not found["outputs"].any() and not found["loss"]
    assert not found["gradient of inputs"].any()


@each(LAYERS)
@pytest.mark.parametrize(
    "shape", [(5, 1), pytest.param((1, 1), marks=pytest.mark.thorough)]
)
def test_one_token(name, shape, rng):
    learn = Learner(LAYERS[name](), (*shape, H))
    found = learn(inputs(rng, *shape))
    assert not_finite(found) == []
    assert found["outputs"].any()


@each(WITH_CAPACITY)
def test_one_slot(name, rng):
    learn = Learner(LAYERS[name](1e-6))
    wrong = {}
    for scale in (1.0, 1e6):
        found = learn(inputs(rng, B, T), scale=scale)
        wrong[scale] = not_finite(found)
        served = found["outputs"].any(axis=-1).sum(axis=-1)
        assert (served == T if name == "soft" else served <= E).all()
        assert (served >= 1).all()
    assert not any(wrong.values()), wrong


@each(LAYERS)
def test_float16_with_loss_scaling(name, rng, policy):
    """A step that overflows changes no weight; those after it train."""
    policy("mixed_float16")
    layer = LAYERS[name]()
    model = functional(layer, (T, H))
    model.compile(keras.optimizers.SGD(0.01, clipnorm=1.0), "mse")
    for weight in layer.trainable_weights:
        if "router_weights/kernel" in weight.path:
            weight.assign(weight * 1e6)
    assert isinstance(model.optimizer, keras.optimizers.LossScaleOptimizer)
    good = inputs(rng, B, T)
    # In float16 an infinity.
    bad = good.copy()
    bad[BAD] = 1e30
    before = [np.copy(w) for w in model.get_weights()]
    model.train_on_batch(bad, good)
    for weight, a, b in zip(model.weights, before, model.get_weights(), strict=True):
        assert np.isfinite(b).all(), weight.path
        assert not weight.trainable or (a == b).all(), weight.path
    # The scale is halved until the gradients, of 1e6 times the usual, fit.
    losses = [model.train_on_batch(good, good) for _ in range(6)]
    assert np.isfinite(losses).all()
    after = model.get_weights()
    assert all(np.isfinite(w).all() for w in after)
    changed = [not np.array_equal(a, b) for a, b in zip(before, after, strict=True)]
    assert any(changed)
