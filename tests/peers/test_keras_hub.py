"""Parity with keras-hub's Qwen3-MoE block, which runs every expert on every token."""

import hub
import keras
import numpy as np
import pytest
from gradients import gradients
from keras import ops
from weights import compare, compare_gradients

H = 12


@pytest.fixture
def pair():
    return hub.pair(num_experts=16, hidden=H, d_ff=9, k=4)


def test_outputs_and_the_balance_loss(pair, rng):
    block, layer = pair
    x = rng.normal(size=(3, 20, H)).astype("float32")
    expected, _ = block(x, training=True)
    outputs, rows = layer(x, training=True, return_routing=True)
    np.testing.assert_allclose(outputs, expected, atol=1e-5)
    np.testing.assert_allclose(layer.balance_loss(rows), block.losses[0], rtol=1e-5)


def test_gradients(pair, rng):
    block, layer = pair
    x = rng.normal(size=(3, 20, H)).astype("float32")
    target = ops.convert_to_tensor(rng.normal(size=x.shape).astype("float32"))

    def error_gradients(model, get_outputs):
        def error(x, *weights):
            pairs = list(zip(model.trainable_variables, weights, strict=True))
            with keras.StatelessScope(pairs):
                return ops.mean(ops.square(get_outputs(model(x)) - target))

        return gradients(error, x, *(w.numpy() for w in model.trainable_variables))

    expected_d_x, *expected_d_weights = error_gradients(
        block, lambda results: results[0]
    )
    d_x, *d_weights = error_gradients(layer, lambda outputs: outputs)
    compare(d_x, expected_d_x)
    compare_gradients(layer, d_weights, hub.by_path(expected_d_weights))
