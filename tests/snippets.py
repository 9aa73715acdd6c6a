"""The code blocks of the documentation, as programs."""

import contextlib
import io
import pathlib
import re

import keras

ROOT = pathlib.Path(__file__).parents[1]
# "python no-run" blocks are not run, "python jax" blocks on JAX only, "python peers"
# blocks by `tests/peers`. A "text" block after a block that runs is its output.
EXAMPLE = re.compile(
    r"^```python(?: (?P<where>[\w-]+))?\n"
    r"(?P<code>.*?)^```\n(?:\n```text\n(?P<output>.*?)^```\n)?",
    re.MULTILINE | re.DOTALL,
)


def run_examples(file, *also):
    """Runs the examples of a file as one program.

    Args:
        file: path.
        *also: words after "python" that mark blocks to run, besides the backend.

    Returns:
        The number of examples.
    """
    where = (None, keras.backend.backend(), *also)
    text = file.read_text(encoding="utf-8")
    return run_code(text, {"__name__": "__main__"}, where, file)


def run_code(text, names, where, file="docstring"):
    """Runs the code blocks of a text in a namespace; returns their number."""
    examples = [x for x in EXAMPLE.finditer(text) if x["where"] in where]
    for example in examples:
        # Errors then show the line of the file.
        lines_before = "\n" * text.count("\n", 0, example.start("code"))
        code = compile(lines_before + example["code"], file, "exec")
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(code, names)
        if example["output"] is not None:
            assert printed.getvalue() == example["output"], printed.getvalue()
    return len(examples)
