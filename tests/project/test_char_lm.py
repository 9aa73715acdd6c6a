"""The demo: its text, its models, and the script from end to end."""

import importlib.util
import itertools
import pathlib

import keras
import numpy as np
import pytest
from keras import ops

import keras_moe

# `make demo` runs the script on TensorFlow.
pytestmark = pytest.mark.skipif(
    keras.backend.backend() != "jax", reason="one backend is enough"
)
SCRIPT = pathlib.Path(__file__).parents[2] / "examples" / "char_lm.py"
ALPHABET = 20


@pytest.fixture(scope="module")
def char_lm():
    """The script as a module, with models that are quick to build."""
    spec = importlib.util.spec_from_file_location("char_lm", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.BLOCKS, module.WIDTH, module.HEADS, module.D_FF = 2, 16, 2, 32
    return module


@pytest.fixture(scope="module")
def moe(char_lm):
    """An untrained MoE model."""
    keras.utils.set_random_seed(0)
    return char_lm.build_model(char_lm.moe_layer, ALPHABET)


def test_no_held_out_paragraph_is_in_the_training_text(char_lm):
    text, held_out, alphabet = char_lm.read_text()
    seen, unseen = ("".join(alphabet[x]).split("\n\n") for x in (text, held_out))
    assert not set(seen) & set(unseen)
    assert len(text) > 100_000
    assert len(held_out) / len(text) == pytest.approx(1 / 9, rel=0.1)


def test_batches_are_windows_of_the_text_and_their_next_characters(char_lm):
    text = np.arange(char_lm.LENGTH + 3, dtype="int32")
    starts = set()
    for x, y in itertools.islice(char_lm.batches(text, seed=0), 5):
        assert x.shape == (char_lm.BATCH, char_lm.LENGTH)
        np.testing.assert_array_equal(np.diff(x), 1)
        np.testing.assert_array_equal(y, x + 1)
        starts.update(x[:, 0].tolist())
    # Every window of the text.
    assert starts == {0, 1, 2}


def test_both_models_have_the_same_active_parameters_except_for_the_gates(char_lm, moe):
    dense = char_lm.build_model(char_lm.dense_layer, ALPHABET)
    layers = char_lm.moe_layers(moe)
    gates = sum(x.router.count_params() for x in layers)
    # Two experts have two output biases.
    biases = char_lm.BLOCKS * char_lm.WIDTH
    assert char_lm.active_parameters(dense) == dense.count_params()
    assert char_lm.active_parameters(moe) == dense.count_params() + gates + biases
    assert moe.count_params() > 3 * dense.count_params()


def test_bits_of_a_uniform_prediction(char_lm):
    logits = np.zeros((2, 3, 8), "float32")
    targets = np.arange(6, dtype="int32").reshape(2, 3)
    found = ops.convert_to_numpy(char_lm.bits(targets, logits))
    np.testing.assert_allclose(found, np.full((2, 3), 3.0), rtol=1e-6)


def change_before(char_lm, model, position):
    """The largest change of logits up to a position, if later characters change."""
    pair = np.random.default_rng(0).integers(ALPHABET, size=(1, char_lm.LENGTH))
    pair = pair.repeat(2, axis=0).astype("int32")
    pair[1, position + 1 :] = (pair[1, position + 1 :] + 1) % ALPHABET
    logits = model.predict(pair, verbose=0)
    assert np.abs(logits[0] - logits[1]).max() > 1e-2
    return np.abs(logits[0, : position + 1] - logits[1, : position + 1]).max()


@pytest.mark.parametrize("position", [20, 110])
def test_no_prediction_depends_on_a_later_character(position, char_lm, moe):
    assert change_before(char_lm, moe, position) < 1e-5


def test_with_expert_choice_predictions_depend_on_later_characters(char_lm):
    """The previous test finds it."""

    def expert_choice(name):
        random = {"kernel_initializer": "glorot_uniform"}
        return keras_moe.MoeLayer(
            keras_moe.FeedForwardExperts(8, 32, **random),
            keras_moe.ExpertsChooseMaskedRouter(8, **random),
            name=name,
        )

    keras.utils.set_random_seed(0)
    model = char_lm.build_model(expert_choice, ALPHABET)
    assert change_before(char_lm, model, 110) > 1e-3


def test_generation_samples_from_the_softmax(char_lm):
    class Coin:
        def predict_on_batch(self, characters):
            odds = np.log([3.0, 1.0]) * char_lm.TEMPERATURE
            return np.broadcast_to(odds, (*characters.shape, 2))

    prompt = np.zeros(char_lm.LENGTH, "int32")
    generated = char_lm.generate(Coin(), prompt, characters=2000, seed=0)
    assert generated.mean() == pytest.approx(0.25, abs=0.05)


def test_a_short_run(char_lm, monkeypatch, tmp_path, capfd):
    """Trains, saves, evaluates in a new process, generates and draws."""
    monkeypatch.setattr(char_lm, "BLOCKS", 1)
    char_lm.main(["--steps", "2", "--output", str(tmp_path / "demo")])
    output = capfd.readouterr().out
    assert "held-out bits per character" in output
    assert "block_0/expert_usage" in output
    assert "The result is the same as before saving" in output
    files = {x.name for x in (tmp_path / "demo").iterdir()}
    assert files == {"moe.keras", "char_lm.png"}
