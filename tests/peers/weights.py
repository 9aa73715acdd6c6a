"""Comparison of gradients of our weights and of theirs."""

import numpy as np


def compare_gradients(layer, found, expected):
    """Compares the gradients of all weights, with a tolerance of 1e-5 of the scale."""
    found = dict(zip(map(_path, layer.trainable_weights), found, strict=True))
    assert found.keys() == expected.keys()
    for path, gradient in found.items():
        compare(gradient, expected[path])


def compare(found, expected):
    np.testing.assert_allclose(found, expected, atol=1e-5 * np.abs(expected).max())


def _path(weight):
    return weight.path.split("/", 1)[1]
