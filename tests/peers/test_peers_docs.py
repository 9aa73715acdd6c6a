"""Examples of the documentation that need other packages."""

from test_docs import ROOT, run_examples


def test_examples_with_other_packages(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run_examples(ROOT / "docs" / "converting.md", "peers") == 4
