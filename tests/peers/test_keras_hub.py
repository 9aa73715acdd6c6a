"""Parity with keras-hub's Qwen3-MoE block, which runs every expert on every token.

Its weights are ours: the kernels of gate and inner layer lie side by side.
"""

import keras
import numpy as np
import pytest
from gradients import gradients
from hub import load
from keras import ops

from keras_moe import presets

Qwen3SparseMoeBlock = load().Qwen3SparseMoeBlock
E, H, F, K = 16, 12, 9, 4


@pytest.fixture
def both():
    """The block, and our layer with its weights."""
    block = Qwen3SparseMoeBlock(H, F, E, K, True, router_aux_loss_coefficient=1.0)
    block.build((None, None, H))
    layer = presets.qwen3_moe(E, F, num_selected_experts=K, examples_per_group=None)
    layer.build((None, None, H))
    gate_and_inner = block.expert_bank.weights[0].numpy()
    gate, inner = np.split(gate_and_inner, 2, axis=-1)
    given = {
        "router/router_weights/kernel": block.weights[0].numpy(),
        "experts/gate/kernel": gate,
        "experts/intermediate/kernel": inner,
        "experts/output/kernel": block.expert_bank.weights[1].numpy(),
    }
    for weight in layer.trainable_weights:
        weight.assign(given[weight.path.split("/", 1)[1]])
    return block, layer


def test_outputs_and_the_balance_loss(both, rng):
    block, layer = both
    x = rng.normal(size=(3, 20, H)).astype("float32")
    expected, _ = block(x, training=True)
    outputs, rows = layer(x, training=True, return_routing=True)
    np.testing.assert_allclose(outputs, expected, atol=1e-5)
    np.testing.assert_allclose(layer.balance_loss(rows), block.losses[0], rtol=1e-5)


def test_gradients(both, rng):
    block, layer = both
    x = rng.normal(size=(3, 20, H)).astype("float32")
    target = ops.convert_to_tensor(rng.normal(size=x.shape).astype("float32"))

    def error(model, choose):
        def function(x, *weights):
            pairs = list(zip(model.trainable_variables, weights, strict=True))
            with keras.StatelessScope(pairs):
                return ops.mean(ops.square(choose(model(x)) - target))

        return gradients(function, x, *(w.numpy() for w in model.trainable_variables))

    theirs = error(block, lambda results: results[0])
    d_x, d_router, d_gate_and_inner, d_output = theirs
    ours = dict(
        zip(
            ["x", *(w.path.split("/", 1)[1] for w in layer.trainable_variables)],
            error(layer, lambda outputs: outputs),
            strict=True,
        )
    )
    d_gate, d_inner = np.split(d_gate_and_inner, 2, axis=-1)
    for name, expected in {
        "x": d_x,
        "router/router_weights/kernel": d_router,
        "experts/gate/kernel": d_gate,
        "experts/intermediate/kernel": d_inner,
        "experts/output/kernel": d_output,
    }.items():
        scale = np.abs(expected).max()
        np.testing.assert_allclose(ours[name], expected, atol=1e-5 * scale)
