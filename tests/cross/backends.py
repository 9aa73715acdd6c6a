"""Runs programs in new processes, on a chosen backend."""

import os
import pathlib
import socket
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


def start_python(*arguments, backend, **environment):
    """Starts Python with the tests on its path, and returns the process."""
    return subprocess.Popen(
        [sys.executable, *map(str, arguments)],
        env=process_environment(backend, **environment),
        stdout=subprocess.PIPE,
        text=True,
    )


def virtual_devices(number):
    """Returns the environment variables of as many CPU devices on JAX."""
    flags = os.environ["XLA_FLAGS"]  # Of conftest.py, for short compilation.
    return {"XLA_FLAGS": f"{flags} --xla_force_host_platform_device_count={number}"}


def start_two(*arguments):
    """Starts two processes on JAX with four devices each, and returns them.

    A program gets its process number and the addresses of both as further arguments.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    # Threads of JAX; with fewer, sums over processes may block all of them.
    variables = {"NPROC": "32", **virtual_devices(4)}
    return [
        start_python(*arguments, i, f"{address},{address}", backend="jax", **variables)
        for i in range(2)
    ]
