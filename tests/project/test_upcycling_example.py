"""Runs the upcycling example from end to end with small models."""

import importlib
import pathlib

import keras
import pytest

EXAMPLES = pathlib.Path(__file__).parents[2] / "examples"


@pytest.mark.thorough
@pytest.mark.skipif(keras.backend.backend() != "torch", reason="one backend is enough")
def test_a_short_run(monkeypatch, tmp_path, capfd):
    monkeypatch.syspath_prepend(EXAMPLES)
    char_lm, upcycling = map(importlib.import_module, ("char_lm", "upcycling"))
    for name, size in (("BLOCKS", 1), ("WIDTH", 16), ("HEADS", 2), ("D_FF", 32)):
        monkeypatch.setattr(char_lm, name, size)
    upcycling.main(["--dense-steps", "2", "--steps", "2", "--output", str(tmp_path)])
    lines = capfd.readouterr().out.splitlines()
    dense, upcycled = (
        next(line.split() for line in reversed(lines) if line.startswith(name))
        for name in ("dense", "upcycled")
    )
    assert dense[3] == upcycled[3]  # bits per character before further training
    assert int(upcycled[1].replace(",", "")) > int(dense[1].replace(",", ""))
    assert (tmp_path / "upcycling.png").stat().st_size > 10_000
