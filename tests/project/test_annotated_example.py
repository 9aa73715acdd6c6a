"""Runs the annotated example with few training steps and little validation text."""

import pathlib

import keras
import numpy as np
import pytest

FILE = (
    pathlib.Path(__file__).parents[2]
    / "examples"
    / "mixture_of_experts_language_model.py"
)


@pytest.mark.thorough
@pytest.mark.skipif(keras.backend.backend() != "jax", reason="the example uses JAX")
@pytest.mark.filterwarnings("ignore:.*has collapsed")  # Possible after few steps.
def test_the_annotated_example_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("KERAS_BACKEND", keras.backend.backend())
    source = FILE.read_text(encoding="utf-8")
    for old, new in (("steps = 1500", "steps = 10"), ("* 9 // 10", "* 99 // 100")):
        assert old in source
        source = source.replace(old, new)
    names = {}
    exec(compile(source, FILE, "exec"), names)
    x, _ = names["held_out"]
    expected = names["moe_model"].predict(x[:2], verbose=0)
    found = names["model"].predict(x[:2], verbose=0)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert "experts: 3," in capsys.readouterr().out
