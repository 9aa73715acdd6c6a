"""How the reference reads docstrings."""

import inspect
import re

import griffe

# A list of arguments, under a title of ours.
CALL_ARGUMENTS = re.compile(r"^(Call arguments:\n)(?=    \w+: )", re.MULTILINE)
# Sections of text. Without this they would be lists of names, or boxes.
TEXT = re.compile(
    r"^(Returns|Reference|Call arguments):\n((?:    .*\n?)+)", re.MULTILINE
)


class Docstrings(griffe.Extension):
    def on_instance(self, *, obj, **kwargs):
        if not obj.docstring:
            return
        text = CALL_ARGUMENTS.sub(r"Other Parameters: \1", obj.docstring.value)
        obj.docstring.value = TEXT.sub(
            lambda found: f"**{found[1]}:** {inspect.cleandoc(found[2])}\n", text
        )
