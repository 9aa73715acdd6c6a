"""How the reference reads docstrings."""

import inspect
import re

import griffe

# Sections of text, which would be lists of names, or boxes.
TEXT = re.compile(r"^(Returns|Reference):\n((?:    .*\n?)+)", re.MULTILINE)


class Docstrings(griffe.Extension):
    def on_instance(self, *, obj, **kwargs):
        if not obj.docstring:
            return
        text = obj.docstring.value.replace(
            "Call arguments:\n", "Other Parameters: Call arguments:\n"
        )
        obj.docstring.value = TEXT.sub(
            lambda found: f"**{found[1]}:** {inspect.cleandoc(found[2])}\n", text
        )
