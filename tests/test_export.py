"""Export to SavedModel and ONNX, and autoregressive decoding."""

import subprocess
import sys

import keras
import numpy as np
import pytest
from keras import ops

import keras_moe

E, F, H, T, ALPHABET = 4, 8, 6, 12, 11
BACKEND = keras.backend.backend()
FACTORS = [2.0, None]

# TensorFlow imports Keras if it is installed, so the program prevents this import.
SERVE = """
import sys
sys.modules["keras"] = sys.modules["keras_moe"] = None
import numpy as np
import tensorflow as tf
model = tf.saved_model.load(sys.argv[1])
data = np.load(sys.argv[2])
results = {name: model.serve(x).numpy() for name, x in data.items()}
np.savez(sys.argv[3], **results)
"""


plain_and_adapted = pytest.mark.parametrize("mode", [None, "int4"])


def make_model(factors=FACTORS, length=T, mode=None):
    """A model with a layer for each capacity factor, quantized and adapted or not."""
    inputs = keras.Input((length, H))
    x = inputs
    for i, factor in enumerate(factors):
        x = x + keras_moe.MoeLayer(
            keras_moe.FeedForwardExperts(E, F, kernel_initializer="he_normal"),
            keras_moe.MaskedRouter(
                E, num_selected_experts=2, kernel_initializer="he_normal"
            ),
            train_capacity_factor=factor,
            eval_capacity_factor=factor,
            examples_per_group=4.0 if length else 1.0,
            name=f"moe_{i}",
        )(x)
    model = keras.Model(inputs, x)
    if mode:
        keras_moe.quantize_experts(model, mode)
        for layer in model.layers:
            if isinstance(layer, keras_moe.MoeLayer):
                layer.enable_lora(2)
    return model


def check_served(model, data, folder):
    """A process without Keras computes the outputs of the model."""
    model.export(folder / "served", verbose=False)
    np.savez(folder / "data.npz", **data)
    command = [sys.executable, "-c", SERVE]
    files = [folder / name for name in ("served", "data.npz", "results.npz")]
    subprocess.run([*command, *map(str, files)], check=True)
    results = np.load(folder / "results.npz")
    for name, x in data.items():
        expected = model.predict_on_batch(x)
        np.testing.assert_allclose(results[name], expected, atol=1e-5)


@pytest.mark.thorough
@pytest.mark.skipif(BACKEND == "torch", reason="Keras exports no SavedModel on PyTorch")
@plain_and_adapted
def test_saved_model_of_any_batch_size(mode, rng, tmp_path):
    data = {
        f"of_{n}": rng.normal(size=(n, T, H)).astype("float32") for n in (1, 3, 4, 9)
    }
    check_served(make_model(mode=mode), data, tmp_path)


@pytest.mark.thorough
@pytest.mark.skipif(BACKEND != "tensorflow", reason="others need known lengths")
@plain_and_adapted
def test_saved_model_of_any_length(mode, rng, tmp_path):
    data = {f"of_{n}": rng.normal(size=(2, n, H)).astype("float32") for n in (1, 5, 30)}
    check_served(make_model(length=None, mode=mode), data, tmp_path)


@pytest.mark.thorough
@pytest.mark.skipif(BACKEND != "torch", reason="ONNX is exported on PyTorch only")
@plain_and_adapted
def test_onnx(mode, rng, tmp_path):
    import onnxruntime

    model = make_model([2.0, 2.0], mode=mode)
    if mode:  # Adapters are no parameters of a `torch.nn.Module` that is built.
        model.get_layer("moe_0").merge_lora()
        model.get_layer("moe_1").merge_lora()
    x = rng.normal(size=(4, T, H)).astype("float32")
    expected = model.predict_on_batch(x)
    file = str(tmp_path / "model.onnx")
    signature = [keras.InputSpec(shape=(4, T, H), dtype="float32")]
    model.export(file, format="onnx", input_signature=signature, verbose=False)
    session = onnxruntime.InferenceSession(file)
    (found,) = session.run(None, {session.get_inputs()[0].name: x})
    np.testing.assert_allclose(found, expected, atol=1e-5)


class CachedAttention(keras.layers.Layer):
    """Causal attention with a cache of the keys and values of `T` positions."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.project = keras.layers.Dense(3 * H)

    def build(self, inputs_shape, cache_shape, position_shape):
        self.project.build(inputs_shape)

    def call(self, inputs, cache, position):
        query, key, value = ops.split(self.project(inputs), 3, axis=-1)
        positions = ops.arange(T)
        # [b, t]: the positions of the inputs in the sequence.
        input_positions = position + ops.arange(inputs.shape[1])
        one_hot = ops.cast(input_positions[:, :, None] == positions, cache.dtype)
        cache = cache + ops.einsum(
            "bsh,bst->bth", ops.concatenate([key, value], axis=-1), one_hot
        )
        key, value = ops.split(cache, 2, axis=-1)
        scores = ops.einsum("bsh,bth->bst", query, key)
        is_earlier = positions <= input_positions[:, :, None]
        scores = ops.where(is_earlier, scores, -1e9)
        return ops.einsum("bst,bth->bsh", ops.softmax(scores), value), cache


class Recurrent(keras.layers.Layer):
    """A GRU, with its state in place of the cache."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.gru = keras.layers.GRU(H, return_sequences=True, return_state=True)

    def build(self, inputs_shape, state_shape, position_shape):
        self.gru.build(inputs_shape)

    def call(self, inputs, state, position):
        return self.gru(inputs, initial_state=state)


@pytest.mark.parametrize(
    ("mixer", "state_shape"),
    [(Recurrent, (H,)), (CachedAttention, (T, 2 * H))],
)
def test_autoregressive_decoding(mixer, state_shape, rng):
    """Decoding with a cache or a state gives the logits of the whole sequence."""
    embedding = keras.layers.Embedding(ALPHABET, H, embeddings_initializer="he_normal")
    mixer = mixer()
    moe = keras_moe.MoeLayer(
        keras_moe.FeedForwardExperts(E, F, kernel_initializer="he_normal"),
        keras_moe.MaskedRouter(
            E, num_selected_experts=2, kernel_initializer="he_normal"
        ),
        train_capacity_factor=2.0,
        eval_capacity_factor=None,
    )
    head = keras.layers.Dense(ALPHABET)

    def build(length):
        tokens = keras.Input((length,), dtype="int32")
        state = keras.Input(state_shape)
        position = keras.Input((1,), dtype="int32")
        x = embedding(tokens)
        mixed, new_state = mixer(x, state, position)
        x = x + mixed
        return keras.Model([tokens, state, position], [head(x + moe(x)), new_state])

    sequence = rng.integers(ALPHABET, size=(3, T)).astype("int32")
    start = np.zeros((3, *state_shape), "float32")
    first = np.zeros((3, 1), "int32")
    expected, _ = build(T).predict_on_batch([sequence, start, first])
    step, state = build(1), start
    for t in range(T):
        logits, state = step.predict_on_batch(
            [sequence[:, t : t + 1], state, first + t]
        )
        np.testing.assert_allclose(logits[:, 0], expected[:, t], atol=1e-5)
    assert np.argmax(expected, -1).std() > 0
    assert np.abs(expected[:, 0] - expected[:, 1]).max() > 1e-3
