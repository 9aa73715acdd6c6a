"""Files written by earlier versions load, on every backend, with equal outputs.

`tests/data/0.1.0` was written on TensorFlow before the package had rooms: a model with
every layer, trained for two steps, and one with int8 experts. `every_layer_in_rooms` is
the same model, saved by the package in rooms, before layers kept what is frozen.
"""

import pathlib

import keras
import numpy as np
import pytest
from versions import needs_keras

import keras_moe

pytestmark = needs_keras((3, 15), "wrote the files")
DATA = pathlib.Path(__file__).parent / "data" / "0.1.0"


def load(name):
    assert keras_moe  # Its import registers the classes.
    expected = np.load(DATA / "expected.npz")
    model = keras.models.load_model(DATA / f"{name}.keras")
    found = model.predict(expected["x"], verbose=0)
    key = name.removesuffix("_in_rooms")
    np.testing.assert_allclose(found, expected[key], rtol=1e-5, atol=1e-5)
    return model, expected


@pytest.mark.parametrize("name", ["every_layer", "every_layer_in_rooms"])
def test_every_layer(name):
    """With the optimizer's state, and with the same losses and metrics."""
    model, expected = load(name)
    assert model.optimizer.iterations == 2
    x, y = expected["x"], np.zeros((5, 6, 2), "float32")
    logs = model.evaluate(x, y, batch_size=5, verbose=0, return_dict=True)
    # A metric that there was not then.
    names = [name for name in sorted(logs) if not name.endswith("max_load")]
    assert names == expected["log_names"].tolist()
    for name, before in zip(names, expected["log_values"], strict=True):
        if before == 0 and name.endswith("load_balancing_loss"):
            continue  # Of a router with a bias, which did not compute it then.
        np.testing.assert_allclose(logs[name], before, rtol=1e-4, atol=1e-6)
    model.fit(x, y, verbose=0)
    assert model.optimizer.iterations == 3


def test_quantized_experts():
    load("int8")


@pytest.mark.parametrize("name", ["int4", "int4_per_channel"])
def test_4_bit_experts_that_shared_scales(name):
    """They are quantized again, each alone: outputs differ by an error of 4 bits."""
    expected = np.load(DATA / "expected.npz")
    with pytest.warns(UserWarning, match="share scales in this file"):
        model = keras.models.load_model(DATA / f"{name}.keras")
    found = model.predict(expected["x"], verbose=0)
    error = np.abs(found - expected[name]).mean() / np.abs(expected[name]).mean()
    assert 0 < error < 0.15
    for weight in model.get_layer("moe").experts.weights:
        assert weight.shape[0] == 3
