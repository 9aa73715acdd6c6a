"""Rematerialization gives the same results with less memory."""

import keras
import numpy as np
import pytest
from keras import ops
from layer_check import functional

import keras_moe

E, F, H, T = 4, 8, 6, 10
# On PyTorch, `True` means `torch.compile`, which "auto" never selects.
JIT_COMPILE = (
    ["auto"]
    if keras.backend.backend() == "torch"
    else [
        "auto",
        pytest.param(True, marks=pytest.mark.thorough),
    ]
)
X = np.random.default_rng(0).normal(size=(4, T, H)).astype("float32")


def make_model(factor, **experts):
    keras.utils.set_random_seed(3)
    layer = keras_moe.MoeLayer(
        keras_moe.FeedForwardExperts(E, F, kernel_initializer="he_normal", **experts),
        keras_moe.MaskedRouter(E, load_balancing_loss_weight=0.1),
        train_capacity_factor=factor,
        eval_capacity_factor=factor,
    )
    return functional(layer, (T, H))


def train(factor, **experts):
    """Returns the losses of three steps, and the weights after them."""
    model = make_model(factor, **experts)
    model.compile(keras.optimizers.SGD(0.5), "mse")
    losses = [float(np.ravel(model.train_on_batch(X, 2 * X))[0]) for _ in range(3)]
    return losses, [ops.convert_to_numpy(w) for w in model.weights]


@pytest.mark.parametrize("factor", [2.0, None])
@pytest.mark.parametrize(
    "gated", [False, pytest.param(True, marks=pytest.mark.thorough)]
)
def test_training_gives_the_same_losses_and_weights(factor, gated):
    losses, weights = train(factor, gated=gated, remat=True)
    expected_losses, expected = train(factor, gated=gated)
    np.testing.assert_allclose(losses, expected_losses, rtol=1e-5)
    for found, weight in zip(weights, expected, strict=True):
        np.testing.assert_allclose(found, weight, atol=1e-5)


@pytest.mark.parametrize("factor", [2.0, None])
@pytest.mark.parametrize("jit_compile", JIT_COMPILE)
def test_recomputation_drops_the_same_units(factor, jit_compile):
    """If a network is linear in each kernel, kernel · gradient equals the loss.

    If the recomputation dropped other units, the product would equal the loss with
    these units dropped.
    """
    model = make_model(
        factor,
        activation="linear",
        use_bias=False,
        inner_dropout=0.5,
        output_dropout=0.5,
        remat=True,
    )
    model.compile(
        keras.optimizers.SGD(1.0),
        lambda _, outputs: ops.sum(outputs),
        jit_compile=jit_compile,
    )
    experts = model.layers[-1].experts
    model.layers[-1].router.load_balancing_loss_weight = 0.0
    before = [ops.convert_to_numpy(w).copy() for w in experts.weights]
    loss = float(np.ravel(model.train_on_batch(X, X))[0])
    assert abs(loss) > 0.1
    for weight, start in zip(experts.weights, before, strict=True):
        gradient = start - ops.convert_to_numpy(weight)
        assert np.sum(start * gradient) == pytest.approx(loss, rel=1e-3, abs=1e-3)
