"""Runs the fine-tuning example from end to end with small models."""

import importlib
import pathlib

import keras
import pytest

EXAMPLES = pathlib.Path(__file__).parents[2] / "examples"


@pytest.mark.thorough
@pytest.mark.skipif(keras.backend.backend() != "torch", reason="one backend is enough")
def test_a_short_run(monkeypatch, tmp_path, capfd):
    monkeypatch.syspath_prepend(EXAMPLES)
    char_lm, fine_tuning = map(importlib.import_module, ("char_lm", "fine_tuning"))
    for name, size in (("BLOCKS", 1), ("WIDTH", 16), ("HEADS", 2), ("D_FF", 32)):
        monkeypatch.setattr(char_lm, name, size)
    monkeypatch.setattr(fine_tuning, "PROGRAMS", ("textwrap",))
    monkeypatch.setattr(fine_tuning, "HELD_OUT_PROGRAMS", ("textwrap",))
    fine_tuning.main(["--base-steps", "2", "--steps", "2", "--output", str(tmp_path)])
    lines = capfd.readouterr().out.splitlines()
    memory = []
    for name in fine_tuning.WAYS:
        line = next(x for x in reversed(lines) if x.startswith(name))
        megabytes, _, trained, saved, merged = map(float, line[len(name) :].split())
        memory.append(megabytes)
        assert trained == pytest.approx(saved, abs=2e-3)  # rounded, and of batches
        assert merged == pytest.approx(saved, rel=0.1)
    assert memory == sorted(memory, reverse=True)
    assert (tmp_path / "fine_tuning.png").stat().st_size > 10_000
