"""Training on meshes of devices, against one: differences, and bytes that move.

    export KERAS_BACKEND=jax XLA_FLAGS=--xla_force_host_platform_device_count=8
    python benchmarks/devices.py [--meshes 2x4 8x1 8] [--output runs]

trains a model on virtual CPU devices, reads the collectives off the compiled
training step, and holds their bytes beside those of the formulas in docs/scaling.md.
A mesh `2x4` has two devices for the batch and four for the experts; `8` has eight
for both.
"""

import argparse
import collections
import json
import math
import pathlib
import re

import jax
import keras
import numpy as np

import keras_moe

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
OPERATION = re.compile(rf" = (.*?) ({'|'.join(COLLECTIVES)})(?:-start)?\(")
ARRAY = re.compile(r"([a-z]+)(\d*)\[([\d,]*)\]")


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--kinds", nargs="*", default=list(KINDS), choices=KINDS)
    parser.add_argument("--meshes", nargs="*", default=MESHES)
    parser.add_argument("--output", type=pathlib.Path, default="runs")
    options = parser.parse_args()
    results = []
    for kind in options.kinds:
        alone = train(kind)
        for mesh in options.meshes:
            results.append(compare(kind, mesh, alone))
            print(results[-1], flush=True)
    options.output.mkdir(parents=True, exist_ok=True)
    file = options.output / "devices.json"
    file.write_text(json.dumps(results, indent=1) + "\n")
    (options.output / "devices.md").write_text(table(results))


def compare(kind, mesh, alone):
    keras.distribution.set_distribution(distribution(mesh))
    losses, weights, moved = train(kind)
    keras.distribution.set_distribution(None)
    pairs = zip(weights, alone[1], strict=True)
    return {
        "kind": kind,
        "mesh": mesh,
        "losses": float(np.abs(np.subtract(losses, alone[0])).max()),
        "weights": float(max(np.abs(a - b).max() for a, b in pairs)),
        "bytes": moved,
        "formula": formula(kind, mesh),
    }


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


def train(kind):
    """Losses, weights, and bytes that a step's collectives hand to a device."""
    keras.utils.set_random_seed(0)
    router, arguments, factor = KINDS[kind]
    inputs = keras.Input((LENGTH, HIDDEN))
    x = keras.layers.Dense(HIDDEN)(inputs)
    moe = keras_moe.MoeLayer(
        keras_moe.FeedForwardExperts(EXPERTS, D_FF, kernel_initializer="he_normal"),
        router(EXPERTS, **arguments),
        train_capacity_factor=factor,
        eval_capacity_factor=factor,
    )
    model = keras.Model(inputs, x + moe(x))
    model.compile(keras.optimizers.Adam(1e-3), "mse")
    rng = np.random.default_rng(0)
    x = rng.normal(size=(BATCH, LENGTH, HIDDEN)).astype("float32")
    y = np.tanh(x[..., ::-1])
    logs = model.fit(x, y, BATCH, epochs=STEPS, shuffle=False, verbose=0)
    return logs.history["loss"], model.get_weights(), collectives(model, x, y)


def collectives(model, x, y):
    """Bytes by collective, of the results that one device gets in a step."""
    state = [
        [variable.value for variable in variables]
        for variables in (
            model.trainable_variables,
            model.non_trainable_variables,
            model.optimizer.variables,
            model.metrics_variables,
        )
    ]
    if keras.distribution.distribution():
        layout = keras.distribution.distribution().get_data_layout(x.shape)
        x, y = (keras.distribution.distribute_tensor(a, layout) for a in (x, y))
    where = None, tuple(jax.tree.map(lambda value: value.sharding, state))
    step = jax.jit(model.train_step, out_shardings=where)
    program = step.lower(tuple(state), (x, y)).compile().as_text()
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


def table(results):
    lines = [
        "# Devices",
        "",
        "Written by `make bench-devices`; docs/scaling.md explains",
        "it. One device against several after "
        f"{STEPS} steps of {BATCH} × {LENGTH} tokens, h {HIDDEN}, f {D_FF}, "
        f"{EXPERTS} experts, k {K}.",
        "Bytes are those of the results that the collectives of a training step hand",
        "to one device; in brackets, those of the formulas.",
        "",
        "| | mesh | losses differ by | weights by | all-reduce | all-gather "
        "| all-to-all |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in results:
        cells = [
            f"{row['bytes'].get(name, 0):,} ({row['formula'].get(name, 0):,})"
            for name in COLLECTIVES[:3]
        ]
        differences = f"{row['losses']:.0e} | {row['weights']:.0e}"
        lines.append(
            f"| {row['kind']} | {row['mesh']} | {differences} | {' | '.join(cells)} |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
