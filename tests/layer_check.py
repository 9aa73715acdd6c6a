"""What every layer must pass, on every backend."""

import json

import keras
import numpy as np

LOSSY = {"mixed_bfloat16": 0.05, "mixed_float16": 0.01}


def check_layer(make, shape=(6, 8), batch=4):
    """Checks a layer inside a functional and a subclassed model.

    Args:
        make: a function that returns a new layer, `(batch, *shape)` to the
            same shape, for keyword arguments such as `dtype`.
        shape: of an input, without the batch axis.
        batch: examples.
    """
    x = np.random.default_rng(0).normal(size=(batch, *shape)).astype("float32")
    check_config(make, shape, x)
    # A batch of 3 and one of 1.
    check_fit(functional(make(), shape), x, batch_size=3)
    check_fit(Subclassed(make()), x)
    if keras.backend.backend() == "tensorflow":
        check_fit(functional(make(), shape), x, jit_compile=True)
    for policy, tolerance in LOSSY.items():
        check_policy(make, shape, x, policy, tolerance)


def functional(layer, shape):
    inputs = keras.Input(shape)
    return keras.Model(inputs, layer(inputs))


class Subclassed(keras.Model):
    """A subclassed model without a `build`."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def call(self, inputs):
        return self.layer(inputs)


def call(model, x):
    return model.predict(x, verbose=0)


def check_config(make, shape, x):
    """A copy from the config, through JSON, has the same config and outputs."""
    layer = make()
    config = keras.saving.serialize_keras_object(layer)
    copy = keras.saving.deserialize_keras_object(json.loads(json.dumps(config)))
    assert keras.saving.serialize_keras_object(copy) == config
    model, again = functional(layer, shape), functional(copy, shape)
    assert model.compute_output_shape(x.shape) == x.shape
    assert [w.path for w in copy.weights] == [w.path for w in layer.weights]
    assert [w.shape for w in copy.weights] == [w.shape for w in layer.weights]
    copy.set_weights(layer.get_weights())
    expected = call(model, x)
    assert expected.shape == x.shape
    np.testing.assert_allclose(call(again, x), expected, atol=1e-6)


def check_fit(model, x, batch_size=2, **compile_arguments):
    """A step changes every weight, and a file of the model gives it again."""
    model.compile("sgd", "mse", **compile_arguments)
    model(x[:1])
    before = [np.copy(w) for w in model.get_weights()]
    history = model.fit(x, x[..., ::-1], batch_size=batch_size, verbose=0).history
    assert all(np.isfinite(v).all() for v in history.values()), history
    after = model.get_weights()
    for weight, a, b in zip(model.weights, before, after, strict=True):
        assert np.isfinite(b).all(), weight.path
        if weight.trainable:
            assert (a != b).any(), f"{weight.path} was not trained"


def check_file(make, shape, path, batch=4):
    """A `.keras` file gives the same outputs, weights, and metrics."""
    x = np.random.default_rng(0).normal(size=(batch, *shape)).astype("float32")
    model = functional(make(), shape)
    model.compile("adam", "mse")
    model.fit(x, x, verbose=0)
    model.save(path)
    loaded = keras.models.load_model(path)
    np.testing.assert_allclose(call(loaded, x), call(model, x), atol=1e-6)
    assert [w.path for w in loaded.weights] == [w.path for w in model.weights]
    again = model.evaluate(x, x, return_dict=True, verbose=0)
    assert loaded.evaluate(x, x, return_dict=True, verbose=0) == again
    loaded.fit(x, x, verbose=0)


def check_policy(make, shape, x, policy, tolerance):
    """Mixed precision gives nearly the same outputs, and trains."""
    full, mixed = functional(make(), shape), functional(make(dtype=policy), shape)
    assert mixed.output.dtype == policy.removeprefix("mixed_")
    mixed.set_weights(full.get_weights())
    expected = call(full, x)
    close = np.abs(call(mixed, x).astype("float32") - expected)
    # Rounded inputs may send a token on the verge to another expert.
    assert (close <= tolerance * np.abs(expected).max()).mean() > 0.8
    check_fit(mixed, x)
