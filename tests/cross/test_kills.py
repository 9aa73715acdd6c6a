"""Killed and resumed training gives the weights of uninterrupted training."""

import os
import random
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest
from backends import BACKENDS, TESTS, process_environment

KILLS = int(os.environ.get("KILLS", "2"))
# A process trains for at least one epoch before it is killed, and up to a few more.
EPOCHS = 10 * (KILLS + 1)


# How a model is trained: on a backend, or on JAX by two processes.
TWO = "two processes"
TWO_ENVIRONMENT = {
    "XLA_FLAGS": "--xla_force_host_platform_device_count=4",
    # Threads of JAX; with fewer, sums over processes may block all of them.
    "NPROC": "32",
}


def start(folder, how):
    """Starts training, and returns its processes; the first one prints its epochs."""
    command = [sys.executable, TESTS / "cross" / "resumable.py", folder, str(EPOCHS)]
    if how != TWO:
        return [start_process(command, process_environment(how))]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    environment = process_environment("jax", **TWO_ENVIRONMENT)
    return [
        start_process([*command, str(i), f"{address},{address}"], environment)
        for i in range(2)
    ]


def start_process(command, environment):
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)


def next_epoch(process):
    """Waits until a process starts an epoch, and returns the epoch."""
    word, epoch = process.stdout.readline().split()
    assert word == "epoch"
    return int(epoch)


@pytest.mark.parametrize("how", [*BACKENDS, TWO])
def test_training_resumes_after_random_kills(how, tmp_path):
    random_delay, starts, results = random.Random(0), [], {}
    for name, kills in (("whole", 0), ("killed", KILLS)):
        folder = tmp_path / name
        folder.mkdir()
        for kill in range(kills):
            processes = start(folder, how)
            starts.append(next_epoch(processes[0]))
            next_epoch(processes[0])
            time.sleep(random_delay.uniform(0, 0.2))
            for process in processes:
                process.kill()
            for process in processes:
                assert process.wait() == -signal.SIGKILL, "It had already ended."
            if kill == 0:
                # Simulates a kill while Keras writes this file.
                (folder / "backup" / "training_metadata.json").write_text("")
        processes = start(folder, how)
        starts.append(next_epoch(processes[0]))
        for process in processes:
            process.communicate()
            assert process.returncode == 0
        results[name] = np.load(folder / "end.npz")
    # The uninterrupted run and the first killed one start at 0, the others later.
    assert starts[:2] == [0, 0]
    assert sorted(set(starts[1:])) == starts[1:]
    whole, killed = results["whole"], results["killed"]
    assert len(whole.files) > 20
    largest = max(np.abs(killed[n] - whole[n]).max() for n in whole.files)
    print(f"{how}: started at epochs {starts[1:]}, largest difference {largest:g}")
    assert largest < 1e-6
