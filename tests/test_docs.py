"""The documentation: its examples run, and its links lead somewhere."""

import contextlib
import io
import pathlib
import re

import keras
import pytest

ROOT = pathlib.Path(__file__).parents[1]
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
}
PAPER = re.compile(r"https://(?:arxiv\.org/abs|doi\.org)/[\w./-]*\w")
# A block fenced as "python no-run" is not run, one fenced as "python jax" on JAX
# only, one fenced as "python peers" by `tests/peers`. A block fenced as "text" that
# follows a run one is what that one prints.
EXAMPLE = re.compile(
    r"^```python(?: (?P<where>[\w-]+))?\n"
    r"(?P<code>.*?)^```\n(?:\n```text\n(?P<output>.*?)^```\n)?",
    re.MULTILINE | re.DOTALL,
)
FENCED = re.compile(r"^```.*?^```\n", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\(([^)#\s]*)(?:#([^)\s]*))?\)")

each_file = pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)


@each_file
def test_the_examples_run(file, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    count = run_examples(file)
    assert count or file.name in WITHOUT_EXAMPLES


def run_examples(file, *also):
    """Runs the examples of a file as one program; returns how many there are.

    Args:
        file: a path.
        *also: what may stand behind "python", besides the backend.
    """
    text = file.read_text(encoding="utf-8")
    names = {"__name__": "__main__"}
    where = (None, keras.backend.backend(), *also)
    examples = [x for x in EXAMPLE.finditer(text) if x["where"] in where]
    for example in examples:
        # Errors then show the line of the file.
        lines_before = "\n" * text.count("\n", 0, example.start("code"))
        code = compile(lines_before + example["code"], file, "exec")
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(code, names)
        if example["output"] is not None:
            assert printed.getvalue() == example["output"]
    return len(examples)


@each_file
def test_the_links_lead_somewhere(file):
    text = FENCED.sub("", file.read_text(encoding="utf-8"))
    for path, heading in LINK.findall(text):
        if path.startswith(("https:", "http:")):
            continue
        target = file.parent / path if path else file
        assert target.exists(), path
        if heading:
            assert heading in headings(target), f"{path}#{heading}"


def test_each_paper_stands_among_the_references():
    references = ROOT / "docs" / "references.md"
    code = [*(ROOT / "keras_moe").rglob("*.py"), *(ROOT / "examples").glob("*.py")]
    cited = {p for file in [*code, *FILES] if file != references for p in papers(file)}
    assert cited == set(papers(references))


def papers(file):
    return PAPER.findall(file.read_text(encoding="utf-8"))


def headings(file):
    """The headings of a file as links name them."""
    text = FENCED.sub("", file.read_text(encoding="utf-8"))
    titles = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return [re.sub(r"[^\w -]", "", t).lower().replace(" ", "-") for t in titles]
