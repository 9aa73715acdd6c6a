"""On meshes of eight devices (JAX): all routers, a third axis, files between meshes."""

import importlib.util

import pytest
from backends import run_python, virtual_devices

PREAMBLE = """
import sys
import keras
import numpy as np
import keras_moe
from samples import E, F, H, ROUTERS

def use(shape, names, **axes):
    devices = keras.distribution.list_devices()[:8]
    mesh = keras.distribution.DeviceMesh(shape, names, devices)
    layout_map = keras_moe.distribution.expert_layout_map(mesh, **axes)
    keras.distribution.set_distribution(keras.distribution.ModelParallel(
        layout_map=layout_map, batch_dim_name="batch"))

x = np.random.default_rng(0).normal(size=(8, 12, H)).astype("float32")
"""

ROUTERS_PROGRAM = """
def train(router, factor):
    keras.utils.set_random_seed(0)
    inputs = keras.Input((12, H))
    layer = keras_moe.MoeLayer(
        keras_moe.FeedForwardExperts(E, F, kernel_initializer="he_normal"), router(),
        train_capacity_factor=factor, eval_capacity_factor=factor, name="moe")
    model = keras.Model(inputs, inputs + layer(inputs))
    model.compile(keras.optimizers.SGD(0.1), "mse")
    logs = [model.train_on_batch(x, x[:, ::-1], return_dict=True) for _ in range(3)]
    return logs, model.get_weights()

cases = [(name, factor) for name in ROUTERS for factor in (1.0, None)
         if factor or ROUTERS[name]().supports_dropless]
alone = [train(ROUTERS[name], factor) for name, factor in cases]
for shape, names, axes in (
    ((2, 4), ["batch", "expert"], {}),
    ((2, 2, 2), ["batch", "expert", "inner"], {"inner_axis": "inner"}),
):
    use(shape, names, **axes)
    largest = 0.0
    for (name, factor), (logs, weights) in zip(cases, alone, strict=True):
        found_logs, found = train(ROUTERS[name], factor)
        case = f"{name}, {factor}, {shape}"
        for step, expected in zip(found_logs, logs, strict=True):
            for key in expected:
                np.testing.assert_allclose(step[key], expected[key], atol=1e-5,
                                           rtol=1e-5, err_msg=f"{case}: {key}")
        for a, b in zip(found, weights, strict=True):
            np.testing.assert_allclose(a, b, atol=1e-5, err_msg=case)
            largest = max(largest, np.abs(a - b).max())
    print(f"{len(cases)} cases on {shape}: weights differ by up to {largest:g}")
"""

FILES_PROGRAM = """
def build():
    keras.utils.set_random_seed(0)
    inputs = keras.Input((12, H))
    layer = keras_moe.MoeLayer(
        keras_moe.FeedForwardExperts(8, F, kernel_initializer="he_normal"),
        keras_moe.BiasBalancedMaskedRouter(8, bias_update_rate=0.1), name="moe")
    model = keras.Model(inputs, inputs + layer(inputs))
    model.compile(keras.optimizers.Adam(0.1), "mse")
    model.optimizer.build(model.trainable_variables)
    return model

def state(model):
    return [np.asarray(v.value) for v in (*model.weights, *model.optimizer.variables)]

meshes = [
    ((2, 4), ["batch", "expert"], {}),
    ((8,), ["batch"], {"axis": "batch"}),
    ((2, 2, 2), ["batch", "expert", "inner"], {"inner_axis": "inner"}),
    None,
]
for i, mesh in enumerate(meshes):
    keras.distribution.set_distribution(None)
    if mesh:
        use(*mesh[:2], **mesh[2])
    model = build()
    checkpoint = keras.callbacks.OrbaxCheckpoint(f"{sys.argv[1]}/{i}")
    model.fit(x, x[:, ::-1], batch_size=8, epochs=2, verbose=0,
              callbacks=[checkpoint])
    checkpoint.wait_until_finished()
    expected = state(model)
    model.save(f"{sys.argv[1]}/{i}.keras")
    model.save_weights(f"{sys.argv[1]}/{i}.weights.h5")
    for other in meshes:
        keras.distribution.set_distribution(None)
        if other:
            use(*other[:2], **other[2])
        loaded = keras.models.load_model(f"{sys.argv[1]}/{i}.keras")
        by_weights, by_orbax = build(), build()
        by_weights.load_weights(f"{sys.argv[1]}/{i}.weights.h5")
        by_orbax.load_weights(f"{sys.argv[1]}/{i}")
        for found, number in (
            (loaded, len(expected)),
            (by_weights, len(model.weights)),
            (by_orbax, len(model.weights)),
        ):
            for a, b in zip(state(found)[:number], expected[:number], strict=True):
                np.testing.assert_array_equal(a, b, err_msg=f"{mesh} to {other}")
        if other and other[0] == (2, 4):
            kernel = by_orbax.get_layer("moe").experts.intermediate_layer.kernel
            assert kernel.value.sharding.spec[0] == "expert"
"""


def run(program, *arguments):
    eight = virtual_devices(8)
    run_python("-c", PREAMBLE + program, *arguments, backend="jax", **eight)


def test_every_router_matches_one_device():
    run(ROUTERS_PROGRAM)


@pytest.mark.skipif(
    importlib.util.find_spec("orbax") is None, reason="needs Orbax: `make test-all`"
)
def test_files_of_one_mesh_load_on_another(tmp_path):
    run(FILES_PROGRAM, tmp_path)
