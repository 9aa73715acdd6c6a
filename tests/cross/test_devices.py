"""Training on several devices equals training on one, on every backend."""

import json

import numpy as np
import pytest
from backends import BACKENDS, TESTS, run_python, start_two, virtual_devices

KINDS = "tokens choose", "dropless", "experts choose", "bias and batch balanced"


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """Results of the benchmark, by backend."""
    folder = tmp_path_factory.mktemp("devices")
    script = TESTS.parent / "benchmarks" / "devices.py"
    for backend in BACKENDS:
        chosen = "--kinds", *KINDS, "--meshes", "2x4", "8x1", "8"
        run_python(script, *chosen, "--output", folder, backend=backend)
    assert (folder / "devices.md").read_text().count("| 2x4 |") == 4
    return {
        backend: json.loads((folder / f"devices_{backend}.json").read_text())
        for backend in BACKENDS
    }


@pytest.mark.parametrize(
    "backend, rows",
    [
        # Four kinds of routing on three meshes, and two kinds on two processes.
        ("jax", 14),
        # Four kinds of routing on two replicas.
        ("tensorflow", 4),
        # Four kinds of routing on two processes.
        ("torch", 4),
    ],
)
def test_several_devices_match_one(measured, backend, rows):
    assert len(measured[backend]) == rows
    for row in measured[backend]:
        assert row["logs"] < 1e-4, row
        assert row["weights"] < 1e-4, row
        assert row["means of replicas"] < 0.2, row


def test_communication_matches_the_formula(measured):
    """The transfers match the formula, apart from the router's probabilities."""
    tokens, experts = 16 * 64, 16
    meshes = [row for row in measured["jax"] if "bytes" in row]
    assert len(meshes) == 12
    for row in meshes:
        moved, expected = sum(row["bytes"].values()), sum(row["formula"].values())
        assert 0.99 * expected <= moved, row
        router_bytes = 4 * experts * tokens // int(row["where"].split("x")[0])
        assert moved <= 1.02 * expected + 4 * router_bytes, row
        largest = max(row["bytes"], key=row["bytes"].get)
        assert largest == max(row["formula"], key=row["formula"].get)


ADAPTED = """
import keras
import numpy as np
import keras_moe

x = np.random.default_rng(0).normal(size=(8, 16, 8)).astype("float32")

def outputs(mode, factor):
    keras.utils.set_random_seed(0)
    inputs = keras.Input((16, 8))
    layer = keras_moe.MoeLayer(
        keras_moe.FeedForwardExperts(8, 12, kernel_initializer="he_normal"),
        keras_moe.MaskedRouter(8, num_selected_experts=2),
        train_capacity_factor=factor, eval_capacity_factor=factor)
    model = keras.Model(inputs, layer(inputs))
    if mode:
        layer.quantize(mode)
    layer.enable_lora(2)
    for weight in layer.weights:
        if "lora" in weight.name:
            weight.assign(0.3 * np.random.default_rng(1).normal(size=weight.shape))
    model.compile(keras.optimizers.SGD(0.1), "mse")
    for _ in range(2):
        model.train_on_batch(x, x)
    if keras.distribution.distribution() is not None:
        for weight in layer.experts.weights:
            assert weight.value.sharding.spec[0] == "expert", weight.path
    return model.predict_on_batch(x)

cases = [(mode, factor) for mode in (None, "int8", "int4") for factor in (2.0, None)]
alone = [outputs(*case) for case in cases]
for shape, inner_axis in ((2, 4), None), ((2, 2, 2), "inner"):
    mesh = keras.distribution.DeviceMesh(
        shape, ["batch", "expert", "inner"][:len(shape)],
        keras.distribution.list_devices()[:8])
    layout_map = keras_moe.distribution.expert_layout_map(mesh, inner_axis=inner_axis)
    keras.distribution.set_distribution(keras.distribution.ModelParallel(
        layout_map=layout_map, batch_dim_name="batch"))
    for case, expected in zip(cases, alone):
        found = outputs(*case)
        np.testing.assert_allclose(found, expected, atol=1e-5, err_msg=str(case))
"""


def test_adapters_and_quantized_experts_on_several_devices():
    """Split over the meshes 2 x 4 and 2 x 2 x 2 with their scales, as on one device."""
    run_python("-c", ADAPTED, backend="jax", **virtual_devices(8))


DATASET = """
import sys
import keras
import numpy as np
import tensorflow as tf
import keras_moe

folder, *two = sys.argv[1:]
if two:
    import jax
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    keras.distribution.initialize(two[1], 2, int(two[0]))
mesh = keras.distribution.DeviceMesh(
    (2, 4), ["batch", "expert"], keras.distribution.list_devices()[:8])
keras.distribution.set_distribution(keras.distribution.ModelParallel(
    layout_map=keras_moe.distribution.expert_layout_map(mesh), batch_dim_name="batch"))
keras.utils.set_random_seed(0)
inputs = keras.Input((16, 8))
layer = keras_moe.MoeLayer(
    keras_moe.FeedForwardExperts(8, 12, kernel_initializer="he_normal"),
    keras_moe.BiasBalancedMaskedRouter(8, bias_update_rate=0.1))
model = keras.Model(inputs, inputs + layer(inputs))
model.compile(keras.optimizers.SGD(0.1), "mse")
x = np.random.default_rng(0).normal(size=(24, 16, 8)).astype("float32")
dataset = tf.data.Dataset.from_tensor_slices((x, x[:, ::-1])).batch(8)
history = model.fit(dataset, epochs=2, verbose=0).history
if two[:1] != ["1"]:
    np.savez(f"{folder}/{len(two)}.npz", *history.values(), *model.get_weights())
"""


def test_two_processes_share_a_dataset(tmp_path):
    """A `tf.data.Dataset` of whole batches, which Keras splits over processes (JAX)."""
    run_python("-c", DATASET, tmp_path, backend="jax", **virtual_devices(8))
    for process in start_two("-c", DATASET, tmp_path):
        process.communicate()
        assert process.returncode == 0
    one, two = (np.load(tmp_path / f"{n}.npz") for n in (0, 2))
    for name in one.files:
        np.testing.assert_allclose(two[name], one[name], atol=1e-5)


FAILED_STEP = """
import keras
import numpy as np
import tensorflow as tf

import keras_moe

keras.utils.set_random_seed(0)
(cpu,) = tf.config.list_physical_devices("CPU")
two = [tf.config.LogicalDeviceConfiguration()] * 2
tf.config.set_logical_device_configuration(cpu, two)
must_fail = True

class Failing(keras.layers.Layer):
    def call(self, inputs):
        context = tf.distribute.get_replica_context()
        if must_fail and context is not None and context.num_replicas_in_sync == 2:
            if tf.get_static_value(context.replica_id_in_sync_group) == 0:
                raise RuntimeError("only on the first replica")
        return inputs

with tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"]).scope():
    inputs = keras.Input((8, 16))
    layer = keras_moe.MoeLayer(
        keras_moe.FeedForwardExperts(4, 8),
        keras_moe.BiasBalancedMaskedRouter(4, bias_update_rate=0.1))
    model = keras.Model(inputs, Failing()(layer(inputs)))
    model.compile("sgd", "mse")
x = np.random.default_rng(0).normal(size=(8, 8, 16))
try:
    model.fit(x, x, batch_size=8, verbose=0)
    raise AssertionError("The step did not fail.")
except RuntimeError:
    must_fail = False
model.fit(x, x, batch_size=8, verbose=0)
assert np.abs(layer.router.expert_bias.numpy()).max() > 0
"""


def test_replicas_train_after_a_step_that_failed_on_one():
    """The replicas must not wait for sums of the failed step."""
    run_python("-c", FAILED_STEP, backend="tensorflow", timeout=300)
