import keras
import numpy as np
import oracle
import pytest
from keras import ops

from keras_moe import Gate


def test_probabilities(rng):
    x = rng.normal(size=(2, 3, 4)).astype("float32")
    gate = Gate(5, bias_initializer="ones", kernel_initializer="glorot_uniform")
    probs, logits = gate(x, return_logits=True)
    kernel, bias = gate.get_weights()
    expected = x @ kernel + bias
    np.testing.assert_allclose(ops.convert_to_numpy(logits), expected, rtol=1e-5)
    np.testing.assert_allclose(
        ops.convert_to_numpy(probs), oracle.softmax(expected), rtol=1e-5
    )


def test_no_bias():
    gate = Gate(5, use_bias=False)
    gate.build((None, 4))
    assert [w.name for w in gate.weights] == ["kernel"]


def test_float32_under_every_policy(policy, rng):
    policy("mixed_bfloat16")
    gate = Gate(5)
    x = ops.cast(ops.convert_to_tensor(rng.normal(size=(2, 3, 4))), "bfloat16")
    assert keras.backend.standardize_dtype(gate(x).dtype) == "float32"
    assert gate.kernel.dtype == "float32"


def test_noise_is_for_training(rng):
    x = rng.normal(size=(2, 3, 4)).astype("float32")
    gate = Gate(5, jitter_noise=0.5, kernel_initializer="glorot_uniform")
    still = ops.convert_to_numpy(gate(x))
    np.testing.assert_array_equal(ops.convert_to_numpy(gate(x)), still)
    noisy = ops.convert_to_numpy(gate(x, training=True))
    assert (noisy != still).all()
    assert (noisy != ops.convert_to_numpy(gate(x, training=True))).any()


def test_noise_stays_in_its_bounds():
    gate = Gate(1000, jitter_noise=0.25, kernel_initializer="ones")
    _, logits = gate(np.ones((100, 1), "float32"), training=True, return_logits=True)
    logits = ops.convert_to_numpy(logits)
    assert 0.75 <= logits.min() < 0.78
    assert 1.22 < logits.max() <= 1.25


def test_in_a_functional_model(tmp_path):
    inputs = keras.Input((None, 4))
    model = keras.Model(inputs, Gate(5, jitter_noise=0.1, name="gate")(inputs))
    assert model.output_shape == (None, None, 5)
    assert [w.path for w in model.weights] == ["gate/kernel", "gate/bias"]
    model.save(tmp_path / "gate.keras")
    loaded = keras.models.load_model(tmp_path / "gate.keras")
    x = np.ones((2, 3, 4), "float32")
    np.testing.assert_array_equal(
        model.predict(x, verbose=0), loaded.predict(x, verbose=0)
    )
    assert loaded.get_layer("gate").get_config() == model.get_layer("gate").get_config()


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({"num_experts": 0}, ValueError),
        ({"num_experts": 2.5}, TypeError),
        ({"jitter_noise": 1.0}, ValueError),
        ({"jitter_noise": -0.1}, ValueError),
        ({"use_bias": "yes"}, TypeError),
        ({"kernel_initializer": "unknown"}, ValueError),
    ],
)
def test_bad_arguments(arguments, error):
    with pytest.raises(error):
        Gate(**{"num_experts": 4, **arguments})
