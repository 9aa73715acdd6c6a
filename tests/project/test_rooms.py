"""The rooms of the package: imports go down only, as each room says itself."""

import ast
import pathlib
import re

import pytest

import keras_moe

PACKAGE = pathlib.Path(keras_moe.__file__).parent
# From top to bottom. A room may import from those below it.
ROOMS = (
    "convert",
    "callbacks",
    "distribution",
    "inspection",
    "presets",
    "quantization",
    "upcycling",
    "visualization",
    "layers",
    "routers",
    "experts",
    "metrics",
    "losses",
    "routing",
    "kernels",
    "activations",
    "utils",
)
FILES = sorted(PACKAGE.rglob("*.py"))
STATED = re.compile(r"^May import: (.*)\.$", re.MULTILINE)


def imported_rooms(path):
    """The rooms that a file imports from."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module]
            if node.module == "keras_moe":
                names = [f"keras_moe.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            continue
        found |= {n.split(".")[1] for n in names if n.startswith("keras_moe.")}
    return found


def room_of(path):
    part = path.relative_to(PACKAGE).parts[0]
    return part.removesuffix(".py")


def upward_imports(room, imported):
    below = ROOMS[ROOMS.index(room) + 1 :]
    return imported - {room} - set(below)


def test_every_room_has_its_place():
    assert {room_of(path) for path in FILES} == {*ROOMS, "__init__"}


@pytest.mark.parametrize(
    "path",
    [path for path in FILES if room_of(path) != "__init__"],
    ids=lambda path: str(path.relative_to(PACKAGE)),
)
def test_imports_go_down(path):
    assert not upward_imports(room_of(path), imported_rooms(path))


def test_an_import_upwards_is_found(tmp_path):
    path = tmp_path / "wrong.py"
    path.write_text(
        "from keras_moe.layers import MoeLayer\nfrom keras_moe import losses"
    )
    imported = imported_rooms(path)
    assert imported == {"layers", "losses"}
    assert upward_imports("routing", imported) == {"layers", "losses"}
    assert upward_imports("routers", imported) == {"layers"}


@pytest.mark.parametrize("room", [r for r in ROOMS if (PACKAGE / r).is_dir()])
def test_a_room_says_what_it_may_import(room):
    docstring = ast.get_docstring(
        ast.parse((PACKAGE / room / "__init__.py").read_text())
    )
    (stated,) = STATED.findall(docstring)
    stated = set() if stated.startswith("nothing") else set(stated.split(", "))
    assert not upward_imports(room, stated)
    imported = set().union(*map(imported_rooms, (PACKAGE / room).glob("*.py")))
    assert imported - {room} <= stated
