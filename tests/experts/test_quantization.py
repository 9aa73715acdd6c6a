"""Quantized experts: each as if it were quantized alone, and the same routing."""

import json
import warnings

import keras
import numpy as np
import pytest
import versions
from gradients import gradients
from keras import ops
from layer_check import functional

import keras_moe
from keras_moe.experts.expert_dense import ExpertDense

E, F, H, T = 4, 32, 16, 24
if versions.KERAS < versions.WITH_QUANTIZATION:
    pytest.skip(versions.SKIPPED, allow_module_level=True)

quantizers = keras.quantizers
CONFIGS = {
    "int8": quantizers.Int8QuantizationConfig(),
    "int8, weights only": quantizers.Int8QuantizationConfig(activation_quantizer=None),
    "int4": quantizers.Int4QuantizationConfig(),
    "int4, blocks of 5": quantizers.Int4QuantizationConfig(block_size=5),
    "int4, per channel": quantizers.Int4QuantizationConfig(block_size=None),
    "int4, inputs, too": quantizers.Int4QuantizationConfig(
        block_size=-1, activation_quantizer=quantizers.AbsMaxQuantizer()
    ),
}
GPTQ = quantizers.GPTQConfig(dataset=["text"], tokenizer=str.split)
AWQ = quantizers.AWQConfig(dataset=["text"], tokenizer=str.split)
WRONG_AXIS = quantizers.Int8QuantizationConfig(
    weight_quantizer=quantizers.AbsMaxQuantizer(axis=-1)
)

configs = pytest.mark.parametrize("name", CONFIGS)
with_and_without_capacity = pytest.mark.parametrize("factor", [2.0, None])


def make_moe(factor, name="moe", **experts):
    return keras_moe.MoeLayer(
        keras_moe.FeedForwardExperts(E, F, kernel_initializer="he_normal", **experts),
        keras_moe.MaskedRouter(
            E,
            num_selected_experts=2,
            hidden_layers=8,
            kernel_initializer="he_normal",
        ),
        train_capacity_factor=factor,
        eval_capacity_factor=factor,
        name=name,
    )


def make_model(factor, **experts):
    return functional(make_moe(factor, **experts), (T, H))


def quantize(model, mode=None, config=None):
    with warnings.catch_warnings():
        # Keras warns about every layer that cannot be quantized.
        warnings.filterwarnings("ignore", message=".*does not have a `quantize`")
        model.quantize(mode, config=config)


def distance(found, expected):
    return np.abs(found - expected).mean() / np.abs(expected).mean()


def saved_and_loaded(model, path):
    model.save(path / "model.keras")
    return keras.models.load_model(path / "model.keras")


def settings(model):
    """How each dense layer is quantized."""
    found = []
    for dense in model.get_layer("moe").experts.dense_layers:
        config = dense.quantization_config
        config = json.dumps(config and config.get_config())
        found.append([dense.dtype_policy.name, config])
    return found


@pytest.fixture
def x(rng):
    return rng.normal(size=(3, T, H)).astype("float32")


# Each expert as if it were quantized alone.


@pytest.mark.parametrize("scales", [(1, 1, 1, 1), (1, 100, 1, 1)])
@configs
def test_each_expert_is_quantized_as_a_dense_layer(name, scales, rng):
    """Also where one expert's kernel is 100 times larger, with sizes that are odd."""
    config, hidden, units, n = CONFIGS[name], 19, 15, 11
    kernels = rng.normal(size=(E, hidden, units)) * np.reshape(scales, (E, 1, 1))
    x = rng.normal(size=(1, E, n, hidden)).astype("float32")
    ours = ExpertDense(E, units)
    ours.build(x.shape)
    ours.kernel.assign(kernels)
    ours.quantize(config.mode, config=config)
    rows = {"group_sizes": ops.convert_to_tensor(np.full(E, n, "int32"))}
    found = {
        "slots": ours(x),
        "slots of two groups": ours(np.concatenate([x, x]))[:1],
        "rows": ops.reshape(ours(x.reshape(-1, hidden), **rows), (1, E, n, units)),
    }
    for i in range(E):
        dense = keras.layers.Dense(units)
        dense.build((None, hidden))
        dense.kernel.assign(kernels[i])
        dense.quantize(config.mode, config=config)
        exact = x[0, i] @ kernels[i]
        error = distance(ops.convert_to_numpy(dense(x[0, i])), exact)
        assert 0.003 < error < (0.01 if "int8" in name else 0.13)
        for layout, outputs in found.items():
            outputs = ops.convert_to_numpy(outputs)[0, i]
            assert distance(outputs, exact) < 1.05 * error, layout
            if layout != "rows":  # Their inputs are not quantized.
                np.testing.assert_allclose(
                    outputs, ops.convert_to_numpy(dense(x[0, i])), rtol=1e-4, atol=1e-3
                )


@configs
@with_and_without_capacity
def test_quantized_experts(name, factor, x, tmp_path):
    config = CONFIGS[name]
    model = make_model(factor)
    moe = model.get_layer("moe")
    expected = model.predict_on_batch(x)
    routing = [ops.convert_to_numpy(part) for part in moe.route(x)]
    quantize(model, config=config)

    for weight in moe.router.weights:
        assert weight.dtype == "float32"
    for part, before in zip(moe.route(x), routing, strict=True):
        np.testing.assert_array_equal(ops.convert_to_numpy(part), before)
    for weight in moe.experts.weights:
        assert weight.shape[0] == E
        if weight.name == "kernel":
            assert weight.dtype == {"int8": "int8", "int4": "uint8"}[config.mode]
            assert weight.shape[1] in ((16, 8) if config.mode == "int4" else (32, 16))
    found = model.predict_on_batch(x)
    assert distance(found, expected) < {"int8": 0.03, "int4": 0.2}[config.mode]

    loaded = saved_and_loaded(model, tmp_path)
    np.testing.assert_array_equal(loaded.predict_on_batch(x), found)
    dtypes = [w.dtype for w in loaded.get_layer("moe").weights]
    assert dtypes == [w.dtype for w in moe.weights]
    assert settings(loaded) == settings(model)
    again = keras.models.clone_model(loaded)
    again.set_weights(loaded.get_weights())
    np.testing.assert_array_equal(again.predict_on_batch(x), found)


@pytest.mark.parametrize("experts", [{"gated": True, "use_bias": False}, {}])
@pytest.mark.parametrize("dtype", ["float32", "mixed_bfloat16", "bfloat16"])
def test_sorted_rows_and_slots_are_alike(experts, dtype, x):
    """Weights only, of gated experts, without biases, in half precision."""
    dropless = make_moe(None, dtype=dtype, **experts)
    slots = make_moe(float(E), dtype=dtype, **experts)
    for layer in (dropless, slots):
        layer.build(x.shape)
    slots.set_weights(dropless.get_weights())
    for layer in (dropless, slots):
        layer.quantize("int4")
    found, expected = (
        ops.convert_to_numpy(ops.cast(layer(x), "float32"))
        for layer in (dropless, slots)
    )
    assert distance(found, expected) < (1e-5 if dtype == "float32" else 2e-2)


def test_no_gradient_but_that_of_the_inputs_and_biases(rng):
    """Of quantized experts, with and without a capacity, as of their float kernels."""
    x = rng.normal(size=(1, E, 6, H)).astype("float32")
    ours, plain = ExpertDense(E, F), ExpertDense(E, F)
    for layer in (ours, plain):
        layer.build(x.shape)
    ours.quantize("int4")
    plain.kernel.assign(np.stack([ours.kernel_of_expert(i) for i in range(E)]))
    plain.trainable = False
    sizes = {"group_sizes": np.array([6, 0, 11, 5], "int32")}
    for inputs, arguments in ((x, {}), (x.reshape(-1, H), sizes)):
        found, expected = (
            input_gradient(layer, inputs, **arguments) for layer in (ours, plain)
        )
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


def input_gradient(layer, x, **arguments):
    def function(x):
        tensors = {k: ops.convert_to_tensor(v) for k, v in arguments.items()}
        return ops.sum(ops.square(layer(x, **tensors)))

    (found,) = gradients(function, x)
    return found


def test_the_largest_temporary_is_one_kernel():
    """Each float kernel is made when it is multiplied, and not kept for a gradient."""
    calls = []

    def make(i):
        calls.append(i)
        return ops.ones((3, 2)) * ops.cast(i, "float32")

    kernels = keras_moe.kernels.FrozenMatrices(
        make, (ops.convert_to_tensor(np.arange(4.0, dtype="float32")),), (4, 3, 2)
    )
    sizes = ops.convert_to_tensor(np.array([1, 0, 0, 2], "int32"))
    rows = ops.ones((3, 3))
    found = keras_moe.kernels.grouped_dense(rows, kernels, None, sizes)
    np.testing.assert_array_equal(ops.convert_to_numpy(found), [[0, 0], [9, 9], [9, 9]])
    assert all(len(ops.shape(i)) == 0 for i in calls)


# Modes that are refused.

REFUSED = {
    "float8, dropless": ("float8", None, None, "without a capacity.*'float8'"),
    "gptq": ("gptq", 2.0, GPTQ, "cannot be quantized with 'gptq'"),
    "awq": ("awq", 2.0, AWQ, "cannot be quantized with 'awq'"),
    # Of a newer Keras, which would not multiply rows.
    "ternary": ("ternary", None, None, "ternary"),
    "axis": (None, None, WRONG_AXIS, r"must have `axis=0`.*shape \(2, 1\)"),
}


@pytest.mark.parametrize("call", ["dense", "experts", "layer", "model", "backbone"])
@pytest.mark.parametrize("refusal", REFUSED)
def test_refused_modes_change_nothing(refusal, call, x):
    mode, factor, config, message = REFUSED[refusal]
    layer = moe = make_moe(factor)
    if call == "backbone":
        layer = keras_moe.MoeLayerWithBackbone(moe, F, name="both")
    model = functional(layer, (T, H))
    before = model.predict_on_batch(x)
    dtypes = [weight.dtype for weight in model.weights]
    quantize = {
        "dense": moe.experts.output_layer.quantize,
        "experts": moe.experts.quantize,
        "layer": moe.quantize,
        "model": lambda *args, **kwargs: keras_moe.quantize_experts(
            model, *args, **kwargs
        ),
        "backbone": layer.quantize,
    }[call]
    with pytest.raises(ValueError, match=message):
        quantize(mode, config=config)
    assert [weight.dtype for weight in model.weights] == dtypes
    np.testing.assert_array_equal(model.predict_on_batch(x), before)


def test_adapters_and_float8_exclude_each_other():
    for refused in ("quantize", "enable_lora"):
        moe = make_moe(2.0)
        moe.build((None, T, H))
        if refused == "quantize":
            moe.enable_lora(2)
        else:
            moe.quantize("float8")
        names = [w.name for w in moe.weights]
        argument = "float8" if refused == "quantize" else 2
        for layer in (moe, moe.experts, moe.experts.output_layer):
            with pytest.raises(ValueError, match=r"float8.*has not been changed"):
                getattr(layer, refused)(argument)
        assert [w.name for w in moe.weights] == names


def test_float8_with_a_capacity(x, tmp_path):
    """That of Keras, which trains with it."""
    model = make_model(2.0)
    expected = model.predict_on_batch(x)
    quantize(model, "float8")
    assert 0 < distance(model.predict_on_batch(x), expected) < 0.1
    model.compile(keras.optimizers.SGD(0.1), "mse")
    losses = [model.train_on_batch(x, x) for _ in range(3)]
    assert losses[2] < losses[0]
    loaded = saved_and_loaded(model, tmp_path)
    np.testing.assert_array_equal(loaded.predict_on_batch(x), model.predict_on_batch(x))


# Calls that quantize.


def test_quantize_experts_leaves_everything_else(x, tmp_path):
    """A quantized `MultiHeadAttention` would not load with Keras 3.15."""
    inputs = keras.Input((T, H))
    h = inputs + keras.layers.MultiHeadAttention(2, 8)(inputs, inputs)
    h = h + keras_moe.MoeLayerWithBackbone(make_moe(None), F, backbone_gate=True)(h)
    h = h + keras_moe.SoftMoeLayer(keras_moe.FeedForwardExperts(E, F))(h)
    different = [keras_moe.FeedForward(F), keras.layers.Dense(H)]
    h = h + keras_moe.MoeLayer(
        keras_moe.HeterogeneousExperts(different), keras_moe.MaskedRouter(2)
    )(h)
    h = h + keras_moe.HierarchicalMoeLayer(
        keras_moe.FeedForwardExperts(E, F),
        keras_moe.Top2MaskedRouter(2, name="outer"),
        keras_moe.Top2MaskedRouter(2, name="inner"),
    )(h)
    model = keras.Model(inputs, keras.layers.Dense(3)(h))
    expected = model.predict_on_batch(x)
    keras_moe.quantize_experts(model, "int8")
    integers = {w.path for w in model.weights if w.dtype == "int8"}
    experts = {
        w.path
        for w in model.weights
        if w.name == "kernel"
        and ("experts" in w.path or "/backbone/" in w.path)
        and "router" not in w.path
    }
    assert integers == experts and len(integers) == 11
    found = model.predict_on_batch(x)
    assert 0 < distance(found, expected) < 0.05
    loaded = saved_and_loaded(model, tmp_path)
    np.testing.assert_array_equal(loaded.predict_on_batch(x), found)
    keras_moe.quantize_experts(model, "int8")  # All are quantized already.
    with pytest.raises(ValueError, match=r"quantized already.*int8.*'int4'"):
        keras_moe.quantize_experts(model, "int4")


def test_quantize_experts_needs_experts():
    model = functional(keras.layers.Dense(H), (T, H))
    with pytest.raises(ValueError, match="no Mixture-of-Experts layer in"):
        keras_moe.quantize_experts(model, "int8")
    with pytest.raises(ValueError, match=r"'moe' must be built.*made of dense layers"):
        make_moe(2.0).enable_lora(2)
    with pytest.raises(ValueError, match=r"isn't yet built.*'moe'"):
        make_moe(2.0).quantize("int8")


@pytest.mark.parametrize("mode", ["int8", "int4"])
def test_a_dense_feed_forward_is_quantized_and_loaded(mode, x, tmp_path):
    model = functional(keras_moe.FeedForward(F), (T, H))
    expected = model.predict_on_batch(x)
    quantize(model, mode)
    found = model.predict_on_batch(x)
    assert distance(found, expected) < {"int8": 0.05, "int4": 0.3}[mode]
    loaded = saved_and_loaded(model, tmp_path)
    np.testing.assert_array_equal(loaded.predict_on_batch(x), found)


# Dtype policies.


def test_dense_layers_that_are_quantized_differently(x, tmp_path):
    model = make_model(None, gated=True)
    dense = model.get_layer("moe").experts.dense_layers
    dense[0].quantize("int8")
    dense[1].quantize(config=CONFIGS["int4, blocks of 5"])
    found = model.predict_on_batch(x)
    loaded = saved_and_loaded(model, tmp_path)
    assert settings(loaded) == settings(model)
    assert [name for name, _ in settings(loaded)] == [
        "int8_from_float32",
        "int4/5_from_float32",
        "float32",
    ]
    np.testing.assert_array_equal(loaded.predict_on_batch(x), found)


def test_a_policy_map(x, tmp_path):
    """Experts that are created with quantized policies; their kernels are 0 at first.

    As with Keras's own layers, the file holds the kernels.
    """
    policies = {
        "moe/experts/intermediate": "int4/8_from_float32",
        "moe/experts/output": "int8_from_float32",
    }
    policies = {path: keras.dtype_policies.get(x) for path, x in policies.items()}
    policy_map = keras.dtype_policies.DTypePolicyMap("float32", policies)
    model = make_model(None, gated=True, dtype=policy_map)
    experts = model.get_layer("moe").experts
    shapes = {w.path: w.dtype for w in experts.weights if w.name == "kernel"}
    assert sorted(shapes.values()) == ["float32", "int8", "uint8"]
    source = make_model(None, gated=True)
    for dense, mode in zip(
        source.get_layer("moe").experts.dense_layers,
        (quantizers.Int4QuantizationConfig(block_size=8), CONFIGS["int8"], None),
        strict=True,
    ):
        if mode is not None:
            dense.quantize(config=mode)
    expected = source.predict_on_batch(x)
    source.save_weights(tmp_path / "source.weights.h5")
    model.load_weights(tmp_path / "source.weights.h5")
    np.testing.assert_array_equal(model.predict_on_batch(x), expected)
    loaded = saved_and_loaded(model, tmp_path)
    np.testing.assert_array_equal(loaded.predict_on_batch(x), expected)


def test_setting_a_policy_quantizes(x):
    model = make_model(None)
    expected = model.predict_on_batch(x)
    model.get_layer("moe").experts.dtype_policy = "int8_from_float32"
    model.make_predict_function(force=True)
    assert 0 < distance(model.predict_on_batch(x), expected) < 0.03
