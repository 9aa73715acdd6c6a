"""Adapters (LoRA): one per expert, applied to its tokens only."""

import copy
import pickle

import keras
import numpy as np
import pytest
from keras import ops
from layer_check import functional

import keras_moe
from keras_moe.experts.expert_dense import ExpertDense

E, F, H, T = 4, 8, 6, 12

with_and_without_capacity = pytest.mark.parametrize("factor", [2.0, None])
kernels = pytest.mark.parametrize("kernel", [None, "int8", "int4"])


def make_experts(rng, **kwargs):
    """Experts with adapters that are not 0."""
    experts = keras_moe.FeedForwardExperts(
        E, F, gated=True, kernel_initializer="he_normal", **kwargs
    )
    experts.build((1, E, 3, H))
    experts.enable_lora(2, lora_alpha=3)
    fill_adapters(experts, rng)
    return experts


def make_model(factor, kernel=None, rank=2, lora_alpha=None):
    """Tokens of kind i, whose feature i is large, are routed to expert i."""
    experts = keras_moe.FeedForwardExperts(
        E, F, kernel_initializer=keras.initializers.HeNormal(seed=0)
    )
    layer = keras_moe.MoeLayer(
        experts,
        keras_moe.MaskedRouter(E, kernel_initializer="identity", trainable=False),
        train_capacity_factor=factor and E,
        eval_capacity_factor=factor and E,
        name="moe",
    )
    model = functional(layer, (T, H))
    if kernel:
        experts.quantize(kernel)
    if rank:
        experts.enable_lora(rank, lora_alpha)
    return model


def fill_adapters(layer, rng, scale=1.0):
    for weight in layer.weights:
        if "lora" in weight.name:
            weight.assign(scale * rng.normal(size=weight.shape))


def tokens(rng, kinds):
    x = rng.normal(size=(3, T, H))
    x[..., :E] = 9 * np.eye(E)[rng.choice(kinds, size=(3, T))] + 0.1 * x[..., :E]
    return x.astype("float32")


def test_weights(rng):
    dense = ExpertDense(E, 64)
    dense.build((1, E, 3, 256))
    dense.enable_lora(16)
    a, b = dense.lora_kernel_a, dense.lora_kernel_b
    assert tuple(a.shape) == (E, 256, 16) and tuple(b.shape) == (E, 16, 64)
    assert not ops.convert_to_numpy(b).any()
    trainable = {w.name for w in dense.trainable_weights}
    assert trainable == {"bias", "lora_kernel_a", "lora_kernel_b"}
    plain = keras.layers.Dense(64)
    plain.build((None, 256))
    plain.enable_lora(16)
    expected = np.std(plain.lora_kernel_a)
    for one in ops.convert_to_numpy(a):
        assert np.std(one) == pytest.approx(expected, rel=0.07)
    assert (
        abs(np.corrcoef(*(np.ravel(x) for x in ops.convert_to_numpy(a)[:2]))[0, 1])
        < 0.1
    )


@pytest.mark.parametrize("factor", [2.0, None])
def test_merging_in_a_model_that_has_been_called(factor, rng):
    """Its compiled functions do not add the adapters a second time."""
    moe = keras_moe.MoeLayer(
        keras_moe.FeedForwardExperts(E, F),
        keras_moe.MaskedRouter(E),
        train_capacity_factor=factor,
        eval_capacity_factor=factor,
    )
    model = keras.Sequential([keras.Input((6, H)), moe])
    moe.enable_lora(2)
    for dense in moe.experts.dense_layers:
        dense.lora_kernel_b.assign(rng.normal(size=dense.lora_kernel_b.shape))
    x = rng.normal(size=(2, 6, H)).astype("float32")
    expected = model.predict(x, verbose=0)
    moe.merge_lora()
    found = model.predict(x, verbose=0)
    scale = np.abs(expected).max()
    np.testing.assert_allclose(found, expected, atol=1e-5 * scale)


def test_outputs_equal_those_of_merged_kernels(rng):
    """For slots of one group and of several, and for sorted rows."""
    experts = make_experts(rng)
    merged = keras_moe.FeedForwardExperts(E, F, gated=True)
    merged.build((1, E, 3, H))
    for ours, plain in zip(experts.dense_layers, merged.dense_layers, strict=True):
        a, b = (
            ops.convert_to_numpy(w) for w in (ours.lora_kernel_a, ours.lora_kernel_b)
        )
        kernel = next(w for w in ours.weights if w.name == "kernel")
        plain.kernel.assign(ops.convert_to_numpy(kernel) + 1.5 * (a @ b))
        plain.bias.assign(ours.bias)
    x = rng.normal(size=(1, E, 3, H)).astype("float32")
    sizes = ops.convert_to_tensor(np.array([4, 0, 6, 1], "int32"))
    for inputs in (
        {"inputs": x},
        {"inputs": np.concatenate([x, 2 * x])},
        {"inputs": x.reshape(-1, H), "group_sizes": sizes},
    ):
        found, expected = (ops.convert_to_numpy(m(**inputs)) for m in (experts, merged))
        np.testing.assert_allclose(found, expected, atol=1e-3, rtol=1e-4)


@kernels
@with_and_without_capacity
def test_training_one_expert_leaves_the_others_unchanged(factor, kernel, rng):
    model = make_model(factor, kernel)
    others = tokens(rng, [1, 2, 3])
    before, x = model.predict_on_batch(others), tokens(rng, [0])
    untrained = model.predict_on_batch(x)
    model.compile(keras.optimizers.SGD(0.05), "mse")
    for _ in range(3):
        model.train_on_batch(x, x)
    np.testing.assert_allclose(model.predict_on_batch(others), before, atol=1e-6)
    assert np.abs(model.predict_on_batch(x) - untrained).max() > 1e-2


# Files: the adapters are kept, and merged by a model that has none.


@kernels
@with_and_without_capacity
def test_a_saved_model_has_equal_outputs(factor, kernel, rng, tmp_path):
    """Float kernels are loaded merged; quantized ones with adapters, not rounded."""
    model = make_model(factor, kernel)
    x = tokens(rng, range(E))
    model.compile("adam", "mse")
    model.train_on_batch(x, x), model.train_on_batch(x, x)
    fill_adapters(model, rng)
    expected = model.predict_on_batch(x)
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    scale = np.abs(expected).max()
    np.testing.assert_allclose(
        loaded.predict_on_batch(x), expected, atol=1e-6 * scale, rtol=1e-6
    )
    names = {w.name for w in loaded.weights}
    assert ("lora_kernel_a" in names) == (kernel is not None)
    # Merged, other weights train; Keras skips the optimizer's state then.
    assert loaded.optimizer.iterations == (0 if kernel is None else 2)
    loaded.train_on_batch(x, x)


@kernels
def test_training_goes_on_from_saved_weights(kernel, rng, tmp_path):
    """`save_weights` keeps kernels and adapters apart; the scale may differ."""
    model, x = make_model(None, kernel), tokens(rng, range(E))
    fill_adapters(model, rng)
    expected = model.predict_on_batch(x)
    model.save_weights(tmp_path / "adapted.weights.h5")
    resumed = make_model(None, kernel, lora_alpha=5)
    resumed.load_weights(tmp_path / "adapted.weights.h5")
    scale = np.abs(expected).max()
    np.testing.assert_allclose(
        resumed.predict_on_batch(x), expected, atol=1e-6 * scale, rtol=1e-6
    )
    for ours, theirs in zip(model.weights, resumed.weights, strict=True):
        if ours.name != "lora_kernel_b":
            np.testing.assert_array_equal(*map(ops.convert_to_numpy, (ours, theirs)))
    other_rank = make_model(None, kernel, rank=3)
    with pytest.raises(ValueError, match=r"have their rank.*2 in the file, and 3 in"):
        other_rank.load_weights(tmp_path / "adapted.weights.h5")


@kernels
def test_weights_of_models_without_adapters(kernel, rng, tmp_path):
    """Their adapters begin as new ones do, so that they train."""
    plain, x = make_model(None, kernel, rank=None), tokens(rng, range(E))
    expected = plain.predict_on_batch(x)
    plain.save_weights(tmp_path / "plain.weights.h5")
    model = make_model(None, kernel)
    fill_adapters(model, rng)
    model.load_weights(tmp_path / "plain.weights.h5")
    np.testing.assert_allclose(model.predict_on_batch(x), expected, atol=1e-6)
    for w in model.weights:
        if "lora" in w.name:
            assert np.any(ops.convert_to_numpy(w)) == (w.name == "lora_kernel_a")

    fill_adapters(model, rng)
    expected = model.predict_on_batch(x)
    model.save_weights(tmp_path / "adapted.weights.h5")
    if kernel is None:
        plain.load_weights(tmp_path / "adapted.weights.h5")
        np.testing.assert_allclose(
            plain.predict_on_batch(x), expected, rtol=1e-4, atol=1e-4
        )
    else:
        with pytest.raises(ValueError, match=r"Call `enable_lora\(2\)` before"):
            plain.load_weights(tmp_path / "adapted.weights.h5")


@kernels
@with_and_without_capacity
def test_merge_lora(factor, kernel, rng, tmp_path):
    """Equal outputs for floats; for quantized kernels the error of quantization."""
    model, x = make_model(factor, kernel), tokens(rng, range(E))
    fill_adapters(model, rng, 0.1)
    moe = model.get_layer("moe")
    before = make_model(factor, kernel, rank=None).get_layer("moe").weights
    expected = model.predict_on_batch(x)
    moe.merge_lora()
    model.make_predict_function(force=True)
    found = model.predict_on_batch(x)
    error = np.abs(found - expected).mean() / np.abs(expected).mean()
    assert error < {None: 1e-6, "int8": 0.015, "int4": 0.15}[kernel]
    names = [w.name for w in moe.experts.weights]
    assert sorted(names) == sorted(w.name for w in before if "experts" in w.path)
    trainable = {w.name for w in moe.experts.trainable_weights}
    assert trainable == ({"kernel", "bias"} if kernel is None else {"bias"})
    with pytest.raises(ValueError, match="no adapters to merge in 'moe'"):
        moe.merge_lora()
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    np.testing.assert_array_equal(loaded.predict_on_batch(x), found)
    moe.enable_lora(2)  # Once more.
    assert sum("lora" in w.name for w in moe.weights) == 4


@kernels
def test_a_copy_has_the_adapters(kernel, rng):
    moe = make_model(None, kernel, lora_alpha=3).get_layer("moe")
    fill_adapters(moe, rng)
    x = ops.convert_to_tensor(tokens(rng, range(E)))
    expected = ops.convert_to_numpy(moe(x))
    for copied in (copy.deepcopy(moe), pickle.loads(pickle.dumps(moe))):
        np.testing.assert_array_equal(ops.convert_to_numpy(copied(x)), expected)
        names = [(w.name, w.trainable) for w in copied.weights]
        assert names == [(w.name, w.trainable) for w in moe.weights]


# Calls on layers.


def layers_with_experts():
    def experts(e=E):
        return keras_moe.FeedForwardExperts(e, F)

    moe = keras_moe.MoeLayer(experts(), keras_moe.MaskedRouter(E, hidden_layers=8))
    two = [keras_moe.FeedForward(F), keras.layers.Dense(H)]
    return {
        "MoeLayer": (moe, 2),
        "MoeLayerWithBackbone": (
            keras_moe.MoeLayerWithBackbone(
                keras_moe.MoeLayer(experts(), keras_moe.MaskedRouter(E)),
                F,
                backbone_gate=True,
                gated=True,
            ),
            5,
        ),
        "SoftMoeLayer": (keras_moe.SoftMoeLayer(experts()), 2),
        "HierarchicalMoeLayer": (
            keras_moe.HierarchicalMoeLayer(
                experts(),
                keras_moe.Top2MaskedRouter(2, name="outer"),
                keras_moe.Top2MaskedRouter(2, name="inner"),
            ),
            2,
        ),
        "HeterogeneousExperts": (
            keras_moe.MoeLayer(
                keras_moe.HeterogeneousExperts(two), keras_moe.MaskedRouter(2)
            ),
            3,
        ),
        "FeedForward": (keras_moe.FeedForward(F), 2),
    }


@pytest.mark.parametrize("quantized", [None, "int8"])
@pytest.mark.parametrize("name", layers_with_experts())
def test_every_layer_has_adapters(name, quantized, rng):
    """For each of its dense layers, and none for its gates."""
    layer, dense_layers = layers_with_experts()[name]
    model, x = functional(layer, (T, H)), tokens(rng, range(E))
    if quantized:
        layer.quantize(quantized)
    before = model.predict_on_batch(x)
    layer.enable_lora(2, lora_alpha=3)
    model.make_predict_function(force=True)
    np.testing.assert_allclose(model.predict_on_batch(x), before, atol=1e-6)
    adapted = [w.path for w in layer.trainable_weights if "lora_kernel_a" in w.path]
    assert len(adapted) == dense_layers
    assert not any("router" in path or "backbone_gate" in path for path in adapted)
    with pytest.raises(ValueError, match="has adapters already"):
        layer.enable_lora(2)
    fill_adapters(model, rng)
    expected = model.predict_on_batch(x)
    assert np.abs(expected - before).max() > 0.1
    layer.merge_lora()
    model.make_predict_function(force=True)
    found = model.predict_on_batch(x)
    error = np.abs(found - expected).mean() / np.abs(expected).mean()
    assert error < (0.02 if quantized else 1e-5)


@kernels
def test_the_optimizer_holds_adapters_only(kernel, rng):
    model, x = make_model(None, kernel), tokens(rng, range(E))
    moe = model.get_layer("moe")
    for dense in moe.experts.dense_layers:
        dense.bias.trainable = False
    model.compile("adam", "mse")
    model.train_on_batch(x, x)
    shapes = sorted(tuple(w.shape) for w in moe.trainable_weights)
    assert shapes == sorted([(E, H, 2), (E, 2, F), (E, F, 2), (E, 2, H)])
    state = sorted(tuple(v.shape) for v in model.optimizer.variables[2:])
    assert state == sorted(2 * shapes)


# Conversions.


def test_tensors_and_copies_have_merged_kernels(rng):
    layer = keras_moe.presets.mixtral(E, F)
    layer.build((None, T, H))
    layer.enable_lora(2)
    fill_adapters(layer, rng)
    merged = keras_moe.presets.mixtral(E, F)
    merged.build((None, T, H))
    tensors = keras_moe.convert.to_tensors(layer, "mixtral")
    keras_moe.convert.load_weights(merged, tensors, "mixtral")
    selected = keras_moe.select_experts(layer, range(E))
    x = ops.convert_to_tensor(tokens(rng, range(E)))
    expected = ops.convert_to_numpy(layer(x))
    for other in (merged, selected):
        assert not any("lora" in w.name for w in other.weights)
        np.testing.assert_allclose(
            ops.convert_to_numpy(other(x)), expected, rtol=1e-4, atol=1e-3
        )


def test_upcycling_merges_adapters(rng):
    dense = keras_moe.FeedForward(F)
    dense.build((None, H))
    dense.enable_lora(2)
    fill_adapters(dense, rng)
    router = keras_moe.MaskedRouter(E, num_selected_experts=2, normalize_weights=True)
    layer = keras_moe.upcycle(
        dense, router, train_capacity_factor=None, eval_capacity_factor=None
    )
    x = ops.convert_to_tensor(tokens(rng, range(E)))
    found, expected = (ops.convert_to_numpy(m(x)) for m in (layer, dense))
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-3)
