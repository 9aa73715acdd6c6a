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

x = keras.Input((None, 8))
y = x + make(keras_moe.BiasBalancedMaskedRouter(4, bias_update_rate=0.1))(x)
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
