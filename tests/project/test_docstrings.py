"""Every public class and function has a docstring whose example runs."""

import inspect

import keras
import numpy as np
import pytest
from snippets import run_code

import keras_moe

MODULES = [getattr(keras_moe, n) for n in keras_moe.__all__]
MODULES = [m for m in MODULES if inspect.ismodule(m)] + [keras_moe]
# Their examples need files or devices that a test does not have, or change its process.
NOT_RUN = {"accelerate", "expert_layout_map", "from_pretrained", "keep_freed_memory"}


def public(module):
    """Yields the classes and functions that a module exports or defines."""
    exported = getattr(module, "__all__", ())
    for name, thing in vars(module).items():
        own = name in exported or getattr(thing, "__module__", 0) == module.__name__
        if own and (inspect.isclass(thing) or inspect.isfunction(thing)):
            yield name, thing


PUBLIC = dict(sorted(pair for module in MODULES for pair in public(module)))
PUBLIC = {name: thing for name, thing in PUBLIC.items() if name[0] != "_"}
each = pytest.mark.parametrize("name", PUBLIC)


@each
def test_the_example_runs(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    docstring = inspect.getdoc(PUBLIC[name]) + "\n"
    assert "Example:\n\n```python\n" in docstring, "has no example"
    if name in NOT_RUN:
        return
    names = {"keras": keras, "np": np, "keras_moe": keras_moe}
    assert run_code(docstring, names, where=(None,)) == 1


@each
def test_arguments_are_described(name):
    thing = PUBLIC[name]
    parameters = inspect.signature(thing).parameters
    args = section(inspect.getdoc(thing), "Args" if not fields(thing) else "Attributes")
    described = {line.split(":")[0] for line in args if not line.startswith(" ")}
    stars = {inspect.Parameter.VAR_POSITIONAL: "*", inspect.Parameter.VAR_KEYWORD: "**"}
    assert described == {stars.get(p.kind, "") + p.name for p in parameters.values()}


def fields(thing):
    return getattr(thing, "_fields", ())


def section(docstring, title):
    """The lines of a section, without its indentation."""
    if f"{title}:\n" not in docstring:
        return []
    lines = docstring.split(f"{title}:\n")[1].splitlines()
    end = next((i for i, x in enumerate(lines) if x and not x.startswith(" ")), None)
    return [line[4:] for line in lines[:end] if line]
