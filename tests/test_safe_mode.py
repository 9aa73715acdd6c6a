"""A file that holds code: Keras's safe mode refuses it, as SECURITY.md says."""

import keras
import numpy as np
import pytest
from layer_check import functional

import keras_moe


def test_code_among_the_experts_is_refused(rng, tmp_path):
    experts = [keras.layers.Lambda(lambda x: 2 * x), keras_moe.FeedForward(8)]
    layer = keras_moe.MoeLayer(
        keras_moe.HeterogeneousExperts(experts), keras_moe.MaskedRouter(2)
    )
    model = functional(layer, (4, 6))
    model.save(tmp_path / "model.keras")
    with pytest.raises(ValueError, match=r"Lambda.*arbitrary code"):
        keras.models.load_model(tmp_path / "model.keras")
    with pytest.raises(ValueError, match=r"Lambda.*arbitrary code"):
        keras_moe.MoeLayer.from_config(layer.get_config())

    # Who trusts the file says so.
    x = rng.normal(size=(2, 4, 6)).astype("float32")
    loaded = keras.models.load_model(tmp_path / "model.keras", safe_mode=False)
    expected = model.predict_on_batch(x)
    np.testing.assert_allclose(loaded.predict_on_batch(x), expected, atol=1e-6)
