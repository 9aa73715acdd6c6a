"""Files written on one backend load on the others, in a fresh process."""

import pytest
from backends import BACKENDS, run

WRITE = """
import sys
import keras
import numpy as np
import keras_moe

def make(router, **kwargs):
    experts = keras_moe.FeedForwardExperts(4, 16, kernel_initializer="he_normal")
    return keras_moe.MoeLayer(experts, router, train_capacity_factor=2.0, **kwargs)

keras.utils.set_random_seed(0)
x = keras.Input((None, 8))
y = x + make(keras_moe.BiasBalancedMaskedRouter(4, bias_update_rate=0.001))(x)
y = y + keras_moe.MoeLayerWithBackbone(
    make(keras_moe.ExpertsChooseMaskedRouter(4), examples_per_group=2), 8)(y)
y = y + keras_moe.SoftMoeLayer(keras_moe.FeedForwardExperts(4, 16))(y)
y = y + keras_moe.HierarchicalMoeLayer(
    keras_moe.FeedForwardExperts(4, 16),
    keras_moe.Top2MaskedRouter(2, name="outer"),
    keras_moe.Top2MaskedRouter(2, name="inner"))(y)
model = keras.Model(x, y)
model.compile("adam", "mse")
data = np.random.default_rng(0).normal(size=(5, 12, 8)).astype("float32")
weights = keras.callbacks.ModelCheckpoint(
    sys.argv[1] + "/checkpoint.weights.h5", save_weights_only=True)
model.fit(data, data, verbose=0, callbacks=[weights])
model.save(sys.argv[1] + "/model.keras")
np.savez(sys.argv[1] + "/data.npz", x=data, y=model.predict(data, verbose=0))
"""

READ = """
import pathlib
import sys
import keras
import numpy as np
import keras_moe

folders = sorted(pathlib.Path(sys.argv[1]).iterdir())
others = [x for x in folders if x.name != keras.backend.backend()]
assert len(others) == 2
for folder in others:
    model = keras.models.load_model(folder / "model.keras", compile=False)
    data = np.load(folder / "data.npz")
    new = keras.models.clone_model(model)
    new.load_weights(folder / "checkpoint.weights.h5")
    for a, b in zip(model.get_weights(), new.get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)
    found = model.predict(data["x"], verbose=0)
    np.testing.assert_allclose(found, data["y"], atol=1e-4)
model.compile("adam", "mse")
losses = model.fit(data["x"], data["x"], epochs=20, verbose=0).history["loss"]
assert losses[-1] < losses[0], losses
"""


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A folder with the files of each backend."""
    folder = tmp_path_factory.mktemp("written")
    for backend in BACKENDS:
        (folder / backend).mkdir()
        run(WRITE, backend, folder / backend)
    return folder


@pytest.mark.parametrize("backend", BACKENDS)
def test_files_of_other_backends_load_and_train(backend, written):
    run(READ, backend, written)


# A model with layers that are quantized, have adapters, or both, each with an output.
WRITE_ADAPTED = """
import itertools
import sys
import keras
import numpy as np
import keras_moe

quantizers = keras.quantizers
CONFIGS = {
    "float": None,
    "int8": quantizers.Int8QuantizationConfig(),
    "int8_weights": quantizers.Int8QuantizationConfig(activation_quantizer=None),
    "int4": quantizers.Int4QuantizationConfig(),
    "int4_blocks": quantizers.Int4QuantizationConfig(block_size=3),
    "int4_channels": quantizers.Int4QuantizationConfig(block_size=None),
}
inputs, outputs = keras.Input((None, 8)), {}
# Each config with adapters and without, once with a capacity and once dropless.
for i, (name, adapters) in enumerate(itertools.product(CONFIGS, (False, True))):
    factor = 2.0 if (i // 2 + adapters) % 2 else None
    moe = keras_moe.MoeLayer(
        keras_moe.FeedForwardExperts(4, 15, kernel_initializer="he_normal"),
        keras_moe.MaskedRouter(4, num_selected_experts=2),
        train_capacity_factor=factor, eval_capacity_factor=factor)
    layer = keras_moe.MoeLayerWithBackbone(moe, 8)
    outputs[f"{name}-{adapters}-{factor}"] = layer(inputs)
    if CONFIGS[name]:
        layer.quantize(config=CONFIGS[name])
    if adapters:
        layer.enable_lora(2, lora_alpha=3)
        for weight in layer.weights:
            if "lora" in weight.name:
                weight.assign(0.3 * np.random.default_rng(1).normal(size=weight.shape))
model = keras.Model(inputs, outputs)
x = np.random.default_rng(0).normal(size=(5, 12, 8)).astype("float32")
np.savez(sys.argv[1] + "/expected.npz", x=x, **model.predict(x, verbose=0))
model.save(sys.argv[1] + "/model.keras")
"""

READ_ADAPTED = """
import pathlib
import sys
import keras
import numpy as np
import keras_moe

folders = sorted(pathlib.Path(sys.argv[1]).iterdir())
assert len(folders) == 3
for folder in folders:
    expected = dict(np.load(folder / "expected.npz"))
    model = keras.models.load_model(folder / "model.keras")
    found = model.predict(expected.pop("x"), verbose=0)
    assert len(expected) == 12
    for name, outputs in expected.items():
        error = np.abs(found[name] - outputs).max() / np.abs(outputs).max()
        print(f"{folder.name} on {keras.backend.backend()}, {name}: {error:.1e}")
        # Where inputs are rounded, backends may differ by a step.
        equal = folder.name == keras.backend.backend() or not name.startswith("int8-")
        assert error < (1e-6 if equal else 1e-2), (folder.name, name, error)
"""


@pytest.fixture(scope="module")
def written_adapted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("written")
    for backend in BACKENDS:
        (folder / backend).mkdir()
        run(WRITE_ADAPTED, backend, folder / backend)
    return folder


@pytest.mark.parametrize("backend", BACKENDS)
def test_quantized_and_adapted_experts_have_equal_outputs(backend, written_adapted):
    run(READ_ADAPTED, backend, written_adapted)
