"""Gradients of scalar functions, on any backend."""

import keras
import numpy as np


def gradients(function, *arrays):
    """Returns the gradients of the scalar `function(*arrays)` as numpy arrays."""
    name = keras.backend.backend()
    if name == "tensorflow":
        import tensorflow as tf

        inputs = [tf.convert_to_tensor(a) for a in arrays]
        with tf.GradientTape() as tape:
            tape.watch(inputs)
            result = function(*inputs)
        return [
            np.zeros(a.shape) if g is None else tf.convert_to_tensor(g).numpy()
            for a, g in zip(inputs, tape.gradient(result, inputs), strict=True)
        ]
    if name == "jax":
        import jax

        # One compilation of the function is faster than one of each op.
        gradient = jax.jit(jax.grad(function, argnums=tuple(range(len(arrays)))))
        found = gradient(*arrays)
        return [np.asarray(g) for g in found]
    import torch

    inputs = [torch.tensor(a, requires_grad=True) for a in arrays]
    function(*inputs).backward()
    return [np.zeros(a.shape) if a.grad is None else a.grad.numpy() for a in inputs]
