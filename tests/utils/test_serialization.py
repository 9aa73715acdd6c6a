"""Dtype policies of layers that are made of others."""

import keras
import numpy as np
import pytest
from keras import ops
from keras.dtype_policies import DTypePolicyMap

import keras_moe
from keras_moe.utils.serialization import base_dtype_policy

E, F, H, T = 4, 8, 6, 5


def make(dtype=None):
    experts = keras_moe.FeedForwardExperts(E, F, dtype=dtype)
    moe = keras_moe.MoeLayer(
        experts, keras_moe.MaskedRouter(E, dtype=dtype), dtype=dtype
    )
    return keras_moe.MoeLayerWithBackbone(moe, F, dtype=dtype)


def test_base_dtype_policy():
    policies = DTypePolicyMap(
        default_policy="float32",
        policy_map={"a": "int8_from_mixed_bfloat16", "b": "mixed_float16"},
    )
    found = base_dtype_policy(policies)
    assert found.default_policy.name == "float32"
    assert {path: policy.name for path, policy in found.items()} == {
        "a": "mixed_bfloat16",
        "b": "mixed_float16",
    }
    assert base_dtype_policy(keras.dtype_policies.get("int8_from_float32")).name == (
        "float32"
    )


@pytest.mark.parametrize("is_global", [False, True])
def test_a_map_of_dtype_policies(is_global, rng, tmp_path):
    """As an argument, or as the policy of all layers."""
    policies = DTypePolicyMap(default_policy="mixed_bfloat16")
    x = rng.normal(size=(2, T, H)).astype("float32")
    if is_global:
        keras.config.set_dtype_policy(policies)
    try:
        layer = make(None if is_global else policies)
        inputs = keras.Input((T, H), dtype="float32")
        model = keras.Model(inputs, layer(inputs))
        model.compile("sgd", "mse")
        model.train_on_batch(x, x)
        assert keras.backend.standardize_dtype(model(x).dtype) == "bfloat16"
        model.save(tmp_path / "model.keras")
        loaded = keras.models.load_model(tmp_path / "model.keras")
    finally:
        keras.config.set_dtype_policy("float32")
    np.testing.assert_array_equal(
        *(ops.convert_to_numpy(ops.cast(m(x), "float32")) for m in (model, loaded))
    )
