"""Parity with Hugging Face's Mixtral block on equal weights."""

import keras
import numpy as np
import torch
from gradients import gradients
from hugging import by_path, pair
from keras import ops
from weights import compare, compare_gradients


def test_outputs_and_gradients(rng):
    block, layer = pair(num_experts=8, hidden=12, d_ff=9, k=2)
    x = rng.normal(size=(3, 20, 12)).astype("float32")
    target = rng.normal(size=x.shape).astype("float32")

    theirs = torch.from_numpy(x).requires_grad_()
    outputs = block(theirs)
    (outputs - torch.from_numpy(target)).square().mean().backward()
    np.testing.assert_allclose(layer(x), outputs.detach(), atol=1e-5)

    weights = layer.trainable_variables

    def error(x, *values):
        with keras.StatelessScope(zip(weights, values, strict=True)):
            return ops.mean(ops.square(layer(x) - target))

    d_x, *d_weights = gradients(error, x, *(w.numpy() for w in weights))
    compare(d_x, theirs.grad.numpy())
    compare_gradients(layer, d_weights, by_path(block, lambda p: p.grad))
