"""Quantized experts: outputs close to the original ones, and equal routing."""

import warnings

import keras
import numpy as np
import pytest
from keras import ops
from layer_check import functional

import keras_moe

E, F, H, T = 4, 32, 16, 24
GPTQ = keras.quantizers.GPTQConfig(dataset=["text"], tokenizer=str.split)
AWQ = keras.quantizers.AWQConfig(dataset=["text"], tokenizer=str.split)


def make_model(factor, **experts):
    layer = keras_moe.MoeLayer(
        keras_moe.FeedForwardExperts(E, F, kernel_initializer="he_normal", **experts),
        keras_moe.MaskedRouter(
            E,
            num_selected_experts=2,
            hidden_layers=8,
            kernel_initializer="he_normal",
        ),
        train_capacity_factor=factor,
        eval_capacity_factor=factor,
        name="moe",
    )
    return functional(layer, (T, H))


def quantize(model, mode):
    with warnings.catch_warnings():
        # Keras warns about every layer that cannot be quantized.
        warnings.filterwarnings("ignore", message=".*does not have a `quantize`")
        model.quantize(mode)


def distance(found, expected):
    return np.abs(found - expected).mean() / np.abs(expected).mean()


@pytest.fixture
def x(rng):
    return rng.normal(size=(3, T, H)).astype("float32")


CASES = [
    ("int8", 2.0, {}),
    ("int8", None, {}),
    pytest.param(
        "int8", None, {"gated": True, "use_bias": False}, marks=pytest.mark.thorough
    ),
    pytest.param("int8", None, {"dtype": "mixed_bfloat16"}, marks=pytest.mark.thorough),
    ("int4", 2.0, {}),
]


@pytest.mark.parametrize(("mode", "factor", "experts"), CASES)
def test_quantized_experts(mode, factor, experts, x, tmp_path):
    model = make_model(factor, **experts)
    moe = model.get_layer("moe")
    expected = model.predict_on_batch(x)
    routing = [ops.convert_to_numpy(part) for part in moe.route(x)]
    quantize(model, mode)

    for weight in moe.router.weights:
        assert weight.dtype == "float32"
    for part, before in zip(moe.route(x), routing, strict=True):
        np.testing.assert_array_equal(ops.convert_to_numpy(part), before)
    for weight in moe.experts.weights:
        if weight.name == "kernel":
            assert weight.dtype == "int8"
    found = model.predict_on_batch(x)
    assert distance(found, expected) < {"int8": 0.03, "int4": 0.3}[mode]

    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    np.testing.assert_array_equal(loaded.predict_on_batch(x), found)
    dtypes = [w.dtype for w in loaded.get_layer("moe").weights]
    assert dtypes == [w.dtype for w in moe.weights]


def test_int8_rows_match_the_dequantized_kernel(x):
    """Only the weights are quantized, so that the outputs differ by rounding only."""
    model = make_model(None)
    quantize(model, "int8")
    experts = model.get_layer("moe").experts
    dense = experts.intermediate_layer
    rows = x.reshape(-1, H)
    sizes = np.array([10, 0, 40, 22], "int32")
    found = dense(rows, group_sizes=ops.convert_to_tensor(sizes))
    kernel, bias = (ops.convert_to_numpy(w) for w in (dense.kernel, dense.bias))
    scale = ops.convert_to_numpy(dense.kernel_scale).reshape(E, 1, F)
    group = np.repeat(np.arange(E), sizes)
    expected = np.einsum("ah,ahf->af", rows, (kernel / scale)[group]) + bias[group, 0]
    np.testing.assert_allclose(ops.convert_to_numpy(found), expected, atol=1e-4)


@pytest.mark.parametrize(
    ("mode", "factor", "config", "message"),
    [
        ("int4", None, None, "int8 quantization only.*'int4'.*'moe/experts/"),
        ("float8", None, None, "int8 quantization only.*'float8'.*'moe/experts/"),
        ("gptq", 2.0, GPTQ, "cannot be quantized with 'gptq'.*'moe/experts/"),
        ("awq", 2.0, AWQ, "cannot be quantized with 'awq'.*'moe/experts/"),
    ],
)
def test_refused_modes_change_nothing(mode, factor, config, message, x):
    model = make_model(factor)
    before = model.predict_on_batch(x)
    for dense in model.get_layer("moe").experts.dense_layers:
        with pytest.raises(ValueError, match=message):
            dense.quantize(mode, config=config)
    np.testing.assert_array_equal(model.predict_on_batch(x), before)


def test_int4_needs_a_capacity_in_training_too(x):
    model = make_model(2.0)
    quantize(model, "int4")
    model.predict_on_batch(x)
    model.get_layer("moe").eval_capacity_factor = None
    model.make_predict_function(force=True)
    with pytest.raises(ValueError, match=r"int8 quantization only.*int4"):
        model.predict_on_batch(x)


@pytest.mark.parametrize(
    "factor", [None, pytest.param(2.0, marks=pytest.mark.thorough)]
)
def test_adapters_of_quantized_experts(factor, x, rng, tmp_path):
    """LoRA on int8 experts trains only the adapters and the unquantized weights."""
    model = make_model(factor)
    quantize(model, "int8")
    moe = model.get_layer("moe")
    for dense in (moe.experts.intermediate_layer, moe.experts.output_layer):
        dense.enable_lora(2)
    before = {w.path: ops.convert_to_numpy(w).copy() for w in moe.weights}
    model.compile(keras.optimizers.SGD(0.1), "mse")
    for _ in range(2):  # The second adapter is 0 in step 1: the first has no gradient.
        model.train_on_batch(x, x)
    for w in moe.weights:
        changed = not np.array_equal(before[w.path], ops.convert_to_numpy(w))
        frozen = w.name == "kernel_scale" or (
            "experts" in w.path and w.name == "kernel"
        )
        assert changed != frozen, w.path
    # Large adapters affect the outputs; saving merges them into the kernels.
    for w in moe.experts.weights:
        if "lora" in w.name:
            w.assign(rng.normal(size=w.shape))
    expected = model.predict_on_batch(x)
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    assert distance(loaded.predict_on_batch(x), expected) < 0.05


def test_a_compiled_model_with_adapters_and_a_frozen_router_is_loaded(x, tmp_path):
    model = make_model(None)
    moe = model.get_layer("moe")
    moe.router.trainable = False
    for dense in moe.experts.dense_layers:
        dense.enable_lora(2)
    model.compile("adam", "mse")
    model.train_on_batch(x, x)
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    assert not any("router" in w.path for w in loaded.trainable_weights)
    np.testing.assert_allclose(
        loaded.predict_on_batch(x), model.predict_on_batch(x), atol=1e-5
    )
    loaded.train_on_batch(x, x)


def test_a_dense_feed_forward_is_quantized_and_loaded(x, tmp_path):
    model = functional(keras_moe.FeedForward(F), (T, H))
    expected = model.predict_on_batch(x)
    quantize(model, "int8")
    found = model.predict_on_batch(x)
    assert distance(found, expected) < 0.05
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    np.testing.assert_array_equal(loaded.predict_on_batch(x), found)


def test_partly_quantized_experts_are_not_saved(x, tmp_path):
    model = make_model(2.0)
    model.get_layer("moe").experts.intermediate_layer.quantize("int8")
    with pytest.raises(ValueError, match=r"quantized alike.*moe/experts"):
        model.save(tmp_path / "model.keras")


@pytest.mark.thorough
def test_a_layer_with_a_backbone_is_quantized_and_loaded(x, tmp_path):
    """The gate of the backbone is not quantized either."""
    moe = make_model(None).get_layer("moe")
    both = keras_moe.MoeLayerWithBackbone(moe, F, backbone_gate=True, name="both")
    model = functional(both, (T, H))
    expected = model.predict_on_batch(x)
    quantize(model, "int8")
    assert both.backbone_gate_layer.kernel.dtype == "float32"
    assert both.backbone.output_layer.kernel.dtype == "int8"
    found = model.predict_on_batch(x)
    assert distance(found, expected) < 0.03
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    np.testing.assert_array_equal(loaded.predict_on_batch(x), found)
