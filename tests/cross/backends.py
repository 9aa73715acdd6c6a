"""Runs programs in new processes, on a chosen backend."""

import os
import pathlib
import subprocess
import sys

BACKENDS = ("tensorflow", "jax", "torch")
TESTS = pathlib.Path(__file__).parents[1]


def run(program, backend, folder):
    """Runs a program with the folder as its argument."""
    run_python("-c", program, folder, backend=backend)


def run_python(*arguments, backend, timeout=None, **environment):
    """Runs Python with the tests on its path, for at most `timeout` seconds."""
    result = subprocess.run(
        [sys.executable, *map(str, arguments)],
        env=process_environment(backend, **environment),
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    assert result.returncode == 0, f"{backend}: {result.stderr[-3000:]}"


def process_environment(backend, **environment):
    """Returns the environment variables of a program on a backend."""
    path = os.pathsep.join(map(str, (TESTS.parent, TESTS, TESTS / "cross")))
    variables = {"KERAS_BACKEND": backend, "PYTHONPATH": path, **environment}
    return {**os.environ, **variables}
