import keras
import numpy as np
import oracle
import pytest
from gradients import gradients
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


def test_float32_under_mixed_precision(policy, rng):
    policy("mixed_bfloat16")
    gate = Gate(5)
    x = ops.cast(ops.convert_to_tensor(rng.normal(size=(2, 3, 4))), "bfloat16")
    assert keras.backend.standardize_dtype(gate(x).dtype) == "float32"
    assert gate.kernel.dtype == "float32"


def test_jitter_is_applied_only_in_training(rng):
    x = rng.normal(size=(2, 3, 4)).astype("float32")
    gate = Gate(5, jitter_noise=0.5, kernel_initializer="glorot_uniform")
    without_noise = ops.convert_to_numpy(gate(x))
    np.testing.assert_array_equal(ops.convert_to_numpy(gate(x)), without_noise)
    noisy = ops.convert_to_numpy(gate(x, training=True))
    assert (noisy != without_noise).all()
    assert (noisy != ops.convert_to_numpy(gate(x, training=True))).any()


def test_jitter_is_within_its_bounds():
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
        ({"mechanism": "unknown"}, ValueError),
        ({"mechanism": None}, TypeError),
        ({"noise_std": -1}, ValueError),
        ({"hidden_layers": 0}, ValueError),
        ({"hidden_layers": [8, 0]}, ValueError),
        ({"hidden_layers": "8"}, TypeError),
        ({"kernel_initializer": "unknown"}, ValueError),
    ],
)
def test_bad_arguments(arguments, error):
    with pytest.raises(error):
        Gate(**{"num_experts": 4, **arguments})


@pytest.mark.parametrize("hidden_layers", [7, [7, 5]])
def test_hidden_layers(hidden_layers, rng):
    x = rng.normal(size=(2, 3, 4)).astype("float32")
    gate = Gate(
        5, hidden_layers=hidden_layers, kernel_initializer="he_normal", name="gate"
    )
    probs = ops.convert_to_numpy(gate(x))
    weights = {w.path: w.numpy() for w in gate.weights}
    for i in range(len(gate.hidden_layers)):
        kernel, bias = (weights[f"gate/hidden_{i}/{n}"] for n in ("kernel", "bias"))
        x = np.maximum(x @ kernel + bias, 0)
    logits = x @ weights["gate/kernel"] + weights["gate/bias"]
    np.testing.assert_allclose(probs, oracle.softmax(logits), rtol=1e-4)


def test_sigmoid_is_computed_per_expert(rng):
    x = rng.normal(size=(2, 3, 4)).astype("float32")
    probs, logits = Gate(5, mechanism="sigmoid")(x, return_logits=True)
    expected = 1 / (1 + np.exp(-ops.convert_to_numpy(logits)))
    np.testing.assert_allclose(ops.convert_to_numpy(probs), expected, rtol=1e-5)


def test_gumbel_selects_the_best_and_samples_in_training():
    """Samples have the frequencies and the gradient of the softmax."""
    logits = np.log([[0.5, 0.3, 0.2]]).astype("float32")
    gate = Gate(3, mechanism="gumbel", kernel_initializer="identity", use_bias=False)
    x = np.repeat(logits, 4000, axis=0)
    without_noise = ops.convert_to_numpy(gate(x))
    np.testing.assert_allclose(without_noise[:, 0], 1.0, rtol=1e-6)
    samples = ops.convert_to_numpy(gate(x, training=True))
    np.testing.assert_allclose(samples.sum(-1), 1.0, rtol=1e-6)
    assert ((samples == 0) | (samples > 0.999)).all()
    np.testing.assert_allclose(samples.mean(0), [0.5, 0.3, 0.2], atol=0.03)

    def first(x):
        return ops.sum(gate(x)[:, 0])

    (found,) = gradients(first, logits)
    p = np.array([0.5, 0.3, 0.2])
    np.testing.assert_allclose(found[0], p[0] * (np.eye(3)[0] - p), rtol=1e-4)


def test_logit_noise_is_applied_only_in_training():
    gate = Gate(2, noise_std=3.0, kernel_initializer="zeros", mechanism="sigmoid")
    x = np.zeros((5000, 4), "float32")
    assert (ops.convert_to_numpy(gate(x)) == 0.5).all()
    probs, logits = gate(x, training=True, return_logits=True)
    probs = ops.convert_to_numpy(probs).astype("float64")
    assert np.std(np.log(probs / (1 - probs))) == pytest.approx(3.0, rel=0.05)
    assert (ops.convert_to_numpy(logits) == 0).all()


def test_config_holds_every_argument():
    gate = Gate(
        5,
        hidden_layers=(7, 6),
        mechanism="gumbel",
        noise_std=0.5,
        jitter_noise=0.25,
        use_bias=False,
        kernel_initializer="he_normal",
        bias_initializer="ones",
    )
    config = gate.get_config()
    copy = Gate.from_config(config)
    assert copy.get_config() == config
    assert copy.hidden_layers == [7, 6] and copy.mechanism == "gumbel"
    assert (copy.noise_std, copy.jitter_noise, copy.use_bias) == (0.5, 0.25, False)


def test_logits_of_a_symbolic_call():
    x = keras.Input((3, 4))
    model = keras.Model(x, Gate(5)(x, return_logits=True))
    probs, logits = model.predict(np.ones((2, 3, 4)), verbose=0)
    np.testing.assert_allclose(probs, oracle.softmax(logits), rtol=1e-5)
