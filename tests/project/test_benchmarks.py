"""Tests of the benchmark and its report."""

import importlib
import json
import pathlib

import keras
import numpy as np
import pytest

BENCHMARKS = pathlib.Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def scripts(monkeypatch):
    """Returns the modules `bench` and `report`, with small points to measure."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    bench, report = map(importlib.import_module, ("bench", "report"))

    def small(**kwargs):
        return bench.Point(**{"examples": 2, "length": 8, "width": 8, **kwargs})

    monkeypatch.setattr(bench, "BASE", small())
    parameters = {name: [small(group=1), small(group=2)] for name in bench.PARAMETERS}
    parameters["share"] = [small(k=1, share=0.5)]
    monkeypatch.setattr(bench, "PARAMETERS", parameters)
    monkeypatch.setattr(bench, "PARTS", [small()])
    monkeypatch.setattr(bench, "DECODING", [small(examples=1, length=1)])
    monkeypatch.setattr(
        bench, "demo", lambda: dict(zip(("dense", "MoE"), pair(small()), strict=True))
    )
    monkeypatch.setattr(bench, "peers", lambda: {"ours": lambda: pair(small())})
    measure = bench.measure
    monkeypatch.setattr(
        bench,
        "measure",
        lambda *args, **kwargs: measure(*args, **kwargs | {"rounds": 3}),
    )
    # It would change the memory of all tests.
    monkeypatch.setattr(bench.keras_moe, "keep_freed_memory", lambda: True)
    return bench, report


def pair(point):
    """Returns the same model twice, so that the difference is 0."""
    models = point.models()
    return models["capacity"], models["capacity"]


@pytest.mark.thorough
@pytest.mark.skipif(keras.backend.backend() != "torch", reason="no compilation")
def test_a_small_benchmark_and_its_report(scripts, tmp_path, monkeypatch):
    bench, report = scripts
    monkeypatch.setattr("sys.argv", ["bench", "--output", str(tmp_path)])
    bench.main()
    (file,) = tmp_path.glob("*.json")
    results = json.loads(file.read_text())
    assert len(results["base"]) >= 8
    assert results["peers"]["ours"]["difference"] == 0
    for timed in results["base"].values():
        assert np.all(np.array(timed["step"]["ms"]) > 0)
    monkeypatch.setattr("sys.argv", ["report", str(tmp_path)])
    report.main()
    tables = (tmp_path / "tables.md").read_text()
    for text in (
        "base point",
        "after `keep_freed_memory`",
        "routing, dispatch and combine",
        "The demo",
        "Other packages",
        "fraction of tokens",
        "Decoding",
    ):
        assert text in tables
    for name in ("base.png", "axes.png"):
        assert (tmp_path / name).stat().st_size > 10_000


def test_a_fraction_of_tokens_selects_one_expert(scripts):
    bench, _ = scripts
    point = bench.Point(examples=4, length=64, width=16, k=1, share=0.75)
    layer = point.tokens_choose(None)
    load = np.asarray(layer.route(point.inputs()).load)
    assert load.shape == (1, 8)
    assert load[0, 0] == pytest.approx(0.75, abs=0.06)
    assert load[0, 1:].max() < 0.1
