"""A mixture of experts on several processes with several devices each (JAX).

    python examples/many_devices.py

starts two processes with four virtual CPU devices each, like two hosts with four
accelerators. The eight devices are a mesh of two by four: each half of the batch is on
four devices, and each of these has a quarter of the experts. The model is built,
compiled and fitted as on one device. Before that, `main` sets the distribution;
afterwards, it gathers the weights to save them.

On several hosts, start one process on each, with its number and the addresses of all
processes (the first is the coordinator's):

    python examples/many_devices.py --process 0 --addresses host0:1234,host1:1234
"""

import argparse
import os
import socket
import subprocess
import sys

EXPERTS, HIDDEN, LENGTH, BATCH = 16, 16, 32, 32


def read_options():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--mesh", default="2,4", help="devices for batch, experts")
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--dropless", action="store_true", help="without a capacity")
    parser.add_argument("--output", help="folder for the model and its losses")
    parser.add_argument("--process", type=int, help="number of this process")
    parser.add_argument("--addresses", help="addresses of all processes")
    parser.add_argument("--processes", type=int, default=2, help="processes to start")
    parser.add_argument("--devices", type=int, default=4, help="per process")
    return parser.parse_args()


def start_here(options):
    """Starts all processes on this machine."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    addresses = ",".join([address] * options.processes)
    devices = f"--xla_force_host_platform_device_count={options.devices}"
    flags = f"{os.environ.get('XLA_FLAGS', '')} {devices}"
    # A sum over processes blocks a thread until the other process reaches it. With
    # JAX's default, one thread per device, different sums may block all of them.
    threads = str(8 * options.devices)
    own = {"KERAS_BACKEND": "jax", "XLA_FLAGS": flags, "NPROC": threads}
    environment = {**os.environ, **own}
    command = [sys.executable, *sys.argv, "--addresses", addresses, "--process"]
    processes = [
        subprocess.Popen([*command, str(i)], env=environment)
        for i in range(options.processes)
    ]
    sys.exit(max(process.wait() for process in processes))


def make_data():
    """Returns tokens of sixteen kinds; each kind has its own linear map to targets."""
    rng = np.random.default_rng(0)
    centers = rng.normal(size=(EXPERTS, HIDDEN))
    rules = rng.normal(size=(EXPERTS, HIDDEN, HIDDEN)) / HIDDEN**0.5
    kind = rng.integers(EXPERTS, size=(20 * BATCH, LENGTH))
    x = centers[kind] + 0.3 * rng.normal(size=(*kind.shape, HIDDEN))
    y = np.einsum("bsh,bshi->bsi", x, rules[kind])
    return x.astype("float32"), y.astype("float32")


def batches(x, y, shard, shards):
    """Yields the part of each batch that this process feeds."""
    own = BATCH // shards
    while True:
        for start in range(0, len(x), BATCH):
            part = slice(start + shard * own, start + (shard + 1) * own)
            yield x[part], y[part]


def build_model(capacity_factor):
    inputs = keras.Input((LENGTH, HIDDEN))
    tokens = keras.layers.Dense(2 * HIDDEN)(inputs)
    moe = keras_moe.MoeLayer(
        keras_moe.FeedForwardExperts(EXPERTS, 64, kernel_initializer="he_normal"),
        keras_moe.MaskedRouter(EXPERTS, num_selected_experts=2),
        train_capacity_factor=capacity_factor,
        eval_capacity_factor=capacity_factor,
        name="moe",
    )
    return keras.Model(inputs, keras.layers.Dense(HIDDEN)(tokens + moe(tokens)))


def whole(variables, mesh):
    """Returns variables as numpy arrays, gathered from all devices."""
    layout = keras.distribution.TensorLayout([], mesh)
    everywhere = jax.jit(lambda x: x, out_shardings=layout.backend_layout)
    return [np.asarray(everywhere(variable.value)) for variable in variables]


def main(options):
    mesh = [int(n) for n in options.mesh.split(",")]
    if "," in options.addresses:
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        count = options.addresses.count(",") + 1
        keras.distribution.initialize(options.addresses, count, options.process)
    mesh = keras.distribution.DeviceMesh(mesh, ["batch", "expert"])
    distribution = keras.distribution.ModelParallel(
        layout_map=keras_moe.distribution.expert_layout_map(mesh),
        batch_dim_name="batch",
        auto_shard_dataset=False,  # Each process selects its part itself.
    )
    keras.distribution.set_distribution(distribution)
    keras.utils.set_random_seed(0)
    capacity_factor = None if options.dropless else 2.0
    model = build_model(capacity_factor)
    model.compile(keras.optimizers.Adam(0.01), "mse")
    shards = min(distribution.num_model_replicas, distribution.num_processes)
    history = model.fit(
        batches(*make_data(), distribution.data_shard_id, shards),
        steps_per_epoch=20,
        shuffle=False,
        epochs=options.epochs,
        verbose=2 if options.process == 0 else 0,
    )
    weights = whole(model.weights, mesh)
    keras.distribution.set_distribution(None)
    if options.process == 0 and options.output:
        # A model on one device, with the whole weights, can be saved.
        model = build_model(capacity_factor)
        model.set_weights(weights)
        model.save(f"{options.output}/model.keras")
        np.save(f"{options.output}/loss.npy", history.history["loss"])


if __name__ == "__main__":
    options = read_options()
    if options.process is None:
        start_here(options)
    os.environ.setdefault("KERAS_BACKEND", "jax")
    import jax
    import keras
    import numpy as np

    import keras_moe

    main(options)
