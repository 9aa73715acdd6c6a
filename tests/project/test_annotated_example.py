"""The annotated example, with few steps and little text to measure them on."""

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
@pytest.mark.skipif(keras.backend.backend() != "jax", reason="its backend is JAX")
@pytest.mark.filterwarnings("ignore:.*has collapsed")  # After so few steps it may.
def test_it_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("KERAS_BACKEND", keras.backend.backend())
    source = FILE.read_text(encoding="utf-8")
    for there, here in (("steps = 1500", "steps = 10"), ("* 9 // 10", "* 99 // 100")):
        assert there in source
        source = source.replace(there, here)
    names = {}
    exec(compile(source, FILE, "exec"), names)
    x, _ = names["held_out"]
    expected = names["moe_model"].predict(x[:2], verbose=0)
    found = names["model"].predict(x[:2], verbose=0)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert "experts: 3," in capsys.readouterr().out
