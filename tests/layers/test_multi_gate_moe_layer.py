import keras
import numpy as np
import oracle
import pytest
from keras import ops
from layer_check import call, changes_every_weight

from keras_moe import (
    FeedForward,
    FeedForwardExperts,
    HeterogeneousExperts,
    MultiGateMoeLayer,
)

E, H, F, TASKS = 4, 6, 10, 3


def make_layer(**kwargs):
    experts = FeedForwardExperts(
        E, F, kernel_initializer="he_normal", dtype=kwargs.get("dtype")
    )
    return MultiGateMoeLayer(experts, TASKS, kernel_initializer="he_normal", **kwargs)


def make_model(layer, shape=(H,)):
    inputs = keras.Input(shape)
    model = keras.Model(inputs, layer(inputs))
    model.compile("sgd", ["mse"] * TASKS)
    return model


@pytest.mark.parametrize("shape", [(7, H), (2, 5, H)])
def test_outputs_by_loops(shape, rng):
    x = rng.normal(size=shape).astype("float32")
    layer = make_layer()
    outputs = [ops.convert_to_numpy(y) for y in layer(x)]
    experts = [np.copy(w) for w in layer.experts.weights]
    assert len(outputs) == TASKS
    for gate, found in zip(layer.gates, outputs, strict=True):
        kernel, bias = (np.copy(w) for w in gate.weights)
        assert found.shape == shape
        for place in np.ndindex(*shape[:-1]):
            weights = oracle.softmax((x[place] @ kernel + bias)[None])[0]
            expected = sum(
                weights[i] * oracle.feed_forward(x[place], experts, i) for i in range(E)
            )
            np.testing.assert_allclose(found[place], expected, atol=1e-5)


def test_training_and_files(rng, tmp_path):
    x = rng.normal(size=(8, H)).astype("float32")
    model = make_model(make_layer(hidden_layers=[5], name="mixture"))
    assert [tuple(y.shape) for y in model.outputs] == [(None, H)] * TASKS
    with changes_every_weight(model, x):
        model.fit(x, [x] * TASKS, batch_size=3, verbose=0)
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    for a, b in zip(call(model, x), call(loaded, x), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)
    assert [w.path for w in loaded.weights] == [w.path for w in model.weights]
    clone = keras.models.clone_model(model)
    assert [w.shape for w in clone.weights] == [w.shape for w in model.weights]


def test_a_frozen_gate_stays_frozen(rng, tmp_path):
    x = rng.normal(size=(8, H)).astype("float32")
    layer = make_layer()
    model = make_model(layer)
    layer.gates[1].trainable = False
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    assert [g.trainable for g in loaded.layers[-1].gates] == [True, False, True]
    assert len(call(loaded, x)) == TASKS


def test_adapters_quantization_and_mixed_precision(rng):
    x = rng.normal(size=(8, H)).astype("float32")
    layer = make_layer()
    expected = [ops.convert_to_numpy(y) for y in layer(x)]
    layer.enable_lora(2)
    layer.quantize("int8")
    for found, y in zip(layer(x), expected, strict=True):
        found = ops.convert_to_numpy(found)
        np.testing.assert_allclose(found, y, atol=0.05 * np.abs(y).max())
    mixed = make_layer(dtype="mixed_bfloat16")(x)
    assert {keras.backend.standardize_dtype(y.dtype) for y in mixed} == {"bfloat16"}


def test_masked_tokens(rng):
    """They have no effect, not even as NaN, and each output has the mask."""
    x = rng.normal(size=(4, 5, H)).astype("float32")
    mask = rng.random((4, 5)) < 0.6
    layer = make_layer(use_bias=True)
    expected = [ops.convert_to_numpy(y) for y in layer(x)]
    x[~mask] = np.nan
    outputs = [ops.convert_to_numpy(y) for y in layer(x, mask=mask)]
    for found, y in zip(outputs, expected, strict=True):
        np.testing.assert_allclose(found[mask], y[mask], atol=1e-6)
        np.testing.assert_array_equal(found[~mask], 0)
    with pytest.raises(ValueError, match="mask"):
        layer(x, mask=mask[:, :3])
    tokens = keras.Input((5,), dtype="int32")
    embedded = keras.layers.Embedding(9, H, mask_zero=True)(tokens)
    model = keras.Model(tokens, make_layer()(embedded))
    model.compile("sgd", ["mse"] * TASKS)
    index = np.where(mask, 3, 0)
    targets = np.where(mask[..., None], call(model, index)[0], 1e6)
    losses = model.evaluate(index, [targets] * TASKS, verbose=0)
    assert losses[1] < 1e-5 and max(losses) < 100


def test_a_masked_token_that_is_not_finite_leaves_training_finite(rng):
    x = rng.normal(size=(4, 5, H)).astype("float32")
    mask = rng.random((4, 5)) < 0.6
    tokens, masks = keras.Input((5, H)), keras.Input((5,), dtype="bool")
    model = keras.Model([tokens, masks], make_layer()(tokens, mask=masks))
    model.compile("sgd", ["mse"] * TASKS)
    targets = [x] * TASKS
    model.fit([np.where(mask[..., None], x, np.inf), mask], targets, verbose=0)
    assert all(np.isfinite(np.copy(w)).all() for w in model.weights)


def test_different_experts(rng):
    x = rng.normal(size=(8, H)).astype("float32")
    experts = HeterogeneousExperts([keras.layers.Dense(H), FeedForward(F)])
    layer = MultiGateMoeLayer(experts, 2)
    a, b = layer(x)
    assert a.shape == b.shape == (8, H)


def test_bad_arguments():
    with pytest.raises(TypeError, match="experts"):
        MultiGateMoeLayer(keras.layers.Dense(3), 2)
    with pytest.raises(ValueError, match="num_tasks"):
        MultiGateMoeLayer(FeedForwardExperts(E, F), 0)
