import keras
import numpy as np
import oracle
import pytest
from keras import ops
from layer_check import check_layer, functional
from samples import E, F, H, inputs, numpy_call, prefer_first

from keras_moe import (
    ExpertsChooseMaskedRouter,
    FeedForward,
    FeedForwardExperts,
    MaskedRouter,
    MoeLayer,
    MoeLayerWithBackbone,
    Router,
    RouterMask,
    Slots,
)
from keras_moe.routing.placement import assign_slots
from keras_moe.routing.selection import top_k

XLA = keras.backend.backend() != "torch"


def make_router(k=1, **kwargs):
    # The default initializer gives nearly uniform probabilities.
    kwargs = {"kernel_initializer": "glorot_uniform", **kwargs}
    if k is None:
        return ExpertsChooseMaskedRouter(E, **kwargs)
    return MaskedRouter(E, num_selected_experts=k, **kwargs)


def make_moe(k=1, factor=1.0, router=None, dtype=None, **kwargs):
    experts = FeedForwardExperts(
        E, F, kernel_initializer="he_normal", bias_initializer="he_normal", dtype=dtype
    )
    return MoeLayer(
        experts,
        router or make_router(k, dtype=dtype),
        train_capacity_factor=float(k or 1),
        eval_capacity_factor=factor,
        dtype=dtype,
        **kwargs,
    )


def metric_values(layer):
    return {m.name.split("/")[-1]: float(m.result()) for m in layer.router.metrics}


def oracle_weights(layer):
    """Returns the weights in the order of the oracle's arguments."""
    weights = {w.path.split("/", 1)[1]: w.numpy() for w in layer.weights}
    names = ("router/router_weights", "experts/intermediate", "experts/output")
    return [weights[f"{n}/{part}"] for n in names for part in ("kernel", "bias")]


# Some tests drop tokens with a small capacity, which gives a warning.
pytestmark = pytest.mark.filterwarnings("ignore:A capacity factor")

# Outputs and metrics.


@pytest.mark.parametrize(
    ("k", "factor", "examples"),
    [
        (1, 1.25, 1),
        (1, 0.5, 2),
        (2, 1.25, None),
        (2, 9.0, 1 / 3),
        (2, 0.1, 2),
        (None, 1.25, 1),
        (None, 0.5, None),
        (None, 9.0, 2),
    ],
)
def test_outputs_and_metrics_match_the_oracle(k, factor, examples, rng):
    x = inputs(rng, 5, 8)
    mask = rng.random((5, 8)) < 0.8
    for m in (None, mask):
        layer = make_moe(k, factor, examples_per_group=examples)
        outputs = numpy_call(layer, x, mask=m)
        expected, metrics = oracle.moe(
            x,
            oracle_weights(layer),
            factor=factor,
            examples_per_group=examples,
            mask=m,
            k=k,
        )
        np.testing.assert_allclose(outputs, expected, atol=1e-5)
        found = metric_values(layer)
        assert found.pop("router_z_loss") == 0
        assert found == pytest.approx(metrics, abs=1e-5)


@pytest.mark.parametrize("shape", [(8,), (4, 2), (2, 2, 2), (2, 2, 1, 2)])
def test_inputs_of_rank_2_and_more(shape, rng):
    """The axes between batch and hidden only determine how tokens are grouped."""
    x = inputs(rng, *shape)
    layer = make_moe(examples_per_group=None)
    outputs = numpy_call(layer, x)
    assert outputs.shape == x.shape
    flat = numpy_call(layer, x.reshape(1, 8, H))
    np.testing.assert_allclose(outputs.reshape(1, 8, H), flat, atol=1e-6)


def test_rank_2_with_several_examples_per_group(rng):
    x = inputs(rng, 7)
    layer = make_moe(examples_per_group=3)
    expected, _ = oracle.moe(
        x[:, None],
        build_and_get_oracle_weights(layer, x),
        factor=1.0,
        examples_per_group=3,
        k=1,
    )
    np.testing.assert_allclose(numpy_call(layer, x), expected[:, 0], atol=1e-5)


def build_and_get_oracle_weights(layer, x):
    layer(x)
    return oracle_weights(layer)


def test_a_dropped_token_has_an_output_of_0(rng):
    layer = make_moe(factor=0.25, router=make_router(bias_initializer=prefer_first))
    x = inputs(rng, 1, 16)
    outputs = numpy_call(layer, x)
    # All tokens select expert 0, which has one slot.
    assert outputs[0, 0].any() and not outputs[0, 1:].any()
    assert metric_values(layer)["fraction_tokens_left_behind"] == pytest.approx(15 / 16)


def test_the_capacity_in_training_and_in_evaluation(rng):
    x = inputs(rng, 2, 16)
    layer = MoeLayer(
        FeedForwardExperts(E, F),
        make_router(),
        train_capacity_factor=0.5,
        eval_capacity_factor=2.0,
        min_expert_capacity=3,
    )
    for training, capacity in ((True, 3), (False, 8), (None, 8)):
        _, routing = layer(x, training=training, return_routing=True)
        assert routing.token_index.shape == (2, E, capacity)


def test_masks(rng):
    """A masked token has an output of 0 and does not affect the others."""
    x = inputs(rng, 3, 8)
    mask = rng.random((3, 8)) < 0.6
    for k in (1, None):
        layer = make_moe(k, factor=2.0)
        outputs = numpy_call(layer, x, mask=mask)
        assert not outputs[~mask].any()
        metrics = metric_values(layer)
        other = np.where(mask[..., None], x, np.nan)
        for m in layer.router.metrics:
            m.reset_state()
        np.testing.assert_array_equal(numpy_call(layer, other, mask=mask), outputs)
        assert metric_values(layer) == metrics


def test_all_masked(rng):
    layer = make_moe(2, factor=2.0)
    outputs = numpy_call(layer, inputs(rng, 2, 8), mask=np.zeros((2, 8), bool))
    assert not outputs.any()
    assert all(float(loss) == 0 for loss in layer.losses)
    assert set(metric_values(layer).values()) == {0.0}


def test_the_mask_of_an_embedding_is_used_and_passed_on():
    tokens = keras.Input((8,), dtype="int32")
    embedded = keras.layers.Embedding(10, H, mask_zero=True)(tokens)
    layer = make_moe()
    outputs = layer(embedded)
    seen = keras.layers.Lambda(
        lambda x, mask=None: ops.cast(mask, "float32"), output_shape=(8,)
    )(outputs)
    model = keras.Model(tokens, [outputs, seen])
    x = np.array([[1, 2, 3, 0, 0, 0, 0, 0], [4, 5, 0, 6, 7, 8, 9, 0]])
    outputs, seen = model.predict(x, verbose=0)
    np.testing.assert_array_equal(seen, x != 0)
    assert not outputs[x == 0].any()


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("k", [1, 2, None])
def test_a_nonfinite_token_does_not_affect_others(value, k, rng):
    x = inputs(rng, 3, 8)
    x[1, 3] = value
    layer = make_moe(k, factor=2.0)
    outputs, routing = layer(x, return_routing=True)
    outputs = ops.convert_to_numpy(outputs)
    index = ops.convert_to_numpy(routing.token_index)
    np.testing.assert_array_equal(np.isfinite(outputs[[0, 2]]), True)
    with_same_expert = {t for row in index[1] if 3 in row for t in row}
    for token in set(range(8)) - with_same_expert:
        assert np.isfinite(outputs[1, token]).all()
    # Experts process rows separately, so that other tokens of an expert stay finite.
    assert np.isfinite(np.delete(outputs[1], 3, axis=0)).all()


def test_return_routing(rng):
    x = inputs(rng, 3, 8)
    layer = make_moe(2, factor=2.0)
    outputs, routing = layer(x, return_routing=True)
    assert isinstance(routing, Slots)
    np.testing.assert_array_equal(ops.convert_to_numpy(outputs), numpy_call(layer, x))
    symbolic = keras.Input((8, H))
    outputs, routing = layer(symbolic, return_routing=True)
    assert outputs.shape == (None, 8, H)
    assert routing.probs.shape == (None, 8, E)
    model = keras.Model(symbolic, [outputs, routing.token_index])
    assert model.predict(x, verbose=0)[1].shape == (3, E, 4)


def test_route_adds_no_losses_or_metrics(rng):
    x = inputs(rng, 3, 8)
    layer = make_moe(2, factor=1.0)
    routing = layer.route(x)
    assert layer.losses == [] and layer.router.metrics == []
    _, from_call = layer(x, return_routing=True)
    for a, b in zip(routing, from_call, strict=True):
        np.testing.assert_array_equal(ops.convert_to_numpy(a), ops.convert_to_numpy(b))
    mask = np.zeros((3, 8), bool)
    assert (ops.convert_to_numpy(layer.route(x, mask).token_index) == -1).all()
    assert layer.route(x, training=True).token_index.shape == (3, E, 4)


def test_balance_loss(rng):
    x = inputs(rng, 3, 8)
    layer = make_moe()
    loss = float(layer.balance_loss(layer.route(x)))
    layer(x)
    assert loss == pytest.approx(metric_values(layer)["load_balancing_loss"])
    assert float(layer.losses[0]) == pytest.approx(0.01 * loss)
    collapsed = make_moe(router=make_router(bias_initializer=prefer_first))
    assert float(collapsed.balance_loss(collapsed.route(x))) == pytest.approx(E)
    all_masked = layer.route(x, mask=np.zeros((3, 8), bool))
    assert float(layer.balance_loss(all_masked)) == 0
    expert_choice = make_moe(None)
    loss = expert_choice.balance_loss(expert_choice.route(x))
    assert float(loss) == pytest.approx(1)


# Inside models.


@pytest.mark.parametrize(
    ("k", "examples"),
    [(2, None), pytest.param(None, 2, marks=pytest.mark.thorough)],
)
def test_the_layer_check(k, examples, tmp_path):
    def make(**kwargs):
        return make_moe(k, factor=2.0, examples_per_group=examples, **kwargs)

    check_layer(make, (12, H), tmp_path / "model.keras")


def make_with_backbone(**kwargs):
    return MoeLayerWithBackbone(
        make_moe(**kwargs), 3, kernel_initializer="he_normal", name="both", **kwargs
    )


def test_the_layer_check_with_a_backbone(tmp_path):
    check_layer(make_with_backbone, (12, H), tmp_path / "model.keras")


def test_the_output_of_the_backbone_is_added(rng):
    x = inputs(rng, 3, 8)
    layer = make_with_backbone()
    outputs = numpy_call(layer, x)
    expected = numpy_call(layer.moe, x) + numpy_call(layer.backbone, x)
    np.testing.assert_allclose(outputs, expected, atol=1e-6)
    assert isinstance(layer.backbone, FeedForward)
    paths = [w.path for w in layer.weights]
    assert "both/backbone/intermediate/kernel" in paths
    assert "both/moe_layer/experts/output/bias" in [
        "/".join(
            "moe_layer" if p.startswith("moe_layer") else p for p in path.split("/")
        )
        for path in paths
    ]


def test_weight_paths_match_model_garden(rng):
    layer = make_moe(name="moe")
    layer(inputs(rng, 2, 4))
    assert {w.path: w.shape for w in layer.weights} == {
        "moe/router/router_weights/kernel": (H, E),
        "moe/router/router_weights/bias": (E,),
        "moe/experts/intermediate/kernel": (E, H, F),
        "moe/experts/intermediate/bias": (E, 1, F),
        "moe/experts/output/kernel": (E, F, H),
        "moe/experts/output/bias": (E, 1, H),
    }


def two_layers():
    x = keras.Input((8, H))
    y = x + make_moe(2, factor=2.0, name="first")(x)
    y = y + make_moe(None, name="second")(y)
    return keras.Model(x, y)


def expected_logs(model, batches, training):
    """Returns the oracle's metrics of both layers, averaged over the batches."""
    first, second = model.get_layer("first"), model.get_layer("second")
    logs = {}
    for x in batches:
        for layer, k in ((first, 2), (second, None)):
            factor = layer.train_capacity_factor
            factor = factor if training else layer.eval_capacity_factor
            y, metrics = oracle.moe(x, oracle_weights(layer), factor=factor, k=k)
            x = x + y
            metrics["router_z_loss"] = 0.0
            for name, value in metrics.items():
                logs.setdefault(f"{layer.name}/{name}", []).append(value)
    return {name: np.mean(values) for name, values in logs.items()}


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        pytest.param({"run_eagerly": True}, marks=pytest.mark.thorough),
        pytest.param({"jit_compile": XLA}, marks=pytest.mark.thorough),
    ],
)
def test_the_history_holds_fourteen_correct_metrics(arguments, rng, tmp_path):
    model = two_layers()
    # With a learning rate of 0, the oracle can compute the metrics of every batch.
    model.compile(keras.optimizers.SGD(0.0), "mse", **arguments)
    x, val = inputs(rng, 6, 8), inputs(rng, 4, 8)
    fit = {"batch_size": 2, "epochs": 2, "shuffle": False, "verbose": 0}
    history = model.fit(x, x, validation_data=(val, val), **fit).history
    trained = expected_logs(model, [x[:2], x[2:4], x[4:]], True)
    validated = expected_logs(model, [val[:2], val[2:]], False)
    assert len(trained) == len(validated) == 14
    for name in trained:
        assert history[name] == pytest.approx([trained[name]] * 2, abs=1e-5)
        assert history[f"val_{name}"] == pytest.approx([validated[name]] * 2, abs=1e-5)
    assert len(history) == 2 * 15
    # The same holds after loading and cloning.
    model.save(tmp_path / "model.keras")
    clone = keras.models.clone_model(model)
    clone.set_weights(model.get_weights())
    clone.compile("sgd", "mse")
    for other in (model, keras.models.load_model(tmp_path / "model.keras"), clone):
        logs = other.evaluate(val, val, batch_size=2, return_dict=True, verbose=0)
        assert {n: logs[n] for n in validated} == pytest.approx(validated, abs=1e-5)


def test_losses_train_the_router(rng):
    """The balance loss and the z-loss train the gate without any other gradient."""
    x = inputs(rng, 4, 16)
    router = make_router(
        bias_initializer=prefer_first,
        load_balancing_loss_weight=1.0,
        router_z_loss_weight=1.0,
        use_bias=True,
    )
    layer = make_moe(router=router)
    symbolic = keras.Input((16, H))
    model = keras.Model(symbolic, 0.0 * layer(symbolic))
    model.compile(keras.optimizers.SGD(0.1), "mse")
    z = np.zeros_like(x)
    history = model.fit(x, z, epochs=8, verbose=0).history
    name = f"{layer.name}/router_z_loss"
    assert history[name][-1] < 0.5 * history[name][0]
    assert history["loss"][0] == pytest.approx(
        history[name][0] + history[f"{layer.name}/load_balancing_loss"][0], rel=1e-4
    )


@pytest.mark.parametrize("examples", [1, 2, None])
def test_unknown_lengths(examples, rng):
    layer = make_moe(examples_per_group=examples)
    x = keras.Input((None, H))
    model = keras.Model(x, layer(x))
    model.compile("sgd", "mse", jit_compile=examples == 2 and XLA)
    for shape in ((3, 8), (2, 5), (1, 1)):
        data = inputs(rng, *shape)
        expected, _ = oracle.moe(
            data, oracle_weights(layer), factor=1.0, examples_per_group=examples, k=1
        )
        outputs = model.predict_on_batch(data)
        np.testing.assert_allclose(outputs, expected, atol=1e-5)
    model.train_on_batch(data, data)


def test_a_shared_layer_of_two_lengths(rng):
    layer = make_moe()
    a, b = keras.Input((8, H)), keras.Input((5, H))
    model = keras.Model([a, b], [layer(a), layer(b)])
    x, y = inputs(rng, 2, 8), inputs(rng, 2, 5)
    for found, data in zip(model.predict([x, y], verbose=0), (x, y), strict=True):
        expected, _ = oracle.moe(data, oracle_weights(layer), factor=1.0, k=1)
        np.testing.assert_allclose(found, expected, atol=1e-5)
    model.compile("sgd", "mse")
    model.fit([x, y], [x, y], verbose=0)


def test_a_frozen_layer_reports_metrics_but_does_not_train(rng):
    x = inputs(rng, 4, 8)
    layer = make_moe(name="moe")
    layer.trainable = False
    model = functional(layer, (8, H))
    model = keras.Sequential([model, keras.layers.Dense(H)])
    model.compile("sgd", "mse")
    before = layer.get_weights()
    history = model.fit(x, x, verbose=0).history
    for a, b in zip(before, layer.get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)
    assert history["moe/expert_usage"][0] > 0


def test_subclassed_blocks_without_build(rng):
    class Block(keras.layers.Layer):
        def __init__(self, **kwargs):
            super().__init__(**kwargs)
            self.moe = make_moe(name="moe")

        def call(self, x):
            return x + self.moe(x)

    class Model(keras.Model):
        def __init__(self):
            super().__init__(name="model")
            self.blocks = [Block(name="a"), Block(name="b")]

        def call(self, x):
            for block in self.blocks:
                x = block(x)
            return x

    x = inputs(rng, 5, 8)
    model = Model()
    model.compile("adam", "mse")
    history = model.fit(x, x, batch_size=2, epochs=2, verbose=0).history
    assert len(history) == 15
    assert "model/a/moe/expert_usage" in history, list(history)
    assert "model/b/moe/expert_usage" in history


def test_nested_functional_models(rng):
    inner = functional(make_moe(name="inner"), (8, H))
    x = keras.Input((8, H))
    model = keras.Model(x, inner(make_moe(name="outer")(x)))
    model.compile("adam", "mse")
    data = inputs(rng, 4, 8)
    history = model.fit(data, data, verbose=0).history
    assert {"inner/expert_usage", "outer/expert_usage"} <= set(history)
    assert len(history) == 15


def test_a_partial_last_batch(rng):
    x = inputs(rng, 7, 8)
    layer = make_moe(examples_per_group=2)
    model = functional(layer, (8, H))
    model.compile("adam", "mse")
    model.fit(x, x, batch_size=4, verbose=0)
    outputs = model.predict(x, batch_size=4, verbose=0)
    for part in (slice(0, 4), slice(4, 7)):
        expected, _ = oracle.moe(
            x[part], oracle_weights(layer), factor=1.0, examples_per_group=2, k=1
        )
        np.testing.assert_allclose(outputs[part], expected, atol=1e-5)


def test_float64(float64, rng):
    layer = make_moe(2, factor=2.0, router=make_router(2, router_z_loss_weight=0.1))
    x = inputs(rng, 4, 8).astype("float64")
    expected, _ = oracle.moe(x, build_and_get_oracle_weights(layer, x), factor=2.0, k=2)
    outputs = numpy_call(layer, x)
    assert outputs.dtype == np.float64
    np.testing.assert_allclose(outputs, expected, atol=1e-6)
    model = functional(layer, (8, H))
    model.compile("sgd", "mse")
    history = model.fit(x, x, verbose=0).history
    assert np.isfinite(history["loss"]).all()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_routing_does_not_change_in_low_precision(dtype, rng):
    """Inputs that are exact in both dtypes are routed the same; only experts round."""
    x = rng.integers(-8, 8, size=(4, 8, H)) / 4
    x = x.astype("float32")
    full = make_moe(2, factor=1.0)
    mixed = make_moe(2, factor=1.0, dtype=f"mixed_{dtype}")
    full(x), mixed(x)
    mixed.set_weights(full.get_weights())
    for a, b in zip(full.route(x), mixed.route(x), strict=True):
        np.testing.assert_array_equal(ops.convert_to_numpy(a), ops.convert_to_numpy(b))
    rounded = ops.convert_to_numpy(ops.cast(mixed(x), "float32"))
    np.testing.assert_allclose(rounded, numpy_call(full, x), atol=0.05)


# Custom layers.


@keras.saving.register_keras_serializable(package="tests")
class MaskedMatmulRouter(MaskedRouter):
    """Returns Model Garden's dense arrays."""

    def compute_routing(self, probs, expert_capacity, training=None):
        slots = MaskedRouter.compute_routing(self, probs, expert_capacity, training)
        return RouterMask(slots.dispatch_mask, slots.combine_array)

    def load_balancing_loss(self, routing):
        return 0.0


def test_a_dense_routing_gives_the_same_outputs(rng):
    x = inputs(rng, 5, 8)
    ours = make_moe(2, factor=1.0)
    dense = make_moe(
        router=MaskedMatmulRouter(
            E, num_selected_experts=2, load_balancing_loss_weight=0.0
        ),
        k=2,
        factor=1.0,
    )
    dense(x), ours(x)
    dense.set_weights(ours.get_weights())
    for m in (*ours.router.metrics, *dense.router.metrics):
        m.reset_state()
    np.testing.assert_allclose(numpy_call(dense, x), numpy_call(ours, x), atol=1e-5)
    expected, found = metric_values(ours), metric_values(dense)
    assert found.pop("load_balancing_loss") == 0 < expected.pop("load_balancing_loss")
    # A dense routing does not know the assignments that are dropped.
    assert found.pop("max_load") < expected.pop("max_load")
    assert found == pytest.approx(expected, abs=1e-6)
    with pytest.raises(TypeError, match=r"routing with probabilities.*RouterMask"):
        dense.balance_loss(dense.route(x))
    model = functional(dense, (8, H))
    model.compile("sgd", "mse")
    model.fit(x, x, verbose=0)


def test_custom_experts_need_no_build(rng):
    class SharedDense(keras.layers.Layer):
        def __init__(self):
            super().__init__(name="experts")
            self.num_experts = E
            self.dense = keras.layers.Dense(H)

        def call(self, inputs):
            return self.dense(inputs)

    layer = MoeLayer(SharedDense(), make_router())
    x = inputs(rng, 4, 8)
    model = functional(layer, (8, H))
    model.compile("sgd", "mse")
    model.fit(x, x, verbose=0)
    assert len(layer.experts.weights) == 2


def test_experts_must_keep_the_shape():
    class Widen(keras.layers.Layer):
        num_experts = E

        def call(self, inputs):
            return ops.concatenate([inputs, inputs], axis=-1)

    with pytest.raises(ValueError, match="`experts` must return the shape"):
        MoeLayer(Widen(), make_router())(np.zeros((2, 3, H)))


def test_a_router_without_exported_metrics_has_no_state(rng):
    layer = make_moe(router=make_router(export_metrics=False))
    model = functional(layer, (8, H))
    model.compile("sgd", "mse")
    x = inputs(rng, 4, 8)
    assert list(model.fit(x, x, verbose=0).history) == ["loss"]
    assert len(layer.variables) == len(layer.weights)


# Errors.


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"train_capacity_factor": 0}, ValueError, "train_capacity_factor=0"),
        ({"eval_capacity_factor": -1.0}, ValueError, "eval_capacity_factor=-1"),
        ({"eval_capacity_factor": float("nan")}, ValueError, "nan"),
        ({"train_capacity_factor": "1"}, TypeError, "train_capacity_factor='1'"),
        ({"examples_per_group": 1.5}, ValueError, "examples_per_group=1.5"),
        ({"examples_per_group": 0}, ValueError, "examples_per_group"),
        ({"examples_per_group": "all"}, TypeError, "examples_per_group='all'"),
        ({"min_expert_capacity": 0}, ValueError, "min_expert_capacity=0"),
        ({"experts": FeedForwardExperts(3, F)}, ValueError, "3 and 4"),
        ({"experts": keras.layers.Dense(3)}, TypeError, "num_experts.*Dense"),
        ({"experts": None}, TypeError, "NoneType"),
        ({"router": keras.layers.Dense(3)}, TypeError, "`router`.*Dense"),
        ({"router": None}, TypeError, "NoneType"),
        ({"unknown": 1}, (TypeError, ValueError), "unknown"),
    ],
)
def test_bad_arguments(arguments, error, message):
    parts = {"experts": FeedForwardExperts(E, F), "router": MaskedRouter(E)}
    with pytest.raises(error, match=message):
        MoeLayer(**{**parts, **arguments})


def test_a_capacity_factor_below_k_gives_a_warning():
    parts = FeedForwardExperts(E, F), MaskedRouter(E, num_selected_experts=2)
    with pytest.warns(UserWarning, match="capacity factor of 1 is below .* 2: some"):
        MoeLayer(*parts, train_capacity_factor=2.0)


@pytest.mark.parametrize("shape", [(H,), ()])
def test_inputs_below_rank_2_are_refused(shape):
    with pytest.raises(ValueError, match=r"\(batch, ..., hidden\)"):
        make_moe()(np.zeros(shape, "float32"))


@pytest.mark.parametrize("examples", [1, 0.5])
def test_groups_of_a_single_token_are_refused(examples):
    with pytest.raises(ValueError, match="`examples_per_group=None`, or a number"):
        make_moe(examples_per_group=examples)(np.zeros((4, H), "float32"))


def test_a_mask_of_a_different_shape_is_refused():
    layer = make_moe()
    with pytest.raises(ValueError, match=r"`mask` must have the shape.*\(2, 3\)"):
        layer(np.zeros((2, 4, H), "float32"), mask=np.ones((2, 3), bool))
    with pytest.raises(ValueError, match="`mask` must have the shape"):
        layer(np.zeros((2, 4, H), "float32"), mask=np.ones((8,), bool))
    with pytest.raises(ValueError, match="`mask` must have the shape"):
        layer(keras.Input((4, H)), mask=keras.Input((5,), dtype="bool"))
    with pytest.raises(ValueError, match="`mask` must have the shape"):
        layer.route(np.zeros((2, 4, H), "float32"), mask=np.ones((2, 3), bool))


def test_a_different_hidden_size_is_refused():
    layer = make_moe()
    layer(np.zeros((2, 4, H), "float32"))
    with pytest.raises(ValueError, match="axis -1"):
        layer(np.zeros((2, 4, H + 1), "float32"))


def test_a_backbone_needs_a_moe_layer():
    with pytest.raises(TypeError, match=r"`moe` must be a `MoeLayer`.*Dense"):
        MoeLayerWithBackbone(keras.layers.Dense(2), 3)
    with pytest.raises(ValueError, match="backbone_d_ff=0"):
        MoeLayerWithBackbone(make_moe(), 0)


def test_assign_slots_and_top_k_match_the_router(rng):
    x = inputs(rng, 2, 8)
    layer = make_moe(2, factor=2.0)
    routing = layer.route(x)
    again = assign_slots(top_k(routing.probs, 2), routing.probs, 4)
    for a, b in zip(routing, again, strict=True):
        np.testing.assert_array_equal(ops.convert_to_numpy(a), ops.convert_to_numpy(b))


class Block(keras.layers.Layer):
    """A block that receives its layer and does not define any shapes."""

    def __init__(self, moe, **kwargs):
        super().__init__(**kwargs)
        self.moe = moe

    def call(self, x):
        return x + self.moe(x)

    def get_config(self):
        moe = keras.saving.serialize_keras_object(self.moe)
        return {**super().get_config(), "moe": moe}

    @classmethod
    def from_config(cls, config):
        moe = keras.saving.deserialize_keras_object(config.pop("moe"))
        return cls(moe, **config)


@pytest.mark.parametrize(
    ("k", "examples", "length"),
    [(2, 1, None), (None, 2, None), (2, 0.5, None), (None, None, None), (2, None, 8)],
)
def test_symbolic_calls_with_unknown_sizes(k, examples, length, rng):
    x = keras.Input((length, H))
    layer = make_moe(k, factor=2.0, examples_per_group=examples)
    model = keras.Model(x, Block(layer)(x))
    data = inputs(rng, 3, 8)
    expected = data + numpy_call(layer, data)
    found = model.predict(data, verbose=0)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    layer(x, return_routing=True)


def test_layers_in_blocks_have_different_metric_names(rng, tmp_path):
    x = keras.Input((8, H))
    y = Block(make_moe(name="moe"), name="a")(x)
    y = Block(make_moe(name="moe"), name="b")(y)
    model = keras.Model(x, y)
    data = inputs(rng, 4, 8)
    model.save(tmp_path / "model.keras")
    file = tmp_path / "model.keras"
    loaded = keras.models.load_model(file, custom_objects={"Block": Block})
    for other in (model, loaded, keras.models.clone_model(model)):
        other.compile("sgd", "mse")
        logs = other.evaluate(data, data, return_dict=True, verbose=0)
        assert {"a/moe/expert_usage", "b/moe/expert_usage"} <= set(logs)
        assert [w.path for w in other.weights] == [w.path for w in model.weights]


def test_a_very_large_capacity_factor_drops_nothing(rng):
    layer = make_moe(factor=1e30, examples_per_group=None)
    x = keras.Input((None, H))
    model = keras.Model(x, layer(x))
    data = inputs(rng, 3, 8)
    slots_per_token = ops.convert_to_numpy(layer.route(data).slots_per_token)
    assert (slots_per_token == 1).all()
    expected = numpy_call(layer, data)
    np.testing.assert_allclose(model.predict(data, verbose=0), expected, atol=1e-5)


def test_the_output_dtype_is_that_of_the_layer(rng):
    layer = MoeLayer(FeedForwardExperts(E, F), MaskedRouter(E), dtype="bfloat16")
    assert layer(keras.Input((8, H))).dtype == "bfloat16"
    outputs = layer(inputs(rng, 2, 8))
    assert keras.backend.standardize_dtype(outputs.dtype) == "bfloat16"


@pytest.mark.parametrize("shape", [(0, 8), (2, 0)])
def test_empty_inputs(shape, rng):
    for examples in (1, 2, None):
        layer = make_moe(examples_per_group=examples)
        outputs = numpy_call(layer, inputs(rng, *shape))
        assert outputs.shape == (*shape, H)
        assert set(metric_values(layer).values()) == {0.0}


def test_a_router_that_returns_another_type_is_refused():
    class Wrong(Router):
        def compute_routing(self, probs, expert_capacity, training=None):
            return probs, probs

    with pytest.raises(TypeError, match=r"`Slots`, `Rows` or a `RouterMask`.*tuple"):
        make_moe(router=Wrong(E))(np.zeros((2, 4, H), "float32"))

    class Dense(MaskedRouter):
        compute_routing = MaskedMatmulRouter.compute_routing

    with pytest.raises(TypeError, match="routing with probabilities"):
        make_moe(router=Dense(E))(np.zeros((2, 4, H), "float32"))


def test_integer_inputs_are_cast():
    x = np.arange(2 * 5 * H).reshape(2, 5, H) % 7
    layer = make_moe(2)
    expected = numpy_call(layer, x.astype("float32"))
    np.testing.assert_array_equal(numpy_call(layer, x), expected)


def test_a_batch_without_valid_tokens_counts_in_no_metric(rng):
    """As that of a replica for which the last batch has no examples."""
    layer = make_moe(2, factor=2.0)
    numpy_call(layer, inputs(rng, 2, 8))
    expected = metric_values(layer)
    numpy_call(layer, inputs(rng, 2, 8), mask=np.zeros((2, 8), bool))
    numpy_call(layer, np.zeros((0, 8, H), "float32"))
    assert metric_values(layer) == expected
