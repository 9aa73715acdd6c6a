import keras
import numpy as np
import pytest
from keras import ops
from layer_check import functional
from samples import numpy_call

from keras_moe import (
    BiasBalancedMaskedRouter,
    FeedForward,
    FeedForwardExperts,
    MaskedRouter,
    MoeLayer,
    replace_layers,
    select_experts,
    upcycle,
    upcycle_model,
)
from keras_moe.utils.traversal import find_layers

E, F, H, T = 4, 8, 6, 10
DROPLESS = {"train_capacity_factor": None, "eval_capacity_factor": None}


def router(num_experts=E, **kwargs):
    return MaskedRouter(
        num_experts, num_selected_experts=2, normalize_weights=True, **kwargs
    )


@pytest.fixture
def x(rng):
    return rng.normal(size=(3, T, H)).astype("float32")


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
        ({}, DROPLESS),
        ({"gated": True, "use_bias": False, "activation": "silu"}, DROPLESS),
        ({}, {"train_capacity_factor": 4.0, "eval_capacity_factor": 4.0}),
    ],
)
def test_upcycling_preserves_the_outputs(dense, arguments, x):
    feed_forward = trained_feed_forward(**dense)
    layer = upcycle(feed_forward, router(), **arguments)
    assert layer.name == "ff"
    assert layer.experts.num_experts == E
    np.testing.assert_allclose(
        numpy_call(layer, x), numpy_call(feed_forward, x), atol=1e-5
    )


def test_noise_is_added_only_to_the_kernels(x):
    feed_forward = trained_feed_forward()
    layer = upcycle(feed_forward, router(), noise=0.1, seed=0, **DROPLESS)
    again = upcycle(feed_forward, router(), noise=0.1, seed=0, **DROPLESS)
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


def test_two_dense_layers_are_upcycled(x):
    dense = keras.Sequential(
        [
            keras.Input((T, H)),
            keras.layers.Dense(F, activation="relu", bias_initializer="random_normal"),
            keras.layers.Dense(H, bias_initializer="random_normal"),
        ]
    )
    layer = upcycle(dense.layers, router(), **DROPLESS)
    assert layer.name == dense.layers[0].name
    np.testing.assert_allclose(
        numpy_call(layer, x), dense.predict_on_batch(x), atol=1e-5
    )


def dense_model():
    """Feed-forward layers in a nested model, in the model itself, and as `Dense`s."""
    random = {"bias_initializer": "random_normal"}
    inner_inputs = keras.Input((T, H))
    inner = keras.Model(
        inner_inputs,
        inner_inputs + FeedForward(F, name="ff_1", **random)(inner_inputs),
        name="inner",
    )
    inputs = keras.Input((T, H))
    hidden = inner(keras.layers.Dense(H, name="before")(inputs))
    hidden = hidden + FeedForward(F, name="ff_2", **random)(hidden)
    wide = keras.layers.Dense(F, activation="gelu", name="wide", **random)(hidden)
    hidden = hidden + keras.layers.Dense(H, name="narrow", **random)(wide)
    return keras.Model(inputs, keras.layers.Dense(2, name="after")(hidden))


@pytest.mark.parametrize(
    ("layers", "upcycled"),
    [
        (None, ["ff_1", "ff_2"]),
        (["ff_2", ("wide", "narrow")], ["ff_2", "wide"]),
    ],
)
def test_a_whole_model_is_upcycled(layers, upcycled, x):
    model = dense_model()
    expected = model.predict_on_batch(x)
    moe_model = upcycle_model(model, router, layers=layers)
    assert sorted(moe.name for moe in find_layers(moe_model, MoeLayer)) == upcycled
    np.testing.assert_allclose(moe_model.predict_on_batch(x), expected, atol=1e-5)
    moe_model.compile("sgd", "mse")
    history = moe_model.fit(x, expected, epochs=1, verbose=0).history
    assert {f"{name}/load_balancing_loss" for name in upcycled} < set(history)
    paths = {weight.path for weight in moe_model.weights}
    assert {f"{name}/experts/output/kernel" for name in upcycled} < paths
    # The original model has not changed.
    np.testing.assert_array_equal(model.predict_on_batch(x), expected)


class Block(keras.layers.Layer):
    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.feed_forward = FeedForward(F, name="inside")

    def call(self, inputs):
        return self.feed_forward(inputs)


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        (["unknown"], r"must name layers of .*\['unknown'\]"),
        ([("before", "after")], "after must be the only layer that uses"),
        ([("wide", "after")], r"only layer that uses the output of wide.*\['narrow'\]"),
    ],
)
def test_layers_that_cannot_be_upcycled(layers, message):
    with pytest.raises(ValueError, match=message):
        upcycle_model(dense_model(), router, layers=layers)


def test_models_that_cannot_be_upcycled():
    with pytest.raises(ValueError, match="must have `FeedForward` layers to replace"):
        upcycle_model(functional(keras.layers.Dense(3), (T, H)), router)
    inputs = keras.Input((T, H))
    model = keras.Model(inputs, Block(name="block")(FeedForward(F)(inputs)))
    with pytest.raises(ValueError, match=r"inside of others.*block/inside"):
        upcycle_model(model, router)


@pytest.mark.parametrize(
    ("inner", "output", "message"),
    [
        ({}, {"activation": "relu"}, "narrow must have no activation"),
        ({"use_bias": False}, {}, "both or none must have a bias"),
        ({}, {"units": 3}, r"must be \[h, f\] and \[f, h\], not \(6, 8\) and \(8, 3\)"),
    ],
)
def test_dense_layers_that_do_not_fit_together(inner, output, message):
    inner = keras.layers.Dense(**{"units": F, "name": "wide", **inner})
    output = keras.layers.Dense(**{"units": H, "name": "narrow", **output})
    keras.Sequential([keras.Input((T, H)), inner, output])
    with pytest.raises(ValueError, match=message):
        upcycle([inner, output], router())


def make_moe(make_router=router, name=None, **kwargs):
    layer = MoeLayer(
        FeedForwardExperts(E, F, bias_initializer="random_normal"),
        make_router(E, bias_initializer="random_normal", **kwargs),
        **DROPLESS,
        name=name,
    )
    layer.build((None, T, H))
    return layer


def test_an_idle_expert_can_be_removed(x):
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
    pruned = replace_layers(
        model,
        lambda x: select_experts(x, [0, 2, 3]) if isinstance(x, MoeLayer) else None,
    )
    assert pruned.count_params() < model.count_params()
    np.testing.assert_allclose(
        pruned.predict_on_batch(x), model.predict_on_batch(x), atol=1e-5
    )


def test_reordered_experts_give_the_same_outputs(x):
    layer = make_moe(hidden_layers=E)
    reordered = select_experts(layer, [3, 1, 0, 2])
    np.testing.assert_allclose(
        numpy_call(reordered, x), numpy_call(layer, x), atol=1e-6
    )


def test_a_mask_selects_the_experts_that_are_true():
    layer = make_moe()
    by_mask = select_experts(layer, [True, False, True, True])
    by_mask_array = select_experts(layer, np.array([True, False, True, True]))
    by_index = select_experts(layer, [0, 2, 3])
    for found in (by_mask, by_mask_array):
        for a, b in zip(found.get_weights(), by_index.get_weights(), strict=True):
            np.testing.assert_array_equal(a, b)


def test_the_state_of_the_router_is_selected_as_well(x):
    layer = make_moe(
        lambda e, **kwargs: BiasBalancedMaskedRouter(
            e, num_selected_experts=2, **kwargs
        )
    )
    layer.router.expert_bias.assign([0.3, -0.2, 0.1, 0.0])
    reordered = select_experts(layer, [3, 1, 0, 2])
    found = ops.convert_to_numpy(reordered.router.expert_bias)
    np.testing.assert_allclose(found, [0.0, -0.2, 0.3, 0.1])
    np.testing.assert_allclose(
        numpy_call(reordered, x), numpy_call(layer, x), atol=1e-6
    )


def test_other_weights_of_a_layer_are_kept(x):
    """Those of a normalized gate, of scaled experts, and of latent experts."""
    layer = MoeLayer(
        FeedForwardExperts(4, 5),
        MaskedRouter(4, input_norm_epsilon=1e-6, use_expert_scale=True),
        latent_dim=3,
    )
    layer.build(x.shape)
    rng = np.random.default_rng(0)
    for weight in layer.weights:
        weight.assign(rng.normal(size=weight.shape))
    reordered = select_experts(layer, [3, 1, 0, 2])
    np.testing.assert_allclose(
        numpy_call(reordered, x), numpy_call(layer, x), atol=1e-5
    )
    scale = ops.convert_to_numpy(layer.router.expert_scale)
    found = ops.convert_to_numpy(reordered.router.expert_scale)
    np.testing.assert_array_equal(found, scale[[3, 1, 0, 2]])


def test_identity_experts_are_not_selected(x):
    layer = MoeLayer(FeedForwardExperts(4, 5, num_identity_experts=1), MaskedRouter(4))
    layer.build(x.shape)
    with pytest.raises(ValueError, match="must have no identity experts"):
        select_experts(layer, [0, 1])


def test_experts_can_be_duplicated(x):
    """A duplicated expert has the kernel of the original, with noise if requested."""
    layer = make_moe()
    larger = select_experts(layer, [0, 1, 2, 3, 1])
    np.testing.assert_array_equal(
        ops.convert_to_numpy(larger.experts.intermediate_layer.kernel)[4],
        ops.convert_to_numpy(layer.experts.intermediate_layer.kernel)[1],
    )
    noisy = select_experts(layer, [0, 1, 2, 3, 1], noise=0.1, seed=0)
    for found, expected, axis in (
        (noisy.experts.output_layer.kernel, larger.experts.output_layer.kernel, 0),
        (noisy.router.router_weights.kernel, larger.router.router_weights.kernel, -1),
    ):
        found, expected = map(ops.convert_to_numpy, (found, expected))
        changed = [
            not np.array_equal(np.take(found, i, axis), np.take(expected, i, axis))
            for i in range(5)
        ]
        assert changed == [False, False, False, False, True]
    model = functional(noisy, (T, H))
    model.compile("sgd", "mse")
    assert np.all(np.isfinite(model.train_on_batch(x, x)))


def test_unsupported_arguments():
    with pytest.raises(TypeError, match=r"`feed_forward` must be.*Dense"):
        upcycle(keras.layers.Dense(3), router())
    with pytest.raises(ValueError, match="ff must be built"):
        upcycle(FeedForward(F, name="ff"), router())
    quantized = trained_feed_forward()
    quantized.quantize("int8")
    with pytest.raises(ValueError, match="must not be quantized to be copied"):
        upcycle(quantized, router())
    with pytest.raises(TypeError, match="`layer` must be a `MoeLayer`"):
        select_experts(keras.layers.Dense(3), [0])
    with pytest.raises(TypeError, match="two `Dense` layers"):
        upcycle([FeedForward(F)], router())
    with pytest.raises(TypeError, match="`router` must be a `Router`"):
        upcycle(trained_feed_forward(), keras.layers.Dense(3))
    with pytest.raises(TypeError, match="must be ints, or bools"):
        select_experts(make_moe(), [0.5, 1.0])
    with pytest.raises(ValueError, match="one bool for each of 4 experts"):
        select_experts(make_moe(), [True, False, True])
    for indices in ([], [0, 4], [-1], [[0, 1]], [False] * 4):
        with pytest.raises(ValueError, match="from 0 to 3"):
            select_experts(make_moe(), indices)
    with pytest.raises(ValueError, match="at least 2 experts"):
        select_experts(make_moe(), [0])
