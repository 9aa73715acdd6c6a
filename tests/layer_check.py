"""What every layer must pass, on every backend."""

import contextlib
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
    check_fit(functional(make(), shape), x)
    check_xla(make, shape, x)
    check_policies(make, shape, x)


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
    """The model's outputs; op by op, JAX would compile each op."""
    if keras.backend.backend() == "jax":
        return model.predict_on_batch(x)
    return keras.ops.convert_to_numpy(model(x, training=False))


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


def check_fit(model, x):
    """`fit` changes every weight, with a last batch of one; `predict` works."""
    model.compile("sgd", "mse")
    size = len(x) - 1
    with changes_every_weight(model, x):
        history = model.fit(x, x[..., ::-1], batch_size=size, verbose=0).history
    assert all(np.isfinite(v).all() for v in history.values()), history
    assert np.isfinite(model.predict(x, batch_size=size, verbose=0)).all()


def check_step(model, x, **compile_arguments):
    """A step changes every weight that is trained."""
    model.compile("sgd", "mse", **compile_arguments)
    with changes_every_weight(model, x):
        logs = model.train_on_batch(x, x[..., ::-1], return_dict=True)
    assert np.isfinite(list(logs.values())).all(), logs


@contextlib.contextmanager
def changes_every_weight(model, x):
    """Builds the model; then every weight that is trained must change."""
    if not model.built:
        call(model, x)
    before = [np.copy(w) for w in model.get_weights()]
    yield
    after = model.get_weights()
    for weight, a, b in zip(model.weights, before, after, strict=True):
        assert np.isfinite(b).all(), weight.path
        if weight.trainable:
            assert (a != b).any(), f"{weight.path} was not trained"


def check_xla(make, shape, x):
    """A step compiled by XLA, where that is a choice."""
    if keras.backend.backend() == "tensorflow":
        check_step(functional(make(), shape), x, jit_compile=True)


def check_file(make, shape, path, batch=4):
    """A `.keras` file gives the same outputs, weights, and metrics."""
    x = np.random.default_rng(0).normal(size=(batch, *shape)).astype("float32")
    model = functional(make(), shape)
    model.compile(keras.optimizers.SGD(momentum=0.9), "mse")
    model.train_on_batch(x, x)
    model.save(path)
    loaded = keras.models.load_model(path)
    np.testing.assert_allclose(call(loaded, x), call(model, x), atol=1e-6)
    assert [w.path for w in loaded.weights] == [w.path for w in model.weights]
    again = model.test_on_batch(x, x, return_dict=True)
    assert loaded.test_on_batch(x, x, return_dict=True) == again
    assert np.isfinite(loaded.train_on_batch(x, x)).all()


def check_policies(make, shape, x):
    """Mixed precision gives nearly the same outputs, and trains."""
    full = functional(make(), shape)
    expected = call(full, x)
    for policy, tolerance in LOSSY.items():
        mixed = functional(make(dtype=policy), shape)
        assert mixed.output.dtype == policy.removeprefix("mixed_")
        mixed.set_weights(full.get_weights())
        close = np.abs(call(mixed, x).astype("float32") - expected)
        # Rounded inputs may send a token on the verge to another expert.
        assert (close <= tolerance * np.abs(expected).max()).mean() > 0.8
    check_step(functional(make(dtype="mixed_bfloat16"), shape), x)
    check_step(Subclassed(make(dtype="mixed_float16")), x)
