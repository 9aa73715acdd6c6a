"""A program in a fresh process, on a backend of its own."""

import os
import pathlib
import subprocess
import sys

BACKENDS = ("tensorflow", "jax", "torch")
TESTS = pathlib.Path(__file__).parents[1]


def run(program, backend, folder):
    """Runs a program, whose argument is the folder."""
    run_python("-c", program, folder, backend=backend)


def run_python(*arguments, backend, **environment):
    """Runs Python, which can import the tests."""
    result = subprocess.run(
        [sys.executable, *map(str, arguments)],
        env=surroundings(backend, **environment),
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, f"{backend}: {result.stderr[-3000:]}"


def surroundings(backend, **environment):
    """The environment variables of such a program."""
    path = os.pathsep.join(map(str, (TESTS.parent, TESTS, TESTS / "cross")))
    own = {"KERAS_BACKEND": backend, "PYTHONPATH": path, **environment}
    return {**os.environ, **own}
