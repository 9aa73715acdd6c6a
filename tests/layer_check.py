"""What every layer must pass, on every backend."""

import contextlib
import json

import keras
import numpy as np
from versions import logs_of_batch


def check_layer(make, shape, path, batch=4):
    """Checks a layer inside models: config, training, file, XLA, mixed precision.

    Args:
        make: function that returns a new layer, from `(batch, *shape)` to the same
            shape, for keyword arguments such as `dtype`.
        shape: shape of an input, without the batch axis.
        path: path of a `.keras` file to write.
        batch: int, the number of examples.
    """
    x = random_inputs(shape, batch)
    check_config(make)
    check_file(make, shape, path, batch)
    check_xla(make, shape, x)
    check_policies(make, shape, x)


def random_inputs(shape, batch=4):
    return np.random.default_rng(0).normal(size=(batch, *shape)).astype("float32")


def functional(layer, shape):
    inputs = keras.Input(shape)
    return keras.Model(inputs, layer(inputs))


class Subclassed(keras.Model):
    """A subclassed model without a `build`."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    # Without this argument, Keras does not train in training mode.
    def call(self, inputs, training=None):
        return self.layer(inputs, training=training)


def call(model, x):
    """Returns the model's outputs; on JAX compiled, which is faster than op by op."""
    if keras.backend.backend() == "jax":
        return model.predict_on_batch(x)
    return keras.ops.convert_to_numpy(model(x, training=False))


def check_config(make):
    """A copy from the config, through JSON, has the same config."""
    config = keras.saving.serialize_keras_object(make())
    copy = keras.saving.deserialize_keras_object(json.loads(json.dumps(config)))
    assert keras.saving.serialize_keras_object(copy) == config


def check_file(make, shape, path, batch=4):
    """`fit` trains every weight, and a `.keras` file restores all of the model."""
    x = random_inputs(shape, batch)
    model = functional(make(), shape)
    model.compile(keras.optimizers.SGD(0.1, momentum=0.9), "mse")
    assert model.compute_output_shape(x.shape) == x.shape
    with changes_every_weight(model, x):
        # The last batch has one example.
        history = model.fit(x, x[..., ::-1], batch_size=batch - 1, verbose=0).history
    assert all(np.isfinite(v).all() for v in history.values()), history
    model.save(path)
    loaded = keras.models.load_model(path)
    expected = call(model, x)
    assert expected.shape == x.shape
    np.testing.assert_allclose(call(loaded, x), expected, atol=1e-6)
    assert [w.path for w in loaded.weights] == [w.path for w in model.weights]
    again = logs_of_batch(model.test_on_batch, x, x)
    assert logs_of_batch(loaded.test_on_batch, x, x) == again
    assert np.isfinite(loaded.train_on_batch(x, x)).all()


def check_step(model, x, **compile_arguments):
    """A step changes every trainable weight."""
    # With the default rate, a step of a scale near 1 can be less than float32 resolves.
    model.compile(keras.optimizers.SGD(1.0), "mse", **compile_arguments)
    with changes_every_weight(model, x):
        logs = logs_of_batch(model.train_on_batch, x, x[..., ::-1])
    assert np.isfinite(list(logs.values())).all(), logs


@contextlib.contextmanager
def changes_every_weight(model, x):
    """Builds the model; then every trainable weight must change."""
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


def check_policies(make, shape, x):
    """Mixed precision gives nearly the same outputs, and trains."""
    full = functional(make(), shape)
    expected = call(full, x)
    mixed = functional(make(dtype="mixed_bfloat16"), shape)
    assert mixed.output.dtype == "bfloat16"
    mixed.set_weights(full.get_weights())
    close = np.abs(call(mixed, x).astype("float32") - expected)
    # Rounded inputs may change the expert of a token whose best two are close.
    assert (close <= 0.05 * np.abs(expected).max()).mean() > 0.8
    check_step(mixed, x)
    check_step(Subclassed(make(dtype="mixed_float16")), x)
