"""Training on several devices, by each backend's engine, equals training on one."""

import json

import numpy as np
import pytest
from backends import TESTS, run, run_python

EIGHT = "--xla_force_host_platform_device_count=8"


@pytest.fixture(scope="module")
def meshes(tmp_path_factory):
    """What the script measures, by kind of routing and mesh."""
    folder = tmp_path_factory.mktemp("devices")
    script = TESTS.parent / "benchmarks" / "devices.py"
    arguments = "--meshes", "2x4", "8x1", "8", "--output", folder
    run_python(script, *arguments, backend="jax", XLA_FLAGS=EIGHT)
    rows = json.loads((folder / "devices.json").read_text())
    assert (folder / "devices.md").read_text().count("2x4") == 3
    return {(row["kind"], row["mesh"]): row for row in rows}


def test_meshes_of_devices_train_as_one(meshes):
    assert len(meshes) == 9
    for row in meshes.values():
        assert row["losses"] < 1e-4, row
        assert row["weights"] < 1e-4, row


def test_no_more_moves_than_has_to(meshes):
    """But for what the router makes of `e` probabilities a token."""
    tokens, experts = 16 * 64, 16
    for row in meshes.values():
        moved, expected = sum(row["bytes"].values()), sum(row["formula"].values())
        assert 0.99 * expected <= moved, row
        of_router = 4 * experts * tokens // int(row["mesh"].split("x")[0])
        assert moved <= 1.02 * expected + 4 * of_router, row
        largest = max(row["bytes"], key=row["bytes"].get)
        assert largest == max(row["formula"], key=row["formula"].get)


def test_two_processes_of_four_devices(tmp_path):
    script = TESTS.parent / "examples" / "many_devices.py"
    for name, *arguments in (
        ("many",),
        ("one", "--processes", "1", "--devices", "1", "--mesh", "1,1"),
    ):
        output = "--epochs", "1", "--output", tmp_path / f"{name}.npz"
        run_python(script, *arguments, *output, backend="jax", XLA_FLAGS="")
    many, one = (np.load(tmp_path / f"{name}.npz") for name in ("many", "one"))
    for name in one.files:
        np.testing.assert_allclose(many[name], one[name], atol=1e-4)


MIRRORED = """
import numpy as np
import small_model
import tensorflow as tf

(cpu,) = tf.config.list_physical_devices("CPU")
two = [tf.config.LogicalDeviceConfiguration()] * 2
tf.config.set_logical_device_configuration(cpu, two)
strategy = tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])
# A mean over what is filled is each replica's own.
OF_REPLICAS = "moe/router_confidence", "moe/expert_usage"
for kind in small_model.ROUTERS:
    data = small_model.data()
    logs, weights = small_model.train(small_model.model(kind), *data)
    with strategy.scope():
        model = small_model.model(kind)
    found, found_weights = small_model.train(model, *data)
    assert len(logs) == 7
    for name in logs:
        atol = 0.2 if name in OF_REPLICAS else 1e-4
        np.testing.assert_allclose(found[name], logs[name], atol=atol)
    for a, b in zip(found_weights, weights, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4)
"""


def test_mirrored_strategy(tmp_path):
    run(MIRRORED, "tensorflow", tmp_path)


PARALLEL = """
import sys
import keras
import numpy as np
import small_model
import torch
from torch.nn.parallel import DistributedDataParallel

def train(rank, processes, folder):
    store = f"file://{folder}/store{processes}"
    torch.distributed.init_process_group(
        "gloo", init_method=store, rank=rank, world_size=processes)
    own = small_model.BATCH // processes
    x, y = (torch.from_numpy(np.ascontiguousarray(a[rank * own:][:own]))
            for a in small_model.data())
    for kind in small_model.ROUTERS:
        model = small_model.model(kind)
        parallel = DistributedDataParallel(model)
        optimizer = torch.optim.SGD(
            [v.value for v in model.trainable_variables], lr=0.1)
        for _ in range(20):
            optimizer.zero_grad()
            error = torch.mean((parallel(x, training=True) - y) ** 2)
            (error + sum(model.losses)).backward()
            optimizer.step()
        np.savez(f"{folder}/{kind}{processes}{rank}.npz", *model.get_weights())
    torch.distributed.destroy_process_group()

for processes in (1, 2):
    torch.multiprocessing.start_processes(
        train, (processes, sys.argv[1]), processes, start_method="fork")
for kind in small_model.ROUTERS:
    one, *two = (np.load(f"{sys.argv[1]}/{kind}{n}.npz") for n in ("10", "20", "21"))
    for name in one.files:
        for other in two:
            np.testing.assert_allclose(other[name], one[name], atol=1e-4)
"""


def test_distributed_data_parallel(tmp_path):
    run(PARALLEL, "torch", tmp_path)
