"""The demo: its text, its models' causality, and the script from end to end."""

import importlib.util
import itertools
import pathlib

import keras
import numpy as np
import pytest
from keras import ops

import keras_moe

SCRIPT = pathlib.Path(__file__).parents[1] / "examples" / "char_lm.py"
ALPHABET = 20


@pytest.fixture(scope="module")
def char_lm():
    """The script as a module, with models that are quick to build."""
    spec = importlib.util.spec_from_file_location("char_lm", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.BLOCKS, module.WIDTH, module.HEADS, module.D_FF = 2, 16, 2, 32
    # As many slots as tokens: the uneven choices of an untrained gate overflow.
    module.EVAL_CAPACITY = 1.0
    return module


@pytest.fixture(scope="module")
def moe(char_lm):
    """An untrained MoE model."""
    keras.utils.set_random_seed(0)
    return char_lm.build_model(char_lm.moe_layer, ALPHABET)


# Text


def test_no_held_out_paragraph_is_trained_on(char_lm):
    text, held_out, alphabet = char_lm.read_text()
    seen, unseen = ("".join(alphabet[x]).split("\n\n") for x in (text, held_out))
    assert not set(seen) & set(unseen)
    assert len(text) > 100_000
    assert len(held_out) / len(text) == pytest.approx(1 / 9, rel=0.1)


def test_batches_are_windows_of_the_text_and_what_follows(char_lm):
    text = np.arange(char_lm.LENGTH + 3, dtype="int32")
    starts = set()
    for x, y in itertools.islice(char_lm.batches(text, seed=0), 5):
        assert x.shape == (char_lm.BATCH, char_lm.LENGTH)
        np.testing.assert_array_equal(np.diff(x), 1)
        np.testing.assert_array_equal(y, x + 1)
        starts.update(x[:, 0].tolist())
    # Every window that there is, and none beyond.
    assert starts == {0, 1, 2}


def test_both_models_are_given_the_same_batches(char_lm):
    text, _, _ = char_lm.read_text()
    pairs = zip(char_lm.batches(text, 3), char_lm.batches(text, 3), strict=False)
    for one, other in itertools.islice(pairs, 3):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("more", [1, 1000])
def test_examples_are_the_text_in_whole_batches(char_lm, more):
    length = 2 * char_lm.BATCH * char_lm.LENGTH
    x, y = char_lm.examples(np.arange(length + more))
    assert x.shape == (2 * char_lm.BATCH, char_lm.LENGTH)
    np.testing.assert_array_equal(x.ravel(), np.arange(length))
    np.testing.assert_array_equal(y, x + 1)


# Models


def test_both_models_have_the_same_active_parameters_but_for_the_gates(char_lm, moe):
    dense = char_lm.build_model(char_lm.dense_layer, ALPHABET)
    gates = sum(x.router.count_params() for x in char_lm.moe_layers(moe))
    assert gates == char_lm.BLOCKS * (char_lm.WIDTH + 1) * char_lm.EXPERTS
    assert char_lm.active_parameters(dense) == dense.count_params()
    assert char_lm.active_parameters(moe) == dense.count_params() + gates
    assert moe.count_params() > 3 * dense.count_params()


def test_bits_are_those_of_a_fair_choice(char_lm):
    logits = np.zeros((2, 3, 8), "float32")
    targets = np.arange(6, dtype="int32").reshape(2, 3)
    found = ops.convert_to_numpy(char_lm.bits(targets, logits))
    np.testing.assert_allclose(found, np.full((2, 3), 3.0), rtol=1e-6)


POSITIONS = (20, 64, 110)


def later_characters_changed(length):
    """For each of the positions two examples, the same up to and with it.

    Returns `[positions, 2, length]`.
    """
    rng = np.random.default_rng(0)
    pairs = rng.integers(ALPHABET, size=(len(POSITIONS), 1, length)).repeat(2, axis=1)
    for pair, position in zip(pairs, POSITIONS, strict=True):
        pair[1, position + 1 :] += rng.integers(1, ALPHABET, size=length - position - 1)
    return (pairs % ALPHABET).astype("int32")


def changes_of_logits(model, pairs):
    """How much logits differ in each pair: up to and with the position, and after."""
    logits = model.predict(pairs.reshape(-1, pairs.shape[-1]), verbose=0)
    logits = logits.reshape(*pairs.shape, ALPHABET)
    changes = np.abs(logits[:, 0] - logits[:, 1]).max(axis=-1)
    return [
        (change[: position + 1].max(), change[position + 1 :].max())
        for change, position in zip(changes, POSITIONS, strict=True)
    ]


def dropped_tokens(char_lm, model, pairs):
    """For each MoE layer a bool in the shape of the pairs: tokens without a slot."""
    routings = char_lm.routings(model, pairs.reshape(-1, pairs.shape[-1]))
    slots = [ops.convert_to_numpy(x.slots_per_token) for x in routings.values()]
    return [x.reshape(pairs.shape) == 0 for x in slots]


def test_no_prediction_depends_on_a_later_character(char_lm, moe):
    pairs = later_characters_changed(char_lm.LENGTH)
    for dropped in dropped_tokens(char_lm, moe, pairs):
        for pair, position in zip(dropped, POSITIONS, strict=True):
            # In both examples of the pair a later token was dropped.
            assert pair[:, position + 1 :].any(axis=-1).all()
    for before, after in changes_of_logits(moe, pairs):
        assert before < 1e-5
        assert after > 1e-2


def test_a_prediction_can_depend_on_later_characters_if_experts_choose(char_lm):
    """What the test above finds none of, it finds where it is."""

    def experts_choose(name):
        return keras_moe.MoeLayer(
            keras_moe.FeedForwardExperts(8, 32, kernel_initializer="glorot_uniform"),
            keras_moe.ExpertsChooseMaskedRouter(8, kernel_initializer="glorot_uniform"),
            name=name,
        )

    keras.utils.set_random_seed(0)
    model = char_lm.build_model(experts_choose, ALPHABET)
    pairs = later_characters_changed(char_lm.LENGTH)
    for before, _ in changes_of_logits(model, pairs):
        assert before > 1e-3


def test_the_load_is_what_the_layers_see(char_lm, moe):
    characters = later_characters_changed(char_lm.LENGTH).reshape(-1, char_lm.LENGTH)
    load = {
        k: char_lm.expert_load(x) for k, x in char_lm.routings(moe, characters).items()
    }
    assert list(load) == ["block_0", "block_1"]
    assert [x.sum() for x in load.values()] == pytest.approx([1, 1])
    # Counted again at the first layer.
    layer = char_lm.moe_layers(moe)[0]
    x = keras.Model(moe.input, layer.input).predict(characters, verbose=0)
    wanted = ops.convert_to_numpy(layer.router.router_weights(x)).argmax(axis=-1)
    share = np.bincount(wanted.ravel(), minlength=char_lm.EXPERTS) / wanted.size
    np.testing.assert_allclose(load["block_0"], share, atol=1e-6)


# Writing


class NextLetter:
    """A model that is certain of the next character: the last one plus 1."""

    def __init__(self):
        self.seen = []

    def predict_on_batch(self, characters):
        self.seen.append(characters)
        return 1000 * np.eye(ALPHABET)[(characters + 1) % ALPHABET]


def test_generation_looks_at_the_last_characters_only(char_lm):
    model = NextLetter()
    prompt = np.arange(char_lm.LENGTH, dtype="int32") % ALPHABET
    written = char_lm.generate(model, prompt, characters=30, seed=0)
    text = np.arange(char_lm.LENGTH + 30) % ALPHABET
    np.testing.assert_array_equal(written, text[char_lm.LENGTH :])
    for i, window in enumerate(model.seen):
        np.testing.assert_array_equal(window, text[None, i : i + char_lm.LENGTH])


def test_generation_draws_from_the_softmax(char_lm):
    class Coin:
        def predict_on_batch(self, characters):
            odds = np.log([3.0, 1.0]) * char_lm.TEMPERATURE
            return np.broadcast_to(odds, (*characters.shape, 2))

    prompt = np.zeros(char_lm.LENGTH, "int32")
    written = char_lm.generate(Coin(), prompt, characters=2000, seed=0)
    assert written.mean() == pytest.approx(0.25, abs=0.05)
    again = char_lm.generate(Coin(), prompt, characters=2000, seed=0)
    np.testing.assert_array_equal(written, again)


# The script


def test_a_short_run(char_lm, monkeypatch, tmp_path, capfd):
    """Trains, saves, finds the same figure in a new process, writes and draws."""
    monkeypatch.setattr(char_lm, "BLOCKS", 1)
    char_lm.main(["--steps", "2", "--output", str(tmp_path / "demo")])
    output = capfd.readouterr().out
    assert "held-out bits per character" in output
    assert "block_0/expert_usage" in output
    assert "The figure is the same as before saving" in output
    files = {x.name for x in (tmp_path / "demo").iterdir()}
    assert files == {"moe.keras", "char_lm.png"}


def test_another_figure_after_loading_is_an_error(char_lm, monkeypatch):
    class Finished:
        stdout = "2.5000 bits per character of held-out text."

    monkeypatch.setattr(char_lm.subprocess, "run", lambda *_, **__: Finished())
    char_lm.evaluate_afresh("moe.keras", 0, expected=2.50004)
    with pytest.raises(SystemExit, match=r"2\.5000 bits after loading, 2\.6000"):
        char_lm.evaluate_afresh("moe.keras", 0, expected=2.6)
