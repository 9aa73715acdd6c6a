"""Killed and resumed training gives the weights of uninterrupted training."""

import os
import random
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from backends import BACKENDS, TESTS, process_environment

KILLS = int(os.environ.get("KILLS", "2"))
# A process trains for at least one epoch before it is killed, and up to a few more.
EPOCHS = 10 * (KILLS + 1)


def start(folder, backend):
    program = TESTS / "cross" / "resumable.py"
    return subprocess.Popen(
        [sys.executable, program, folder, str(EPOCHS)],
        env=process_environment(backend),
        stdout=subprocess.PIPE,
        text=True,
    )


def next_epoch(process):
    """Waits until a process starts an epoch, and returns the epoch."""
    word, epoch = process.stdout.readline().split()
    assert word == "epoch"
    return int(epoch)


@pytest.mark.parametrize("backend", BACKENDS)
def test_training_resumes_after_random_kills(backend, tmp_path):
    random_delay, starts, results = random.Random(0), [], {}
    for name, kills in (("whole", 0), ("killed", KILLS)):
        folder = tmp_path / name
        folder.mkdir()
        for kill in range(kills):
            process = start(folder, backend)
            starts.append(next_epoch(process))
            next_epoch(process)
            time.sleep(random_delay.uniform(0, 0.2))
            process.kill()
            assert process.wait() == -signal.SIGKILL, "The process had already ended."
            if kill == 0:
                # Simulates a kill while Keras writes this file.
                (folder / "backup" / "training_metadata.json").write_text("")
        process = start(folder, backend)
        starts.append(next_epoch(process))
        process.communicate()
        assert process.returncode == 0
        results[name] = np.load(folder / "end.npz")
    # The uninterrupted run and the first killed one start at 0, the others later.
    assert starts[:2] == [0, 0]
    assert sorted(set(starts[1:])) == starts[1:]
    whole, killed = results["whole"], results["killed"]
    assert len(whole.files) > 20
    largest = max(np.abs(killed[n] - whole[n]).max() for n in whole.files)
    print(f"{backend}: started at epochs {starts[1:]}, largest difference {largest:g}")
    assert largest < 1e-6
