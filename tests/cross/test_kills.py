"""Training that is killed and resumed ends as uninterrupted training does."""

import os
import random
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from backends import BACKENDS, TESTS, surroundings

KILLS = int(os.environ.get("KILLS", "2"))
# A process trains for one epoch at least before it is killed, and for some more.
EPOCHS = 10 * (KILLS + 1)


def start(folder, backend):
    program = TESTS / "cross" / "resumable.py"
    return subprocess.Popen(
        [sys.executable, program, folder, str(EPOCHS)],
        env=surroundings(backend),
        stdout=subprocess.PIPE,
        text=True,
    )


def epoch_of(process):
    """Returns the next epoch that a process begins."""
    word, epoch = process.stdout.readline().split()
    assert word == "epoch"
    return int(epoch)


@pytest.mark.parametrize("backend", BACKENDS)
def test_killed_at_random_and_resumed(backend, tmp_path):
    moments, begins, ends = random.Random(0), [], {}
    for name, kills in (("whole", 0), ("killed", KILLS)):
        folder = tmp_path / name
        folder.mkdir()
        for kill in range(kills):
            process = start(folder, backend)
            begins.append(epoch_of(process))
            epoch_of(process)
            time.sleep(moments.uniform(0, 0.2))
            process.kill()
            assert process.wait() == -signal.SIGKILL, "It had ended."
            if kill == 0:
                # As after a kill while Keras writes this file.
                (folder / "backup" / "training_metadata.json").write_text("")
        process = start(folder, backend)
        begins.append(epoch_of(process))
        process.communicate()
        assert process.returncode == 0
        ends[name] = np.load(folder / "end.npz")
    # The whole run and the first killed one begin at 0, the others later each time.
    assert begins[:2] == [0, 0]
    assert sorted(set(begins[1:])) == begins[1:]
    whole, killed = ends["whole"], ends["killed"]
    assert len(whole.files) > 20
    largest = max(np.abs(killed[n] - whole[n]).max() for n in whole.files)
    print(f"{backend}: began with epochs {begins[1:]}, largest difference {largest:g}")
    assert largest < 1e-6
