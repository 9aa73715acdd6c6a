"""Dropless layers equal layers whose capacity is so large that nothing is dropped."""

import keras
import numpy as np
import oracle
import pytest
from gradients import gradients
from keras import ops
from layer_check import check_layer, functional
from samples import E, F, H, inputs, numpy_call

from keras_moe import (
    BiasBalancedMaskedRouter,
    ExpertsChooseMaskedRouter,
    FeedForward,
    FeedForwardExperts,
    HeterogeneousExperts,
    HierarchicalMoeLayer,
    MaskedRouter,
    MoeLayer,
    Router,
    Rows,
    Slots,
    Top2MaskedRouter,
)

# The default initializer gives nearly uniform probabilities.
GATE = {"kernel_initializer": "glorot_uniform"}


def make_moe(router=None, train=None, evaluation=None, dtype=None, **kwargs):
    router = router or MaskedRouter(E, num_selected_experts=2, dtype=dtype, **GATE)
    experts = FeedForwardExperts(
        E, F, kernel_initializer="he_normal", bias_initializer="he_normal", dtype=dtype
    )
    return MoeLayer(
        experts,
        router,
        train_capacity_factor=train,
        eval_capacity_factor=evaluation,
        dtype=dtype,
        **kwargs,
    )


ROUTERS = {
    "switch": lambda: MaskedRouter(E, **GATE),
    "two": lambda: MaskedRouter(E, num_selected_experts=2, **GATE),
    "all": lambda: MaskedRouter(E, num_selected_experts=E, **GATE),
    "sigmoid": lambda: MaskedRouter(
        E, num_selected_experts=2, mechanism="sigmoid", normalize_weights=True
    ),
    "next best": lambda: MaskedRouter(
        E, num_selected_experts=2, priority="token", overflow="next_best", **GATE
    ),
    "probability": lambda: MaskedRouter(E, priority="probability", **GATE),
    "bias balanced": lambda: BiasBalancedMaskedRouter(
        E, num_selected_experts=2, **GATE
    ),
    "top 2": lambda: Top2MaskedRouter(E, **GATE),
}


@pytest.mark.parametrize("name", ROUTERS)
@pytest.mark.parametrize("examples", [1, 2, None, 1 / 3])
def test_results_equal_those_with_a_large_capacity(name, examples, rng):
    x, mask = inputs(rng, 3, 8), rng.random((3, 8)) < 0.7
    dropless = make_moe(ROUTERS[name](), examples_per_group=examples)
    reference = make_moe(ROUTERS[name](), 9.0, 9.0, examples_per_group=examples)
    dropless.build(x.shape)
    reference.build(x.shape)
    reference.set_weights(dropless.get_weights())
    for m in (None, mask):
        np.testing.assert_allclose(
            numpy_call(dropless, x, mask=m), numpy_call(reference, x, mask=m), atol=1e-5
        )
        assert [float(a) for a in dropless.losses] == pytest.approx(
            [float(a) for a in reference.losses], abs=1e-6
        )
        rows, slots = (layer.route(x, mask=m) for layer in (dropless, reference))
        assert isinstance(rows, Rows)
        assert isinstance(slots, Slots)
        for part in ("probs", "load", "slots_per_token"):
            np.testing.assert_allclose(
                ops.convert_to_numpy(getattr(rows, part)),
                ops.convert_to_numpy(getattr(slots, part)),
                atol=1e-6,
            )
        assert float(dropless.balance_loss(rows)) == pytest.approx(
            float(reference.balance_loss(slots)), abs=1e-6
        )
    found, expected = (
        {m.name.split("/")[-1]: float(m.result()) for m in layer.router.metrics}
        for layer in (dropless, reference)
    )
    assert found.pop("expert_usage") == 1
    assert expected.pop("expert_usage") < 1
    assert found == pytest.approx(expected, abs=1e-5)


def test_outputs_match_the_oracle(rng):
    x, mask = inputs(rng, 3, 8), rng.random((3, 8)) < 0.7
    layer = make_moe()
    outputs = numpy_call(layer, x, mask=mask)
    weights = {w.path.split("/", 1)[1]: w.numpy() for w in layer.weights}
    names = ("router/router_weights", "experts/intermediate", "experts/output")
    ordered = [weights[f"{n}/{part}"] for n in names for part in ("kernel", "bias")]
    expected, _ = oracle.moe(
        x, ordered, factor=9.0, examples_per_group=1, mask=mask, k=2
    )
    np.testing.assert_allclose(outputs, expected, atol=1e-5)


def test_gradients_equal_those_with_a_large_capacity(rng):
    x, target = inputs(rng, 3, 8), inputs(rng, 3, 8)
    mask = rng.random((3, 8)) < 0.7
    dropless, reference = make_moe(), make_moe(None, 9.0, 9.0)
    for layer in (dropless, reference):
        layer.build(x.shape)
    weights = [ops.convert_to_numpy(w) for w in dropless.trainable_variables]
    state = [ops.convert_to_tensor(w) for w in dropless.non_trainable_variables]

    def error(layer):
        def function(x, *weights):
            names = layer.trainable_variables, layer.non_trainable_variables
            pairs = [
                *zip(names[0], weights, strict=True),
                *zip(names[1], state, strict=True),
            ]
            with keras.StatelessScope(pairs):
                outputs = layer(x, mask=mask, training=True)
                return ops.sum(ops.square(outputs - ops.convert_to_tensor(target)))

        return function

    found, expected = (
        gradients(error(layer), x, *weights) for layer in (dropless, reference)
    )
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4 * max(1, np.abs(b).max()))
        assert np.abs(b).max() > 0


def test_rows_table():
    """Four tokens: two select expert 2, and one is masked."""
    layer = make_moe(MaskedRouter(E, use_bias=False))
    layer.build((1, 4, H))
    layer.router.set_weights([10 * np.eye(H, E)])
    x = np.eye(H, dtype="float32")[[2, 0, 1, 2]][None]
    rows = layer.route(x, mask=np.array([[True, True, False, True]]))
    token, weight, sizes, _, load, index = (ops.convert_to_numpy(a) for a in rows)
    assert token.tolist() == [[1, 0, 3, -1]]
    np.testing.assert_allclose(weight, [[1, 1, 1, 0]], atol=1e-3)
    assert sizes.tolist() == [1, 0, 2, 0]
    np.testing.assert_allclose(load, [[1 / 3, 0, 2 / 3, 0]])
    assert index.tolist() == [[[2], [0], [-1], [2]]]
    assert float(rows.expert_usage) == 0.5


def test_an_example_does_not_depend_on_its_batch(rng):
    """In evaluation, an example has the same outputs alone and in a batch."""
    x = inputs(rng, 6, 8)
    layer = make_moe(examples_per_group=None)
    together = numpy_call(layer, x)
    alone = np.concatenate([numpy_call(layer, x[i : i + 1]) for i in range(6)])
    np.testing.assert_allclose(together, alone, atol=1e-6)


def test_all_tokens_on_one_expert_or_masked(rng):
    layer = make_moe(MaskedRouter(E))
    x = np.repeat(inputs(rng, 1, 1), 24, axis=1).reshape(3, 8, H)
    outputs = numpy_call(layer, x)
    np.testing.assert_allclose(
        outputs, np.broadcast_to(outputs[0, 0], x.shape), rtol=1e-5
    )
    assert (ops.convert_to_numpy(layer.route(x).group_sizes) > 0).sum() == 1
    assert not numpy_call(layer, x, mask=np.zeros((3, 8), bool)).any()
    assert numpy_call(layer, x[:0]).shape == (0, 8, H)


def test_a_nan_token_does_not_affect_others(rng):
    x = inputs(rng, 3, 8)
    layer = make_moe()
    expected = numpy_call(layer, x)
    x[1, 3] = np.nan
    outputs = numpy_call(layer, x)
    kept = np.delete(outputs.reshape(24, H), 11, axis=0)
    np.testing.assert_allclose(
        kept, np.delete(expected.reshape(24, H), 11, axis=0), atol=1e-6
    )
    assert np.isnan(outputs[1, 3]).all()


def test_the_capacity_factors_are_independent(rng):
    x = inputs(rng, 3, 8)
    layer = make_moe(None, 2.0, None)
    assert isinstance(layer.route(x, training=True), Slots)
    assert isinstance(layer.route(x), Rows)
    other = make_moe(None, None, 2.0)
    assert isinstance(other.route(x, training=True), Rows)
    assert isinstance(other.route(x), Slots)
    copy = MoeLayer.from_config(layer.get_config())
    assert (copy.train_capacity_factor, copy.eval_capacity_factor) == (2.0, None)


def test_the_layer_check(tmp_path):
    check_layer(make_grouped_moe, (12, H), tmp_path / "model.keras")


def make_grouped_moe(**kwargs):
    return make_moe(examples_per_group=2, **kwargs)


def test_unknown_lengths(rng):
    layer = make_moe(examples_per_group=2)
    reference = make_moe(None, 99.0, 99.0, examples_per_group=2)
    symbolic = keras.Input((None, H))
    model = keras.Model(symbolic, layer(symbolic))
    model.compile("sgd", "mse")
    reference.build((None, None, H))
    for shape in ((3, 8), (2, 5), (1, 1)):
        x = inputs(rng, *shape)
        reference.set_weights(layer.get_weights())
        np.testing.assert_allclose(
            model.predict_on_batch(x), numpy_call(reference, x), atol=1e-5
        )
        model.train_on_batch(x, x)


def test_the_routing_of_a_symbolic_call():
    outputs, rows = make_moe()(keras.Input((8, H)), return_routing=True)
    assert outputs.shape == (None, 8, H)
    assert isinstance(rows, Rows)
    assert rows.group_sizes.shape == (E,)


@pytest.mark.skipif(
    keras.backend.backend() != "tensorflow", reason="XLA is optional on TensorFlow only"
)
def test_keras_turns_off_unsupported_xla(rng):
    model = functional(make_moe(), (8, H))
    with pytest.warns(UserWarning, match="jit_compile"):
        model.compile("sgd", "mse", jit_compile=True)
    x = inputs(rng, 2, 8)
    assert np.isfinite(model.train_on_batch(x, x)).all()
    assert functional(make_moe(None, 2.0, 2.0), (8, H)).layers[1].supports_jit


def test_many_experts_and_many_choices(rng):
    experts = FeedForwardExperts(256, 3, kernel_initializer="he_normal")
    router = MaskedRouter(256, num_selected_experts=8, **GATE)
    layer = MoeLayer(
        experts, router, train_capacity_factor=None, eval_capacity_factor=None
    )
    x = inputs(rng, 2, 16)
    reference = MoeLayer(
        FeedForwardExperts(256, 3),
        MaskedRouter(256, num_selected_experts=8),
        train_capacity_factor=256.0,
        eval_capacity_factor=256.0,
    )
    reference.build(x.shape)
    layer.build(x.shape)
    reference.set_weights(layer.get_weights())
    np.testing.assert_allclose(
        numpy_call(layer, x), numpy_call(reference, x), atol=1e-5
    )


def test_many_tokens_in_one_group():
    """65,536 tokens: an array of tokens² or tokens · e · c would need gigabytes."""
    layer = make_moe(examples_per_group=None)
    x = np.random.default_rng(0).normal(size=(8, 8192, H)).astype("float32")
    outputs = numpy_call(layer, x)
    np.testing.assert_allclose(outputs[:1], numpy_call(layer, x[:1]), atol=1e-5)


@pytest.mark.parametrize("num_experts", [4, 20])  # a loop, and all at once
def test_lora(num_experts, rng):
    """The outputs are those with a capacity, and the kernels are not trained."""
    x = inputs(rng, 2, 30)
    dropless, reference = (
        MoeLayer(
            FeedForwardExperts(num_experts, F),
            MaskedRouter(num_experts, num_selected_experts=2, **GATE),
            train_capacity_factor=factor,
            eval_capacity_factor=factor,
        )
        for factor in (None, float(num_experts))
    )
    for layer in (dropless, reference):
        layer.build(x.shape)
        for dense in (layer.experts.intermediate_layer, layer.experts.output_layer):
            dense.enable_lora(2)
    adapted = [rng.normal(size=w.shape) for w in dropless.get_weights()]
    for layer in (dropless, reference):
        layer.set_weights(adapted)
    expected = numpy_call(reference, x)
    scale = np.abs(expected).max()
    np.testing.assert_allclose(numpy_call(dropless, x), expected, atol=1e-5 * scale)

    model = functional(dropless, x.shape[1:])
    model.compile(keras.optimizers.SGD(1e-3), "mse")
    before = {w.path: ops.convert_to_numpy(w).copy() for w in dropless.weights}
    model.train_on_batch(x, x)
    for w in dropless.weights:
        changed = not np.array_equal(before[w.path], ops.convert_to_numpy(w))
        frozen = "experts" in w.path and w.path.endswith("/kernel")
        assert changed != frozen, w.path


class NoRows(keras.layers.Layer):
    num_experts = E

    def call(self, inputs):
        return inputs


class NeedsCapacity(Router):
    pass


@pytest.mark.parametrize(
    ("experts", "router", "message"),
    [
        (None, ExpertsChooseMaskedRouter(E), "ExpertsChooseMaskedRouter needs"),
        (None, NeedsCapacity(E), "NeedsCapacity needs a capacity"),
        (NoRows(), None, "must accept rows.*NoRows"),
        (HeterogeneousExperts([FeedForward(2)] * E), None, "must accept rows"),
    ],
)
@pytest.mark.parametrize("factors", [(None, None), (None, 1.0), (1.0, None)])
@pytest.mark.filterwarnings("ignore:A capacity factor")
def test_experts_and_routers_that_need_a_capacity(experts, router, message, factors):
    train, evaluation = factors
    with pytest.raises(ValueError, match=message):
        MoeLayer(
            experts or FeedForwardExperts(E, F),
            router or MaskedRouter(E),
            train_capacity_factor=train,
            eval_capacity_factor=evaluation,
        )


def test_hierarchical_layers_need_a_capacity():
    with pytest.raises(ValueError, match="need a capacity"):
        HierarchicalMoeLayer(
            FeedForwardExperts(4, F),
            Top2MaskedRouter(2, name="outer"),
            Top2MaskedRouter(2, name="inner"),
            train_capacity_factor=None,
        )
