"""Training on several devices against one: differences, and bytes that move.

    KERAS_BACKEND=jax python benchmarks/devices.py [--meshes 2x4 8x1 8]

trains small models by the backend's own engine, and again on one device: JAX on
meshes of virtual CPU devices and on two processes (`examples/many_devices.py`),
TensorFlow by `MirroredStrategy` on two logical CPUs, PyTorch by
`DistributedDataParallel` on two processes. On meshes it reads the collectives off the
compiled training step, and holds their bytes beside those of the formulas in
docs/scaling.md. A mesh `2x4` has two devices for the batch and four for the experts;
`8` has eight for both. Written are `devices_<backend>.json`, and with what the other
backends have left there, `devices.md`.
"""

import argparse
import collections
import json
import math
import pathlib
import re
import subprocess
import sys
import tempfile

import keras
import numpy as np

import keras_moe

BACKEND = keras.backend.backend()
BACKENDS = "jax", "tensorflow", "torch"
ROOT = pathlib.Path(__file__).parents[1]

BATCH, LENGTH, HIDDEN, D_FF, EXPERTS, K = 16, 64, 64, 128, 16, 2
STEPS = 20
TOP_K = keras_moe.MaskedRouter, {"num_selected_experts": K}
# Each with a capacity factor.
KINDS = {
    "tokens choose": (*TOP_K, float(K)),
    "dropless": (*TOP_K, None),
    "experts choose": (keras_moe.ExpertsChooseMaskedRouter, {}, float(K)),
}
MESHES = ["1x2", "2x1", "1x4", "2x2", "4x1", "1x8", "2x4", "4x2", "8x1", "2", "4", "8"]
COLLECTIVES = "all-reduce", "all-gather", "all-to-all", "reduce-scatter"
# Not within groups of one device each, where nothing moves.
OPERATION = re.compile(
    rf" = (.*?) ({'|'.join(COLLECTIVES)})(?:-start)?\("
    r"(?!.*replica_groups=\{(?:\{\d+\},?)+\})"
)
ARRAY = re.compile(r"([a-z]+)(\d*)\[([\d,]*)\]")
# Means over what is filled, which a replica knows of itself alone.
MEANS_OF_REPLICAS = "moe/router_confidence", "moe/expert_usage"


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--meshes", nargs="*", default=MESHES)
    parser.add_argument("--output", type=pathlib.Path, default="docs/benchmarks")
    options = parser.parse_args()
    engine = {"jax": on_jax, "tensorflow": on_tensorflow, "torch": on_torch}[BACKEND]
    results = []
    for result in engine(options.meshes):
        print(result, flush=True)
        results.append(result)
    options.output.mkdir(parents=True, exist_ok=True)
    files = {name: options.output / f"devices_{name}.json" for name in BACKENDS}
    files[BACKEND].write_text(json.dumps(results, indent=1) + "\n")
    written = [json.loads(f.read_text()) for f in files.values() if f.exists()]
    results = [result for results in written for result in results]
    (options.output / "devices.md").write_text(table(results))


# The model, its data, and what is compared


def build_model(kind):
    keras.utils.set_random_seed(0)
    router, arguments, factor = KINDS[kind]
    inputs = keras.Input((LENGTH, HIDDEN))
    x = keras.layers.Dense(HIDDEN)(keras.layers.Masking()(inputs))
    moe = keras_moe.MoeLayer(
        keras_moe.FeedForwardExperts(EXPERTS, D_FF, kernel_initializer="he_normal"),
        router(EXPERTS, **arguments),
        train_capacity_factor=factor,
        eval_capacity_factor=factor,
        name="moe",
    )
    model = keras.Model(inputs, x + moe(x))
    model.compile(keras.optimizers.Adam(1e-3), "mse")
    return model


def make_data():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(BATCH, LENGTH, HIDDEN)).astype("float32")
    y = np.tanh(x[..., ::-1])
    # As much padding in each half: losses are means over what a replica holds.
    x[1 :: BATCH // 2, LENGTH // 2 :] = 0
    return x, y


def fit(model):
    """Logs by name, and weights."""
    logs = model.fit(
        *make_data(), batch_size=BATCH, epochs=STEPS, shuffle=False, verbose=0
    )
    return logs.history, model.get_weights()


def compare(kind, where, found, alone):
    """How far logs and weights are from those of one device."""
    (logs, weights), (logs_alone, weights_alone) = found, alone
    logs = {name: largest([logs[name]], [x]) for name, x in logs_alone.items()}
    return {
        "kind": kind,
        "where": where,
        "means of replicas": max(logs.pop(n, 0.0) for n in MEANS_OF_REPLICAS),
        "logs": max(logs.values()),
        "weights": largest(weights, weights_alone),
    }


def largest(found, alone):
    """The largest difference of two lists of arrays."""
    pairs = zip(found, alone, strict=True)
    return float(max(np.abs(np.subtract(a, b)).max() for a, b in pairs))


# JAX


def on_jax(meshes):
    import jax

    jax.config.update("jax_num_cpu_devices", 8)
    for kind in KINDS:
        alone = fit(build_model(kind))
        for mesh in meshes:
            keras.distribution.set_distribution(distribution(mesh))
            model = build_model(kind)
            found = fit(model)
            moved = {"bytes": collectives(model), "formula": formula(kind, mesh)}
            keras.distribution.set_distribution(None)
            yield compare(kind, mesh, found, alone) | moved
    for kind, arguments in ("tokens choose", []), ("dropless", ["--dropless"]):
        alone = example("--processes=1", "--devices=1", "--mesh=1,1", *arguments)
        yield compare(kind, "2x4, two processes", example(*arguments), alone)


def example(*arguments):
    """Logs and weights of `examples/many_devices.py`."""
    with tempfile.TemporaryDirectory() as folder:
        script = ROOT / "examples" / "many_devices.py"
        options = "--epochs=1", f"--output={folder}", *arguments
        run = [sys.executable, script, *options]
        subprocess.run(run, check=True, stdout=subprocess.DEVNULL)
        model = keras.models.load_model(f"{folder}/model.keras")
        return {"loss": np.load(f"{folder}/loss.npy")}, model.get_weights()


def distribution(mesh):
    shape = sizes(mesh)
    devices = keras.distribution.list_devices()[: math.prod(shape)]
    names = ["batch", "expert"][: len(shape)]
    mesh = keras.distribution.DeviceMesh(shape, names, devices)
    layout_map = keras_moe.distribution.expert_layout_map(mesh, axis=names[-1])
    return keras.distribution.ModelParallel(
        layout_map=layout_map, batch_dim_name="batch"
    )


def sizes(mesh):
    return [int(n) for n in mesh.split("x")]


def collectives(model):
    """Bytes by collective, of the results that one device gets in a step."""
    import jax

    state = [
        [variable.value for variable in variables]
        for variables in (
            model.trainable_variables,
            model.non_trainable_variables,
            model.optimizer.variables,
            model.metrics_variables,
        )
    ]
    data = make_data()
    layout = keras.distribution.distribution().get_data_layout(data[0].shape)
    data = tuple(keras.distribution.distribute_tensor(a, layout) for a in data)
    where = None, tuple(jax.tree.map(lambda value: value.sharding, state))
    step = jax.jit(model.train_step, out_shardings=where)
    program = step.lower(tuple(state), data).compile().as_text()
    found = collections.Counter()
    for results, name in OPERATION.findall(program):
        found[name] += sum(
            math.prod(map(int, filter(None, shape.split(",")))) * int(bits or 8) // 8
            for _, bits, shape in ARRAY.findall(results)
        )
    return dict(found)


def formula(kind, mesh):
    """The bytes that have to move, as docs/scaling.md has them."""
    batch, *experts = sizes(mesh)
    tokens = 4 * BATCH * LENGTH // batch * HIDDEN
    of_experts = 4 * EXPERTS * (2 * HIDDEN * D_FF + HIDDEN + D_FF)
    rest = 4 * (HIDDEN * HIDDEN + HIDDEN + HIDDEN * EXPERTS + EXPERTS)
    moved = collections.Counter()
    if experts:
        if experts[0] > 1:
            moved["all-reduce"] += 2 * tokens
        if batch > 1:
            moved["all-reduce"] += of_experts // experts[0] + rest
    elif kind == "dropless":
        moved["all-gather"] += of_experts
        moved["all-reduce"] += of_experts + rest
    else:
        moved["all-to-all"] += 4 * K * tokens
        moved["all-reduce"] += rest
    return dict(moved)


# TensorFlow


def on_tensorflow(_):
    import tensorflow as tf

    # With it, an update of weights may overtake a read, on a CPU without XLA.
    tf.config.optimizer.set_experimental_options({"dependency_optimization": False})
    (cpu,) = tf.config.list_physical_devices("CPU")
    two = [tf.config.LogicalDeviceConfiguration()] * 2
    tf.config.set_logical_device_configuration(cpu, two)
    strategy = tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])
    for kind in KINDS:
        alone = fit(build_model(kind))
        with strategy.scope():
            model = build_model(kind)
        yield compare(kind, "MirroredStrategy", fit(model), alone)


# PyTorch


def on_torch(_):
    import torch

    with tempfile.TemporaryDirectory() as folder:
        for processes in 1, 2:
            arguments = processes, folder
            torch.multiprocessing.spawn(train_replica, arguments, processes)
        for kind in KINDS:
            (logs, alone), (_, first), (both_logs, second) = (
                replica_results(f"{folder}/{kind}-{replica}.npz")
                for replica in ("0-of-1", "0-of-2", "1-of-2")
            )
            found, expected = (both_logs, first + second), (logs, alone + alone)
            yield compare(kind, "DistributedDataParallel", found, expected)


def replica_results(file):
    """Logs and weights of a process."""
    results = dict(np.load(file))
    return {"loss": results.pop("loss")}, list(results.values())


def train_replica(rank, processes, folder):
    """Trains on this process's part of each batch, in a loop of one's own."""
    import torch

    torch.distributed.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store-{processes}",
        rank=rank,
        world_size=processes,
    )
    torch.set_num_threads(1)  # The other process needs a core too.
    own = BATCH // processes
    x, y = (torch.from_numpy(a[rank * own :][:own].copy()) for a in make_data())
    for kind in KINDS:
        model = build_model(kind)
        parallel = torch.nn.parallel.DistributedDataParallel(model)
        weights = [variable.value for variable in model.trainable_variables]
        optimizer = torch.optim.Adam(weights, lr=1e-3)
        losses = []
        for _ in range(STEPS):
            optimizer.zero_grad()
            error = torch.mean((parallel(x, training=True) - y) ** 2)
            loss = error + sum(model.losses)
            loss.backward()
            optimizer.step()
            total = loss.detach()
            torch.distributed.all_reduce(total)
            losses.append(float(total) / processes)
        file = f"{folder}/{kind}-{rank}-of-{processes}.npz"
        np.savez(file, *model.get_weights(), loss=losses)
    torch.distributed.destroy_process_group()


def table(results):
    lines = [
        "# Measurements on several devices",
        "",
        "Written by `make bench-devices`; [Scaling](../scaling.md) explains it.",
        f"Several devices against one: {STEPS} steps of {BATCH} × {LENGTH} tokens, h "
        f"{HIDDEN}, f {D_FF}, {EXPERTS} experts,",
        f"k {K}. By how much do the losses and metrics of any step differ, and the",
        "weights after the last? A mesh `2x4` has two devices for the batch and four",
        "for the experts; `8` has eight for both. Two processes on JAX train the model",
        "of `examples/many_devices.py`; TensorFlow's engine has two replicas, that of",
        "PyTorch two processes. Bytes are those of the results that the collectives of",
        "a training step hand to one device; in brackets, those of the formulas.",
    ]
    for kind in KINDS:
        lines += ["", f"## {kind.capitalize()}", ""]
        lines += ["| on | logs | weights | all-reduce | all-gather | all-to-all |"]
        lines += ["|---|---|---|---|---|---|"]
        for row in results:
            if row["kind"] == kind:
                lines.append(f"| {' | '.join(cells(row))} |")
    return "\n".join(lines) + "\n"


def cells(row):
    yield from (row["where"], f"{row['logs']:.0e}", f"{row['weights']:.0e}")
    moved, expected = row.get("bytes", {}), row.get("formula", {})
    for name in COLLECTIVES[:3]:
        found = name in moved
        yield f"{moved[name]:,} ({expected.get(name, 0):,})" if found else ""


if __name__ == "__main__":
    main()
