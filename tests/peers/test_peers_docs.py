"""Examples in the documentation that need other packages."""

import sys
import types

import garden
import pytest
from snippets import ROOT, run_examples


@pytest.mark.parametrize(
    ("page", "count"),
    [("converting.md", 5), ("pretrained.md", 10), ("migrating-from-tfm.md", 2)],
)
def test_examples_with_other_packages(page, count, tmp_path, monkeypatch):
    nlp = types.SimpleNamespace(layers=garden.load())
    tfm = types.SimpleNamespace(nlp=nlp)
    monkeypatch.setitem(sys.modules, "tensorflow_models", tfm)
    monkeypatch.chdir(tmp_path)
    assert run_examples(ROOT / "docs" / page, "peers") == count
