"""Killed and resumed training gives the weights of uninterrupted training."""

import os
import random
import signal
import time

import numpy as np
import pytest
from backends import BACKENDS, TESTS, start_python, start_two

KILLS = int(os.environ.get("KILLS", "2"))
TWO = "two processes"  # On JAX.


def start(folder, how):
    """Starts training, and returns its processes; the first one prints its epochs."""
    # It trains for at least one epoch before it is killed, and up to a few more; two
    # processes take longer for an epoch.
    epochs = (4 if how == TWO else 10) * (KILLS + 1)
    arguments = TESTS / "cross" / "resumable.py", folder, epochs
    if how == TWO:
        return start_two(*arguments)
    return [start_python(*arguments, backend=how)]


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
