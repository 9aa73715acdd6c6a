"""Adapters (LoRA): one per expert, applied to its tokens only."""

import keras
import numpy as np
import pytest
from keras import ops
from layer_check import functional

import keras_moe
from keras_moe.experts.expert_dense import ExpertDense

E, F, H, T = 4, 8, 6, 12

with_and_without_capacity = pytest.mark.parametrize("factor", [2.0, None])


def make_experts(rng, **kwargs):
    """Experts with adapters that are not 0."""
    experts = keras_moe.FeedForwardExperts(
        E, F, gated=True, kernel_initializer="he_normal", **kwargs
    )
    experts.build((1, E, 3, H))
    experts.enable_lora(2, lora_alpha=3)
    for weight in experts.weights:
        if "lora" in weight.name:
            weight.assign(rng.normal(size=weight.shape))
    return experts


def make_model(factor):
    """Tokens of kind i, whose feature i is large, are routed to expert i."""
    experts = keras_moe.FeedForwardExperts(E, F, kernel_initializer="he_normal")
    layer = keras_moe.MoeLayer(
        experts,
        keras_moe.MaskedRouter(E, kernel_initializer="identity", trainable=False),
        train_capacity_factor=factor and E,
        eval_capacity_factor=factor and E,
        name="moe",
    )
    model = functional(layer, (T, H))
    experts.enable_lora(2)
    return model


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


@with_and_without_capacity
def test_training_one_expert_leaves_the_others_unchanged(factor, rng):
    model = make_model(factor)
    others = tokens(rng, [1, 2, 3])
    before, x = model.predict_on_batch(others), tokens(rng, [0])
    untrained = model.predict_on_batch(x)
    model.compile(keras.optimizers.SGD(0.05), "mse")
    for _ in range(3):
        model.train_on_batch(x, x)
    np.testing.assert_allclose(model.predict_on_batch(others), before, atol=1e-6)
    assert np.abs(model.predict_on_batch(x) - untrained).max() > 1e-2


@with_and_without_capacity
def test_saving_merges_adapters(factor, rng, tmp_path):
    model = make_model(factor)
    x = tokens(rng, range(E))
    model.compile("adam", "mse")
    model.train_on_batch(x, x), model.train_on_batch(x, x)
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    np.testing.assert_allclose(
        loaded.predict_on_batch(x), model.predict_on_batch(x), atol=1e-5
    )
    assert not any("lora" in w.name for w in loaded.weights)


def test_a_dense_feed_forward_has_adapters():
    layer = keras_moe.FeedForward(F)
    with pytest.raises(ValueError, match="Build the layer 'feed_forward"):
        layer.enable_lora(2)
    layer.build((None, H))
    layer.enable_lora(2)
    assert sum("lora" in w.name for w in layer.trainable_weights) == 4
