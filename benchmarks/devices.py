"""Comparison of training on several devices with training on one.

    KERAS_BACKEND=jax python benchmarks/devices.py [--meshes 2x4 8x1 8]

Trains small models with the distribution engine of the backend, and again on one
device: on JAX on meshes of virtual CPU devices and on two processes
(`examples/many_devices.py`), on TensorFlow with `MirroredStrategy` on two logical CPUs,
on PyTorch with `DistributedDataParallel` on two processes. For meshes it reads the
collectives of the compiled training step, and compares their bytes with the formulas of
docs/scaling.md.

A mesh `2x4` has two devices for the batch and four for the experts; a mesh `8` has
eight for both; `2x2x2` has two for the inner layer of each expert, too. Results are
written to `devices_<backend>.json`, and those of all backends to `devices.md`.
"""

import argparse
import collections
import json
import math
import os
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
# Experts with adapters, and how they are quantized.
ADAPTED = {
    "adapters": None,
    "adapters on int8 experts": "int8",
    "adapters on int4 experts": "int4",
}
RANK = 4
# A router, its arguments and the capacity factor.
TOKENS_CHOOSE = (*TOP_K, float(K))
KINDS = {
    "tokens choose": TOKENS_CHOOSE,
    "dropless": (*TOP_K, None),
    "experts choose": (keras_moe.ExpertsChooseMaskedRouter, {}, float(K)),
    "bias and batch balanced": (
        keras_moe.BiasBalancedMaskedRouter,
        {
            "num_selected_experts": K,
            "bias_update_rate": 0.01,
            "load_balancing_loss_weight": 0.1,
            "balance_scope": "batch",
        },
        float(K),
    ),
    **dict.fromkeys(ADAPTED, TOKENS_CHOOSE),
}
MESHES = ["1x2", "2x1", "1x4", "2x2", "4x1", "1x8", "2x4", "4x2", "8x1", "2", "4", "8"]
MESHES += ["1x2x2", "2x2x2"]
OF_ADAPTED = "2x4", "8x1", "8", "1x2x2", "2x2x2"
COLLECTIVES = "all-reduce", "all-gather", "all-to-all", "reduce-scatter"
# A collective in a compiled program, with the type of its results. Collectives whose
# replica groups have one device each are skipped: they move no data.
OPERATION = re.compile(
    rf" = (.*?) ({'|'.join(COLLECTIVES)})(?:-start)?\("
    r"(?!.*replica_groups=\{(?:\{\d+\},?)+\})"
)
ARRAY = re.compile(r"([a-z]+)(\d*)\[([\d,]*)\]")
# Means over filled slots. Each replica computes them for its own tokens, and the mean
# over replicas may differ from that of the joint batch.
REPLICA_MEANS = "moe/router_confidence", "moe/expert_usage"


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--kinds", nargs="*", default=list(KINDS), help="of `KINDS`")
    parser.add_argument("--meshes", nargs="*", default=MESHES, help="only on JAX")
    parser.add_argument(
        "--output",
        type=pathlib.Path,
        default="docs/benchmarks",
        help="the folder of the results",
    )
    options = parser.parse_args()
    compare_engine = {
        "jax": compare_jax,
        "tensorflow": compare_tensorflow,
        "torch": compare_torch,
    }[BACKEND]
    results = []
    for result in compare_engine(options.kinds, options.meshes):
        print(result, flush=True)
        results.append(result)
    options.output.mkdir(parents=True, exist_ok=True)
    files = {name: options.output / f"devices_{name}.json" for name in BACKENDS}
    files[BACKEND].write_text(json.dumps(results, indent=1) + "\n")
    by_backend = [json.loads(f.read_text()) for f in files.values() if f.exists()]
    results = [result for results in by_backend for result in results]
    (options.output / "devices.md").write_text(page(results))


# The model, its data and the comparison


def build_model(kind):
    """Creates a compiled model with one MoE layer, always with the same weights."""
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
    if kind in ADAPTED:
        # Before the model, which on PyTorch knows the parameters that it is built with.
        moe.build(x.shape)
        if ADAPTED[kind]:
            moe.quantize(ADAPTED[kind])
        moe.enable_lora(RANK)
    model = keras.Model(inputs, x + moe(x))
    model.compile(keras.optimizers.Adam(1e-3), "mse")
    return model


def make_data():
    """Returns the inputs and the targets of one batch."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(BATCH, LENGTH, HIDDEN)).astype("float32")
    y = np.tanh(x[..., ::-1])
    # Both halves have the same number of masked tokens, since losses are means over
    # the tokens of a replica.
    x[1 :: BATCH // 2, LENGTH // 2 :] = 0
    return x, y


def fit(model):
    """Trains a model, and returns its logs by name and its weights."""
    logs = model.fit(
        *make_data(), batch_size=BATCH, epochs=STEPS, shuffle=False, verbose=0
    )
    return logs.history, model.get_weights()


def compare(kind, where, actual, expected):
    """Compares logs and weights with those of one device.

    Args:
        kind: string, a key of `KINDS`.
        where: string, the mesh or the engine.
        actual: logs and weights on several devices, see `fit`.
        expected: logs and weights on one device.

    Returns:
        A dict with the largest differences of `"logs"`, of `"means of replicas"`
        (metrics that the other logs do not include) and of `"weights"`.
    """
    (logs, weights), (expected_logs, expected_weights) = actual, expected
    differences = {
        name: largest_difference([logs[name]], [x]) for name, x in expected_logs.items()
    }
    return {
        "kind": kind,
        "where": where,
        "means of replicas": max(differences.pop(n, 0.0) for n in REPLICA_MEANS),
        "logs": max(differences.values()),
        "weights": largest_difference(weights, expected_weights),
    }


def largest_difference(actual, expected):
    """Returns the largest absolute difference of two lists of arrays."""
    pairs = zip(actual, expected, strict=True)
    return float(max(np.abs(np.subtract(a, b)).max() for a, b in pairs))


# JAX


def compare_jax(kinds, meshes):
    """Yields the comparisons on meshes and on two processes."""
    import jax

    jax.config.update("jax_num_cpu_devices", 8)
    for kind in kinds:
        expected = fit(build_model(kind))
        for mesh in meshes:
            if kind in ADAPTED and mesh not in OF_ADAPTED:
                continue
            keras.distribution.set_distribution(distribution(mesh))
            model = build_model(kind)
            actual = fit(model)
            moved = {
                "bytes": collective_bytes(model),
                "formula": expected_bytes(kind, mesh),
            }
            keras.distribution.set_distribution(None)
            yield compare(kind, mesh, actual, expected) | moved
    for kind, arguments in ("tokens choose", []), ("dropless", ["--dropless"]):
        expected = run_example("--processes=1", "--devices=1", "--mesh=1,1", *arguments)
        actual = run_example(*arguments)
        yield compare(kind, "2x4, two processes", actual, expected)


def run_example(*arguments):
    """Returns the loss and the weights of `examples/many_devices.py`."""
    with tempfile.TemporaryDirectory() as folder:
        script = ROOT / "examples" / "many_devices.py"
        options = "--epochs=1", f"--output={folder}", *arguments
        command = [sys.executable, script, *options]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        model = keras.models.load_model(f"{folder}/model.keras")
        return {"loss": np.load(f"{folder}/loss.npy")}, model.get_weights()


def distribution(mesh):
    """Creates the `ModelParallel` distribution of a mesh such as `"2x4"`."""
    shape = mesh_shape(mesh)
    devices = keras.distribution.list_devices()[: math.prod(shape)]
    names = ["batch", "expert", "inner"][: len(shape)]
    mesh = keras.distribution.DeviceMesh(shape, names, devices)
    layout_map = keras_moe.distribution.expert_layout_map(
        mesh,
        axis="expert" if "expert" in names else "batch",
        inner_axis="inner" if "inner" in names else None,
    )
    return keras.distribution.ModelParallel(
        layout_map=layout_map, batch_dim_name="batch"
    )


def mesh_shape(mesh):
    """Returns the sizes of the axes of a mesh such as `"2x4"`."""
    return [int(n) for n in mesh.split("x")]


def collective_bytes(model):
    """Returns the bytes that each kind of collective returns to a device in a step."""
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
    shardings = None, tuple(jax.tree.map(lambda value: value.sharding, state))
    step = jax.jit(model.train_step, out_shardings=shardings)
    program = step.lower(tuple(state), data).compile().as_text()
    moved = collections.Counter()
    for results, name in OPERATION.findall(program):
        moved[name] += sum(
            math.prod(map(int, filter(None, shape.split(",")))) * int(bits or 8) // 8
            for _, bits, shape in ARRAY.findall(results)
        )
    return dict(moved)


def expected_bytes(kind, mesh):
    """Returns the bytes of each collective by the formulas of docs/scaling.md."""
    batch, *experts = mesh_shape(mesh)
    tokens = 4 * BATCH * LENGTH // batch * HIDDEN
    # With and without an axis of the inner layer, of those that are trained.
    if kind in ADAPTED:
        split, whole = RANK * 2 * D_FF + D_FF, RANK * 2 * HIDDEN + HIDDEN
    else:
        split, whole = 2 * HIDDEN * D_FF + D_FF, HIDDEN
    inner = experts[1] if len(experts) > 1 else 1
    expert_weights = 4 * EXPERTS * (split // inner + whole)
    other_weights = 4 * (HIDDEN * HIDDEN + HIDDEN + HIDDEN * EXPERTS + EXPERTS)
    moved = collections.Counter()
    if experts:
        if math.prod(experts) > 1:
            moved["all-reduce"] += 2 * tokens
        if inner > 1:  # Buffers and their gradients, with `K` slots per token.
            moved["all-reduce"] += 2 * K * tokens // experts[0]
        if batch > 1:
            moved["all-reduce"] += expert_weights // experts[0] + other_weights
    elif kind == "dropless":
        moved["all-gather"] += expert_weights
        moved["all-reduce"] += expert_weights + other_weights
    else:
        moved["all-to-all"] += 4 * K * tokens
        moved["all-reduce"] += other_weights
    return dict(moved)


# TensorFlow


def compare_tensorflow(kinds, _):
    """Yields the comparisons with two replicas of a `MirroredStrategy`."""
    import tensorflow as tf

    # With this optimization, weights may be updated before they are read, on a CPU
    # without XLA.
    tf.config.optimizer.set_experimental_options({"dependency_optimization": False})
    (cpu,) = tf.config.list_physical_devices("CPU")
    two = [tf.config.LogicalDeviceConfiguration()] * 2
    tf.config.set_logical_device_configuration(cpu, two)
    strategy = tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])
    for kind in kinds:
        expected = fit(build_model(kind))
        with strategy.scope():
            model = build_model(kind)
        yield compare(kind, "MirroredStrategy", fit(model), expected)


# PyTorch


def compare_torch(kinds, _):
    """Yields the comparisons with two processes of `DistributedDataParallel`."""
    import torch

    with tempfile.TemporaryDirectory() as folder:
        for processes in 1, 2:
            arguments = processes, folder, kinds
            torch.multiprocessing.spawn(train_replica, arguments, processes)
        for kind in kinds:
            (expected_logs, weights), (_, first), (logs, second) = (
                replica_results(f"{folder}/{kind}-{replica}.npz")
                for replica in ("0-of-1", "0-of-2", "1-of-2")
            )
            actual, expected = (logs, first + second), (expected_logs, 2 * weights)
            yield compare(kind, "DistributedDataParallel", actual, expected)


def replica_results(file):
    """Returns the losses and the weights of a process."""
    results = dict(np.load(file))
    return {"loss": results.pop("loss")}, list(results.values())


def train_replica(rank, processes, folder, kinds):
    """Trains on this process's part of each batch, in a custom training loop."""
    import torch

    torch.distributed.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store-{processes}",
        rank=rank,
        world_size=processes,
    )
    torch.set_num_threads(1)  # Leaves a core to the other process.
    size = BATCH // processes
    x, y = (torch.from_numpy(a[rank * size :][:size].copy()) for a in make_data())
    for kind in kinds:
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
    torch.distributed.barrier()
    # Destroying the group can wait forever: its thread may need the interpreter, to
    # free a tensor (PyTorch 2.13).
    os._exit(0)


# The page


def page(results):
    """Returns the Markdown page of all results."""
    lines = [
        "# Measurements on several devices",
        "",
        "Generated by `make bench-devices`. [Scaling](../scaling.md) explains the "
        "results.",
        "",
        "Training on several devices is compared with training on one device: "
        f"{STEPS} steps of",
        f"{BATCH} × {LENGTH} tokens, h {HIDDEN}, f {D_FF}, {EXPERTS} experts, k {K}.",
        "",
        "- Mesh or engine: a mesh `2x4` has two devices for the batch and four for",
        "  the experts; a mesh `8` has eight for both; `2x2x2` has two for the inner",
        "  layer of each expert, too. Two processes on JAX train the model of",
        "  `examples/many_devices.py`. `MirroredStrategy` (TensorFlow) has two",
        "  replicas, `DistributedDataParallel` (PyTorch) two processes.",
        "- Logs: the largest absolute difference of losses and metrics in any step.",
        "  With two processes, only the loss is compared. `router_confidence` and",
        "  `expert_usage` are left out, since each replica computes its own.",
        "- Weights: the largest absolute difference after the last step.",
        "- All-reduce, all-gather, all-to-all: the bytes that these collectives return",
        "  to one device in a training step and, in parentheses, the bytes by the",
        "  formulas in [Scaling](../scaling.md#memory-and-communication). Those in a",
        "  loop, as with an inner axis and dropless, are counted once.",
        f"- Adapters: LoRA with rank {RANK}, tokens choose. Their experts are frozen.",
    ]
    for kind in KINDS:
        lines += ["", f"## {kind.capitalize()}", ""]
        header = "mesh or engine", "logs", "weights", *COLLECTIVES[:3]
        lines += [f"| {' | '.join(header)} |", f"|{'---|' * len(header)}"]
        for row in results:
            if row["kind"] == kind:
                lines.append(f"| {' | '.join(cells(row))} |")
    return "\n".join(lines) + "\n"


def cells(row):
    """Yields the cells of a table row."""
    yield from (row["where"], f"{row['logs']:.0e}", f"{row['weights']:.0e}")
    moved, expected = row.get("bytes", {}), row.get("formula", {})
    for name in COLLECTIVES[:3]:
        is_used = name in moved
        yield f"{moved[name]:,} ({expected.get(name, 0):,})" if is_used else ""


if __name__ == "__main__":
    main()
