"""The options of layers and experts that models vary, each alone."""

import keras
import numpy as np
import pytest
from keras import ops
from samples import E, F, H, inputs, numpy_call

import keras_moe
from keras_moe import FeedForwardExperts, MaskedRouter, MoeLayer, MoeLayerWithBackbone
from keras_moe.activations import ClampedSwiGLU, clamped_swiglu, gelu_tanh, squared_relu
from keras_moe.routing.dispatch import combine, dispatch, unweighted

DROPLESS = {"train_capacity_factor": None, "eval_capacity_factor": None}
CAPACITY = {"train_capacity_factor": 4.0, "eval_capacity_factor": 4.0}
each_capacity = pytest.mark.parametrize("capacity", [DROPLESS, CAPACITY])


def make(router=None, capacity=DROPLESS, experts=None, **kwargs):
    router = {"num_selected_experts": 2, "num_experts": E, **(router or {})}
    experts = {"num_experts": E, "d_ff": F, **(experts or {})}
    layer = MoeLayer(
        FeedForwardExperts(kernel_initializer="glorot_normal", **experts),
        MaskedRouter(kernel_initializer="glorot_normal", **router),
        **capacity,
        **kwargs,
    )
    layer.build((None, None, H))
    return layer


def weights_by_hand(layer, x):
    """Returns the combine weights `[t, e]` of tokens `[t, h]`."""
    probs = ops.convert_to_numpy(layer.router.router_weights(x))
    order = np.argsort(-probs, axis=-1, kind="stable")[:, :2]
    mask = np.zeros_like(probs)
    np.put_along_axis(mask, order, 1, axis=-1)
    return probs * mask


def expert_by_hand(layer, x, e):
    slots = np.zeros((1, layer.num_experts, len(x), x.shape[-1]), "float32")
    slots[0, e] = x
    return ops.convert_to_numpy(layer.experts(slots))[0, e]


@each_capacity
def test_weighted_inputs(capacity, rng):
    layer = make(capacity=capacity, weighted_inputs=True)
    x = inputs(rng, 2, 5)
    tokens = x.reshape(-1, H)
    weights = weights_by_hand(layer, tokens)
    expected = sum(
        np.where(
            weights[:, e : e + 1] > 0,
            expert_by_hand(layer, weights[:, e : e + 1] * tokens, e),
            0,
        )
        for e in range(E)
    )
    found = numpy_call(layer, x).reshape(-1, H)
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_weighted_inputs_of_a_mask(rng):
    """A routing as a mask gives what one as slots gives."""
    layer = make(capacity=CAPACITY)
    x = ops.convert_to_tensor(inputs(rng, 2, 5))
    slots = layer.route(x)
    mask = keras_moe.RouterMask(slots.dispatch_mask, slots.combine_array)
    results = [
        combine(dispatch(x, routing, weighted=True), unweighted(routing))
        for routing in (slots, mask)
    ]
    found, expected = map(ops.convert_to_numpy, results)
    np.testing.assert_allclose(found, expected, atol=1e-6)


@each_capacity
def test_other_inputs_for_the_router(capacity, rng):
    """The weights are those of the router's inputs, the experts see the others."""
    layer = make(capacity=capacity)
    x, seen = inputs(rng, 2, 5), inputs(rng, 2, 5)
    tokens = x.reshape(-1, H)
    weights = weights_by_hand(layer, seen.reshape(-1, H))
    expected = sum(
        weights[:, e : e + 1] * expert_by_hand(layer, tokens, e) for e in range(E)
    )
    found = numpy_call(layer, x, router_inputs=seen).reshape(-1, H)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    np.testing.assert_array_equal(
        numpy_call(layer, x, router_inputs=x), numpy_call(layer, x)
    )


def test_other_inputs_for_the_router_in_models(rng, tmp_path):
    """In a functional model, in its file, and with a shared expert."""
    x, seen = inputs(rng, 4, 5), inputs(rng, 4, 5)
    layer = MoeLayerWithBackbone(make(), 3)
    tensors = [keras.Input((5, H)) for _ in range(2)]
    outputs = layer(tensors[0], router_inputs=tensors[1])
    model = keras.Model(tensors, outputs)
    model.compile("sgd", "mse")
    model.fit([x, seen], x, verbose=0)
    expected = model.predict([x, seen], verbose=0)
    np.testing.assert_allclose(
        expected, numpy_call(layer, x, router_inputs=seen), atol=1e-5
    )
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    np.testing.assert_allclose(
        loaded.predict([x, seen], verbose=0), expected, atol=1e-6
    )
    _, routing = make()(tensors[0], router_inputs=tensors[1], return_routing=True)
    assert routing.probs.shape[-1] == E
    with pytest.raises(ValueError, match="`router_inputs` must have the shape"):
        layer(x, router_inputs=seen[:, :3])


@each_capacity
def test_latent_experts(capacity, rng):
    layer = make(capacity=capacity, latent_dim=3)
    x = inputs(rng, 2, 5)
    tokens = x.reshape(-1, H)
    weights = weights_by_hand(layer, tokens)
    down, up = (
        ops.convert_to_numpy(part.kernel)
        for part in (layer.latent_input, layer.latent_output)
    )
    assert down.shape == (H, 3)
    results = sum(
        weights[:, e : e + 1] * expert_by_hand(layer, tokens @ down, e)
        for e in range(E)
    )
    found = numpy_call(layer, x).reshape(-1, H)
    np.testing.assert_allclose(found, results @ up, atol=1e-5)
    layer.quantize("int8")
    assert layer.latent_input.quantization_mode is None


@each_capacity
@pytest.mark.parametrize("experts", [2, 40])
def test_identity_experts(capacity, experts, rng):
    """They have no weights: their outputs are their inputs."""
    total = experts + 2
    layer = make(
        {"num_experts": total, "num_selected_experts": 2},
        capacity if capacity is DROPLESS else dict.fromkeys(CAPACITY, float(total)),
        {"num_experts": total, "num_identity_experts": 2},
    )
    # Half of the tokens select identity experts.
    bias = np.zeros(total, "float32")
    bias[-1] = 1.5
    layer.router.router_weights.bias.assign(bias)
    assert layer.experts.intermediate_layer.kernel.shape[0] == experts
    x = inputs(rng, 3, 6)
    mask = np.ones((3, 6), bool)
    mask[0, 4:] = False
    tokens = x.reshape(-1, H)
    weights = weights_by_hand(layer, tokens)
    assert (weights[:, -2:] > 0).any()
    assert (weights[:, :-2] > 0).any()
    expected = sum(
        weights[:, e : e + 1]
        * (expert_by_hand(layer, tokens, e) if e < experts else tokens)
        for e in range(total)
    )
    expected = np.where(mask.reshape(-1, 1), expected, 0).reshape(x.shape)
    np.testing.assert_allclose(numpy_call(layer, x, mask=mask), expected, atol=1e-5)


def test_an_average_with_the_shared_expert(rng):
    moe = make()
    layers = [MoeLayerWithBackbone(moe, 3, average=a) for a in (False, True)]
    x = inputs(rng, 2, 5)
    for layer in layers:
        layer.build(x.shape)
    layers[1].backbone.set_weights(layers[0].backbone.get_weights())
    sums, averages = (numpy_call(layer, x) for layer in layers)
    np.testing.assert_allclose(averages, sums / 2, atol=1e-6)


def test_activations(rng):
    x, gate = (rng.normal(scale=5, size=20).astype("float32") for _ in range(2))
    np.testing.assert_allclose(squared_relu(x), np.maximum(x, 0) ** 2, rtol=1e-6)
    inner = 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))
    np.testing.assert_allclose(gelu_tanh(x), inner, atol=1e-5)
    g = np.minimum(gate, 7)
    expected = (np.clip(x, -7, 7) + 1) * g / (1 + np.exp(-1.702 * g))
    np.testing.assert_allclose(clamped_swiglu(gate, x), expected, atol=1e-4)
    g = np.minimum(gate, 2)
    expected = np.clip(x, -2, 2) * g / (1 + np.exp(-g))
    activation = ClampedSwiGLU(limit=2.0, alpha=1.0, offset=0.0)
    np.testing.assert_allclose(activation(gate, x), expected, atol=1e-5)
    assert activation == ClampedSwiGLU(2.0, 1.0, 0.0) != ClampedSwiGLU(2.0)
    with pytest.raises(ValueError, match="`limit` must be more than 0"):
        ClampedSwiGLU(limit=0)


@keras.saving.register_keras_serializable(package="tests")
def gate_and_inner(gate, inner):
    return ops.tanh(gate) + inner


@pytest.mark.parametrize(
    "activation", [gate_and_inner, clamped_swiglu, ClampedSwiGLU(limit=1.0)]
)
def test_a_function_of_gate_and_inner_layer(activation, rng, tmp_path):
    layer = make(experts={"activation": activation, "gated": True})
    experts = layer.experts
    x = inputs(rng, 2, 5)
    kernels = [ops.convert_to_numpy(d.kernel) for d in experts.dense_layers]
    inner, output, gate = (kernel[1] for kernel in kernels)
    tokens = x.reshape(-1, H)
    hidden = ops.convert_to_numpy(activation(tokens @ gate, tokens @ inner))
    found = expert_by_hand(layer, tokens, 1)
    np.testing.assert_allclose(found, hidden @ output, atol=1e-4)
    model = keras.Sequential([keras.Input((5, H)), layer])
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    expected = numpy_call(model, x)
    np.testing.assert_allclose(numpy_call(loaded, x), expected, atol=1e-6)
    assert loaded.layers[0].experts.activation == activation


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda: FeedForwardExperts(E, F, activation=clamped_swiglu),
            ValueError,
            "so `gated` must be true",
        ),
        (
            lambda: FeedForwardExperts(E, F, num_identity_experts=E),
            ValueError,
            "`num_identity_experts` must be at least 0 and at most 3",
        ),
        (lambda: make(latent_dim=0), ValueError, "`latent_dim` must be at least 1"),
        (lambda: make(weighted_inputs=1), TypeError, "`weighted_inputs` must be a b"),
        (
            lambda: MoeLayerWithBackbone(make(), 3, average=1),
            TypeError,
            "`average` must be a bool",
        ),
    ],
)
def test_refused_options(call, error, message):
    with pytest.raises(error, match=message):
        call()
