"""What our dense layers take from those of Keras, by name.

If a version of Keras renames or changes a part, the test that fails says which.
"""

import inspect

import keras
import pytest
from versions import WITH_QUANTIZATION, needs_keras

from keras_moe.experts.adaptation import AdaptableDense
from keras_moe.experts.dense import Dense
from keras_moe.experts.expert_dense import ExpertDense

# The methods of Keras that ours override, and their parameters in Keras.
METHODS = {
    "build": ["input_shape"],
    "call": ["inputs", "training"],
    "enable_lora": ["rank", "lora_alpha", "a_initializer", "b_initializer"],
    "load_own_variables": ["store"],
    "quantize": ["mode", "type_check", "config"],
    "quantized_build": ["kernel_shape", "mode", "config"],
    "quantized_call": ["args", "kwargs"],
    "save_own_variables": ["store"],
}
# Those of `keras.layers.Layer` whose parameters are forwarded as they are.
FORWARDED = {"add_weight"}
# Attributes that Keras sets and ours read.
BUILT = ["_kernel", "bias", "lora_enabled", "quantization_mode", "quantization_config"]
WITH_ADAPTERS = ["lora_kernel_a", "lora_kernel_b", "lora_alpha", "lora_rank"]

pytestmark = needs_keras(WITH_QUANTIZATION, "quantizes experts")


def test_overridden_methods():
    overridden = {
        name
        for ours, theirs in (
            (AdaptableDense, keras.layers.Dense),
            (ExpertDense, keras.layers.EinsumDense),
        )
        for name, value in vars(ours).items()
        if inspect.isfunction(value) and hasattr(theirs, name)
    }
    assert overridden - {"__init__"} == METHODS.keys() | FORWARDED


@pytest.mark.parametrize("layer", [keras.layers.Dense, keras.layers.EinsumDense])
@pytest.mark.parametrize("name", METHODS)
def test_parameters(layer, name):
    _, *parameters = inspect.signature(getattr(layer, name)).parameters
    assert parameters == METHODS[name]


@pytest.mark.parametrize("make", [lambda: Dense(4), lambda: ExpertDense(2, 4)])
def test_attributes(make):
    layer = make()
    layer.build((1, 2, None, 6))
    for name in BUILT:
        assert hasattr(layer, name), name
    layer.enable_lora(2)
    for name in WITH_ADAPTERS:
        assert hasattr(layer, name), name
    assert isinstance(keras.layers.EinsumDense.kernel, property)
