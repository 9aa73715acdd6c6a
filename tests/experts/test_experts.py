import keras
import numpy as np
import oracle
import pytest
from keras import ops
from layer_check import check_layer

from keras_moe import FeedForward, FeedForwardExperts, HeterogeneousExperts


@keras.saving.register_keras_serializable(package="tests")
def double(x):
    return 2 * x


def test_feed_forward(rng):
    x = rng.normal(size=(2, 3, 4)).astype("float32")
    layer = FeedForward(8, kernel_initializer="glorot_uniform", name="feed_forward")
    outputs = ops.convert_to_numpy(layer(x))
    w1, b1, w2, b2 = layer.get_weights()
    np.testing.assert_allclose(
        outputs, oracle.gelu(x @ w1 + b1) @ w2 + b2, rtol=1e-4, atol=1e-6
    )
    assert [w.path for w in layer.weights] == [
        "feed_forward/intermediate/kernel",
        "feed_forward/intermediate/bias",
        "feed_forward/output/kernel",
        "feed_forward/output/bias",
    ]


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("memory_is_kept", [False, True])
@pytest.mark.parametrize("are_large", [False, True])
def test_each_expert_processes_its_own_slots(
    groups, are_large, memory_is_kept, rng, monkeypatch
):
    monkeypatch.setattr("keras_moe.utils.memory._is_kept", memory_is_kept)
    if are_large:
        monkeypatch.setattr("keras_moe.experts.feed_forward_experts.LARGE", 1)
    x = rng.normal(size=(groups, 3, 5, 4)).astype("float32")
    layer = FeedForwardExperts(
        3, 8, kernel_initializer="glorot_uniform", bias_initializer="random_normal"
    )
    outputs = ops.convert_to_numpy(layer(x))
    weights = layer.get_weights()
    assert [w.shape for w in weights] == [(3, 4, 8), (3, 1, 8), (3, 8, 4), (3, 1, 4)]
    for g in range(groups):
        for e in range(3):
            expected = oracle.feed_forward(x[g, e], weights, e)
            np.testing.assert_allclose(outputs[g, e], expected, rtol=1e-4, atol=1e-6)


def test_weight_paths_match_model_garden():
    layer = FeedForwardExperts(3, 8)
    layer.build((1, 3, None, 4))
    assert [w.path for w in layer.weights] == [
        "experts/intermediate/kernel",
        "experts/intermediate/bias",
        "experts/output/kernel",
        "experts/output/bias",
    ]


def test_experts_are_initialized_differently():
    layer = FeedForwardExperts(2, 8)
    layer.build((1, 2, None, 8))
    kernel, _, other, _ = layer.get_weights()
    assert (kernel[0] != kernel[1]).all()
    assert (kernel != other).all()


def test_initializers_scale_by_the_inputs_of_one_expert():
    layer = FeedForwardExperts(8, 400, kernel_initializer="he_normal")
    layer.build((1, 8, None, 100))
    assert np.std(layer.get_weights()[0]) == pytest.approx((2 / 100) ** 0.5, rel=0.02)


@pytest.mark.parametrize("make", [FeedForward, lambda **k: FeedForwardExperts(2, **k)])
def test_dropout_is_applied_only_in_training(make, rng):
    x = rng.normal(size=(1, 2, 50, 4)).astype("float32")
    for name in ("inner_dropout", "output_dropout"):
        layer = make(d_ff=8, **{name: 0.5})
        expected = ops.convert_to_numpy(layer(x, training=False))
        np.testing.assert_array_equal(ops.convert_to_numpy(layer(x)), expected)
        dropped = ops.convert_to_numpy(layer(x, training=True))
        assert (dropped != expected).any()
        if name == "output_dropout":
            assert 0.3 < (dropped == 0).mean() < 0.7


def make_feed_forward(**kwargs):
    return FeedForward(
        8,
        activation=double,
        kernel_initializer="he_normal",
        inner_dropout=0.1,
        **kwargs,
    )


def make_experts(**kwargs):
    return FeedForwardExperts(3, 8, activation="relu", output_dropout=0.1, **kwargs)


def make_gated(**kwargs):
    return FeedForwardExperts(
        3, 8, activation="silu", gated=True, use_bias=False, **kwargs
    )


def make_heterogeneous(**kwargs):
    return HeterogeneousExperts(
        [
            keras.layers.Dense(4, **kwargs),
            FeedForward(8, **kwargs),
            keras.layers.EinsumDense("gch,hi->gci", (None, 4), **kwargs),
        ],
        **kwargs,
    )


def test_gated_feed_forward(rng):
    x = rng.normal(size=(2, 3, 4)).astype("float32")
    layer = FeedForward(
        8, gated=True, use_bias=False, activation="relu", kernel_initializer="he_normal"
    )
    outputs = ops.convert_to_numpy(layer(x))
    w = {w.path.split("/")[1]: w.numpy() for w in layer.weights}
    inner = np.maximum(x @ w["gate"], 0) * (x @ w["intermediate"])
    np.testing.assert_allclose(outputs, inner @ w["output"], rtol=1e-4, atol=1e-5)
    experts = make_gated()
    experts.build((1, 3, None, 4))
    assert {w.path: w.shape for w in experts.weights} == {
        "experts/gate/kernel": (3, 4, 8),
        "experts/intermediate/kernel": (3, 4, 8),
        "experts/output/kernel": (3, 8, 4),
    }


def test_heterogeneous_experts_process_their_own_slots(rng):
    x = rng.normal(size=(1, 3, 5, 4)).astype("float32")
    layer = make_heterogeneous()
    outputs = ops.convert_to_numpy(layer(x))
    for e in range(3):
        expected = ops.convert_to_numpy(layer.experts[e](x[:, e]))
        np.testing.assert_allclose(outputs[:, e], expected, atol=1e-6)


@pytest.mark.parametrize(
    ("experts", "error"),
    [([], ValueError), ([1], TypeError), (None, TypeError), ("a", TypeError)],
)
def test_bad_heterogeneous_experts(experts, error):
    with pytest.raises(error, match="`experts` must"):
        HeterogeneousExperts(experts)


def test_the_layer_check(tmp_path):
    path = tmp_path / "model.keras"
    check_layer(make_feed_forward, (6, 4), path)
    check_layer(make_experts, (3, 5, 4), path)
    check_layer(make_gated, (3, 5, 4), path)
    check_layer(make_heterogeneous, (3, 5, 4), path)


def test_a_different_number_of_experts_is_an_error():
    layer = FeedForwardExperts(3, 8)
    with pytest.raises(ValueError, match=r"with 3 experts.*\(1, 4, 5, 6\)"):
        layer(np.zeros((1, 4, 5, 6)))
    with pytest.raises(ValueError, match="with 3 experts"):
        layer(np.zeros((4, 5, 6)))


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({"d_ff": 0}, ValueError),
        ({"d_ff": "8"}, TypeError),
        ({"inner_dropout": 1}, ValueError),
        ({"output_dropout": -0.5}, ValueError),
        ({"activation": "unknown"}, ValueError),
        ({"bias_initializer": "unknown"}, ValueError),
        ({"num_experts": 0}, ValueError),
        ({"num_experts": True}, TypeError),
        ({"unknown": 1}, (TypeError, ValueError)),
    ],
)
def test_bad_arguments(arguments, error):
    with pytest.raises(error):
        FeedForwardExperts(**{"num_experts": 2, "d_ff": 8, **arguments})
