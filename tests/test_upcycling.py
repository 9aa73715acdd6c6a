import keras
import numpy as np
import pytest
from keras import ops
from layer_check import functional

from keras_moe import (
    BiasBalancedMaskedRouter,
    FeedForward,
    FeedForwardExperts,
    MaskedRouter,
    MoeLayer,
    select_experts,
    upcycle,
)

E, F, H, T = 4, 8, 6, 10
NOTHING_DROPS = {"train_capacity_factor": None, "eval_capacity_factor": None}


def router(num_experts=E, **kwargs):
    return MaskedRouter(
        num_experts, num_selected_experts=2, normalize_weights=True, **kwargs
    )


@pytest.fixture
def x(rng):
    return rng.normal(size=(3, T, H)).astype("float32")


def numpy_call(layer, x):
    return ops.convert_to_numpy(layer(ops.convert_to_tensor(x)))


def trained_feed_forward(**kwargs):
    layer = FeedForward(
        F,
        name="ff",
        kernel_initializer="he_normal",
        bias_initializer="random_normal",
        **kwargs,
    )
    layer.build((None, T, H))
    return layer


@pytest.mark.parametrize(
    ("dense", "arguments"),
    [
        ({}, NOTHING_DROPS),
        ({"gated": True, "use_bias": False, "activation": "silu"}, NOTHING_DROPS),
        ({}, {"train_capacity_factor": 4.0, "eval_capacity_factor": 4.0}),
    ],
)
def test_experts_that_are_copies_answer_alike(dense, arguments, x):
    feed_forward = trained_feed_forward(**dense)
    layer = upcycle(feed_forward, router(), **arguments)
    assert layer.name == "ff"
    assert layer.experts.num_experts == E
    np.testing.assert_allclose(
        numpy_call(layer, x), numpy_call(feed_forward, x), atol=1e-5
    )


def test_noise_is_of_the_copies_kernels_alone(x):
    feed_forward = trained_feed_forward()
    layer = upcycle(feed_forward, router(), noise=0.1, seed=0, **NOTHING_DROPS)
    again = upcycle(feed_forward, router(), noise=0.1, seed=0, **NOTHING_DROPS)
    for weight, same in zip(layer.experts.weights, again.experts.weights, strict=True):
        np.testing.assert_array_equal(*map(ops.convert_to_numpy, (weight, same)))
    dense = layer.experts.intermediate_layer
    source = feed_forward.intermediate_layer
    change = ops.convert_to_numpy(dense.kernel) - ops.convert_to_numpy(source.kernel)
    std = ops.convert_to_numpy(source.kernel).std()
    assert change.std() == pytest.approx(0.1 * std, rel=0.15)
    assert not np.array_equal(change[0], change[1])
    np.testing.assert_array_equal(
        ops.convert_to_numpy(dense.bias)[:, 0],
        np.tile(ops.convert_to_numpy(source.bias), (E, 1)),
    )


def swapped(model, kind, replace):
    """The recipe of the documentation."""

    def clone(layer):
        if isinstance(layer, kind):
            return replace(layer)
        return type(layer).from_config(layer.get_config())

    result = keras.models.clone_model(model, clone_function=clone)
    for layer in model.layers:
        if layer.weights and not isinstance(layer, kind):
            result.get_layer(layer.name).set_weights(layer.get_weights())
    return result


def test_a_whole_model_is_upcycled(x):
    inputs = keras.Input((T, H))
    hidden = keras.layers.Dense(H, name="before")(inputs)
    outputs = hidden + FeedForward(F, name="ff_1")(hidden)
    outputs = outputs + FeedForward(F, name="ff_2")(outputs)
    model = keras.Model(inputs, keras.layers.Dense(2, name="after")(outputs))
    expected = model.predict_on_batch(x)

    grown = swapped(
        model, FeedForward, lambda ff: upcycle(ff, router(), **NOTHING_DROPS)
    )
    np.testing.assert_allclose(grown.predict_on_batch(x), expected, atol=1e-5)
    grown.compile("sgd", "mse")
    history = grown.fit(x, expected, epochs=1, verbose=0).history
    assert "ff_1/load_balancing_loss" in history
    paths = [weight.path for weight in grown.get_layer("ff_1").weights]
    assert "ff_1/experts/intermediate/kernel" in paths


def make_moe(make_router=router, name=None, **kwargs):
    layer = MoeLayer(
        FeedForwardExperts(E, F, bias_initializer="random_normal"),
        make_router(E, bias_initializer="random_normal", **kwargs),
        **NOTHING_DROPS,
        name=name,
    )
    layer.build((None, T, H))
    return layer


def test_an_expert_that_nobody_wants_can_go(x):
    layer = make_moe()
    gate = layer.router.router_weights
    gate.bias.assign([0.0, -100.0, 0.2, 0.1])
    pruned = select_experts(layer, [0, 2, 3])
    assert pruned.num_experts == pruned.router.num_experts == 3
    np.testing.assert_allclose(numpy_call(pruned, x), numpy_call(layer, x), atol=1e-6)


def test_a_whole_model_is_pruned(x):
    inputs = keras.Input((T, H))
    hidden = keras.layers.Dense(H, name="before")(inputs)
    layers = [make_moe(name=f"moe_{i}") for i in range(2)]
    for layer in layers:
        layer.router.router_weights.bias.assign([0.0, -100.0, 0.2, 0.1])
        hidden = hidden + layer(hidden)
    model = keras.Model(inputs, hidden)
    pruned = swapped(model, MoeLayer, lambda moe: select_experts(moe, [0, 2, 3]))
    assert pruned.count_params() < model.count_params()
    np.testing.assert_allclose(
        pruned.predict_on_batch(x), model.predict_on_batch(x), atol=1e-5
    )


def test_experts_in_another_order_answer_alike(x):
    layer = make_moe(hidden_layers=E)
    turned = select_experts(layer, [3, 1, 0, 2])
    np.testing.assert_allclose(numpy_call(turned, x), numpy_call(layer, x), atol=1e-6)


def test_a_router_s_own_state_follows(x):
    layer = make_moe(
        lambda e, **kwargs: BiasBalancedMaskedRouter(
            e, num_selected_experts=2, **kwargs
        )
    )
    layer.router.expert_bias.assign([0.3, -0.2, 0.1, 0.0])
    turned = select_experts(layer, [3, 1, 0, 2])
    found = ops.convert_to_numpy(turned.router.expert_bias)
    np.testing.assert_allclose(found, [0.0, -0.2, 0.3, 0.1])
    np.testing.assert_allclose(numpy_call(turned, x), numpy_call(layer, x), atol=1e-6)


def test_more_experts(x):
    """Tokens of a copied expert want it and its copy, which are alike."""
    layer = make_moe()
    grown = select_experts(layer, [0, 1, 2, 3, 1])
    np.testing.assert_array_equal(
        ops.convert_to_numpy(grown.experts.intermediate_layer.kernel)[4],
        ops.convert_to_numpy(layer.experts.intermediate_layer.kernel)[1],
    )
    parted = select_experts(layer, [0, 1, 2, 3, 1], noise=0.1, seed=0)
    for found, expected, axis in (
        (parted.experts.output_layer.kernel, grown.experts.output_layer.kernel, 0),
        (parted.router.router_weights.kernel, grown.router.router_weights.kernel, -1),
    ):
        found, expected = map(ops.convert_to_numpy, (found, expected))
        changed = [
            not np.array_equal(np.take(found, i, axis), np.take(expected, i, axis))
            for i in range(5)
        ]
        assert changed == [False, False, False, False, True]
    model = functional(parted, (T, H))
    model.compile("sgd", "mse")
    assert np.all(np.isfinite(model.train_on_batch(x, x)))


def test_what_cannot_be_copied():
    with pytest.raises(TypeError, match=r"`feed_forward` must be.*Dense"):
        upcycle(keras.layers.Dense(3), router())
    with pytest.raises(ValueError, match="ff must be built"):
        upcycle(FeedForward(F, name="ff"), router())
    adapted = trained_feed_forward()
    adapted.output_layer.enable_lora(2)
    with pytest.raises(ValueError, match="nor have adapters"):
        upcycle(adapted, router())
    with pytest.raises(TypeError, match="`layer` must be a `MoeLayer`"):
        select_experts(keras.layers.Dense(3), [0])
    for indices in ([], [0, 4], [-1]):
        with pytest.raises(ValueError, match="from 0 to 3"):
            select_experts(make_moe(), indices)
    with pytest.raises(ValueError, match="at least 2 experts"):
        select_experts(make_moe(), [0])
