"""The examples in the documentation run, and its links are valid."""

import ast
import re

import pytest
from snippets import ROOT, run_examples

TABLE_OF_TESTS = ROOT / "docs" / "where-layers-work.md"
FILES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md"))]
WITHOUT_EXAMPLES = {
    "CHANGELOG.md",
    "CONTRIBUTING.md",
    "SECURITY.md",
    "devices.md",
    "examples.md",
    "performance.md",
    "reference.md",
    "references.md",
    "tables.md",
    "versions.md",
    "where-layers-work.md",
}
PAPER = re.compile(r"https://(?:arxiv\.org/abs|doi\.org)/[\w./-]*\w")
FENCED = re.compile(r"^```.*?^```\n", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\(([^)#\s]*)(?:#([^)\s]*))?\)")

each_file = pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)


@each_file
def test_examples_run(file, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    count = run_examples(file)
    assert count or file.name in WITHOUT_EXAMPLES


@each_file
def test_links_are_valid(file):
    text = FENCED.sub("", file.read_text(encoding="utf-8"))
    for path, heading in LINK.findall(text):
        if path.startswith(("https:", "http:")):
            continue
        target = file.parent / path if path else file
        assert target.exists(), path
        if heading:
            assert heading in headings(target), f"{path}#{heading}"


def test_cited_papers_are_in_the_references():
    references = ROOT / "docs" / "references.md"
    code = [*(ROOT / "keras_moe").rglob("*.py"), *(ROOT / "examples").glob("*.py")]
    cited = {p for file in [*code, *FILES] if file != references for p in papers(file)}
    assert cited == set(papers(references))


def test_each_row_of_where_layers_work_has_a_test():
    text = TABLE_OF_TESTS.read_text(encoding="utf-8")
    rows = re.findall(r"^\| ([^|]*\w.*?) \|", text, re.MULTILINE)
    program = ast.parse((ROOT / "tests" / "test_where_layers_work.py").read_text())
    tests = [
        ast.get_docstring(node)
        for node in program.body
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")
    ]
    assert rows == list(dict.fromkeys(tests))


def papers(file):
    return PAPER.findall(file.read_text(encoding="utf-8"))


def headings(file):
    """Returns the anchors of the headings of a file."""
    text = FENCED.sub("", file.read_text(encoding="utf-8"))
    titles = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return [re.sub(r"[^\w -]", "", t).lower().replace(" ", "-") for t in titles]
