"""A program in a fresh process, on a backend of its own."""

import os
import pathlib
import subprocess
import sys

BACKENDS = ("tensorflow", "jax", "torch")
TESTS = pathlib.Path(__file__).parents[1]


def run(program, backend, folder):
    """Runs a program, whose argument is the folder; it can import the tests."""
    path = os.pathsep.join(map(str, (TESTS.parent, TESTS)))
    environment = {**os.environ, "KERAS_BACKEND": backend, "PYTHONPATH": path}
    command = [sys.executable, "-c", program, str(folder)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, f"{backend}: {result.stderr[-3000:]}"
