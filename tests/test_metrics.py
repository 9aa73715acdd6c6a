import keras
import numpy as np
import pytest
from keras import ops
from versions import needs_keras

from keras_moe import (
    FeedForwardExperts,
    HierarchicalMoeLayer,
    LayerMetrics,
    MaskedRouter,
    MoeLayer,
    MoeLayerWithBackbone,
    RouterMask,
    Slots,
    Top2MaskedRouter,
)
from keras_moe.routing.statistics import routing_ratios, routing_sums


def test_sums_and_ratios_of_a_table():
    # Four valid tokens and a masked one; token 3 is dropped.
    slots = Slots(
        token_index=np.array([[[0, 1], [1, -1], [2, -1]]], "int32"),
        weight=np.array([[[0.5, 0.3], [0.2, 0], [0.4, 0]]], "float32"),
        probs=np.array([[[1, 0, 0]] * 4 + [[0, 0, 0]]], "float32"),
        load=np.array([[0.5, 0.25, 0.25]], "float32"),
    )
    slots = Slots(*(ops.convert_to_tensor(part) for part in slots[:4]))
    mask = RouterMask(slots.dispatch_mask, slots.combine_array)
    for routing, load in ((slots, [2, 1, 1]), (mask, [2, 1, 1])):
        sums = routing_sums(routing, ops.convert_to_tensor(4.0))
        assert ops.convert_to_numpy(sums.load).tolist() == load
        scalars = {k: float(v) for k, v in sums._asdict().items() if k != "load"}
        assert scalars == pytest.approx(
            {
                "valid": 4,
                "left_behind": 1,
                "weight": 1.4,
                "filled": 4,
                "max_load": 1.5,
                "groups": 1,
                "selected": 4,
            }
        )
        ratios = {name: float(x) for name, x in routing_ratios(sums).items()}
        assert ratios == pytest.approx(
            {
                "fraction_tokens_left_behind": 1 / 4,
                "router_confidence": 1.4 / 4,
                "max_load": 1.5,
            }
        )
        assert float(routing.expert_usage) == pytest.approx(4 / 6)


def test_sums_and_ratios_of_no_tokens_are_0():
    slots = Slots(
        *(
            ops.convert_to_tensor(part)
            for part in (
                np.full((1, 2, 3), -1, "int32"),
                np.zeros((1, 2, 3), "float32"),
                np.zeros((1, 4, 2), "float32"),
                np.zeros((1, 2), "float32"),
            )
        )
    )
    sums = routing_sums(slots, ops.convert_to_tensor(0.0))
    values = [*sums, *routing_ratios(sums).values()]
    assert all(np.all(ops.convert_to_numpy(value) == 0) for value in values)


@keras.saving.register_keras_serializable(package="tests")
class InputSum(LayerMetrics, keras.layers.Layer):
    """Reports the sum of its inputs, and twice the sum if `twice` is true."""

    def __init__(self, twice=False, **kwargs):
        super().__init__(**kwargs)
        self.twice = twice

    def call(self, inputs):
        total = ops.sum(inputs)
        self.add_metric(total, "total")
        if self.twice:
            self.add_metric(2 * total, "double")
        return inputs


def make_model(*layers, compiled=True, **arguments):
    inputs = keras.Input((2,))
    x = inputs
    for layer in layers:
        x = layer(x)
    model = keras.Model(inputs, keras.layers.Dense(2, name="dense")(x))
    if compiled:
        model.compile("sgd", "mse", **arguments)
    return model


# Batches of two rows with sums 6, 22 and 38.
X = np.arange(12, dtype="float32").reshape(6, 2) / 1.0
SUMS = [X[:2].sum(), X[2:4].sum(), X[4:].sum()]
ARGUMENTS = [{}, {"run_eagerly": True}, {"jit_compile": True}]
if keras.backend.backend() == "torch":
    ARGUMENTS.pop()


@pytest.mark.parametrize("arguments", ARGUMENTS)
def test_the_history_holds_the_mean_over_batches(arguments):
    model = make_model(InputSum(name="a"), InputSum(True, name="b"), **arguments)
    history = model.fit(
        X,
        X,
        batch_size=2,
        epochs=2,
        shuffle=False,
        validation_data=(X[:2], X[:2]),
        verbose=0,
    ).history
    mean = np.mean(SUMS)
    assert history["a/total"] == pytest.approx([mean, mean])
    assert history["b/double"] == pytest.approx([2 * mean, 2 * mean])
    assert history["val_b/total"] == pytest.approx([SUMS[0]] * 2)
    logs = model.evaluate(X[2:4], X[2:4], verbose=0, return_dict=True)
    assert logs["a/total"] == pytest.approx(SUMS[1])


@needs_keras((3, 15), "resets the metrics in each `train_on_batch`")
@pytest.mark.parametrize("arguments", ARGUMENTS)
def test_train_on_batch_returns_current_values(arguments):
    model = make_model(InputSum(name="a"), **arguments)
    for i in range(3):
        batch = X[2 * i : 2 * i + 2]
        logs = model.train_on_batch(batch, batch, return_dict=True)
        assert logs["a/total"] == pytest.approx(SUMS[i])
    logs = model.test_on_batch(X[:2], X[:2], return_dict=True)
    assert logs["a/total"] == pytest.approx(SUMS[0])


def test_the_logs_of_a_batch_hold_current_values():
    seen = []
    model = make_model(InputSum(name="a"))
    callback = keras.callbacks.LambdaCallback(
        on_train_batch_end=lambda batch, logs: seen.append(float(logs["a/total"]))
    )
    model.fit(X, X, batch_size=2, shuffle=False, verbose=0, callbacks=[callback])
    assert seen == pytest.approx([np.mean(SUMS[: i + 1]) for i in range(3)])


@pytest.mark.skipif(
    keras.backend.backend() == "torch",
    reason="Keras's PyTorch trainer does not support steps_per_execution",
)
def test_several_steps_per_execution():
    model = make_model(InputSum(name="a"), steps_per_execution=3)
    history = model.fit(X, X, batch_size=2, epochs=2, shuffle=False, verbose=0).history
    assert history["a/total"] == pytest.approx([np.mean(SUMS)] * 2)


def test_a_shared_layer_averages_over_its_calls():
    layer = InputSum(name="a")
    a, b = keras.Input((2,)), keras.Input((2,))
    model = keras.Model([a, b], layer(a) + layer(b))
    model.compile("sgd", "mse")
    logs = model.evaluate([X, 3 * X], X, batch_size=6, verbose=0, return_dict=True)
    assert logs["a/total"] == pytest.approx(2 * X.sum())


def test_layers_of_nested_models_have_separate_metrics():
    inner = make_model(InputSum(name="a"), compiled=False)
    inputs = keras.Input((2,))
    model = keras.Model(inputs, inner(InputSum(name="b")(inputs)))
    model.compile("sgd", "mse")
    logs = model.evaluate(X, X, batch_size=6, verbose=0, return_dict=True)
    assert logs["a/total"] == logs["b/total"] == pytest.approx(X.sum())


def test_a_subclassed_model():
    class Model(keras.Model):
        def __init__(self):
            super().__init__(name="model")
            self.summed = InputSum(name="a")
            self.dense = keras.layers.Dense(2)

        def call(self, inputs):
            return self.dense(self.summed(inputs))

    model = Model()
    model.compile("sgd", "mse")
    history = model.fit(X, X, batch_size=2, epochs=2, shuffle=False, verbose=0).history
    assert history["model/a/total"] == pytest.approx([np.mean(SUMS)] * 2)


def test_float64(float64):
    model = make_model(InputSum(name="a"))
    history = model.fit(X, X, batch_size=2, shuffle=False, verbose=0).history
    assert history["a/total"] == pytest.approx([np.mean(SUMS)])


@pytest.mark.parametrize("policy_name", ["mixed_bfloat16", "mixed_float16"])
def test_counts_are_exact_in_low_precision(policy, policy_name):
    policy(policy_name)
    model = make_model(InputSum(name="a"))
    x = np.ones((600, 2), "float32")
    model.compile("sgd", "mse")
    history = model.fit(x, x, batch_size=2, verbose=0).history
    assert history["a/total"] == pytest.approx([4.0])


def test_the_state_is_not_a_weight(tmp_path):
    layer = InputSum(name="a")
    model = make_model(layer)
    model.fit(X, X, verbose=0)
    assert layer.weights == [] and layer.count_params() == 0
    assert len(layer.variables) == 1
    assert len(model.weights) == 2
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    assert float(loaded.get_layer("a").variables[0][0, 1]) == 0
    model.save_weights(tmp_path / "model.weights.h5")
    plain = make_model(keras.layers.Activation("linear"))
    plain.load_weights(tmp_path / "model.weights.h5")


def test_the_state_tree_of_a_model():
    """Works with several layers whose routers have the same name."""
    inputs = x = keras.Input((8, 4))
    for name in ("a", "b"):
        x = x + MoeLayer(FeedForwardExperts(3, 5), MaskedRouter(3), name=name)(x)
    model = keras.Model(inputs, x)
    model.compile("sgd", "mse")
    tree = model.get_state_tree()
    assert "running_means" in tree["non_trainable_variables"]["a"]["router"]
    model.set_state_tree(tree)


def test_each_metric_is_listed_once():
    inputs = keras.Input((8, 4))
    moe = MoeLayer(FeedForwardExperts(3, 5), MaskedRouter(3), name="moe")
    layers = [MoeLayerWithBackbone(moe, 5), make_hierarchical()]
    x = inputs
    for layer in layers:
        x = layer(x)
    model = keras.Model(inputs, x)
    model.compile("sgd", "mse", metrics=["mae"])
    x = np.ones((2, 8, 4))
    assert len(model.evaluate(x, x, verbose=0)) == 2 + 3 * 7
    names = [metric.name for metric in model.metrics]
    assert len(set(names)) == len(names)


def make_hierarchical():
    return HierarchicalMoeLayer(
        FeedForwardExperts(4, 5),
        MaskedRouter(2, name="outer"),
        Top2MaskedRouter(2, name="inner"),
    )


def test_loaded_and_cloned_models_report_the_same(tmp_path):
    model = make_model(InputSum(name="a"), InputSum(name="b"))
    model.fit(X, X, verbose=0)
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    clone = keras.models.clone_model(model)
    clone.compile("sgd", "mse")
    for other in (loaded, clone):
        logs = other.evaluate(X, X, batch_size=6, verbose=0, return_dict=True)
        assert logs["a/total"] == logs["b/total"] == pytest.approx(X.sum())


def test_a_nan_does_not_affect_other_metrics():
    class WithNan(LayerMetrics, keras.layers.Layer):
        def call(self, inputs):
            self.add_metrics({"nan": ops.sum(inputs) * float("nan"), "one": 1.0})
            return inputs

    model = make_model(WithNan(name="a"))
    logs = model.evaluate(X, X, verbose=0, return_dict=True)
    assert np.isnan(logs["a/nan"]) and logs["a/one"] == 1
    model.reset_metrics()
    assert all(float(m.result()) == 0 for m in model.get_layer("a").metrics)


def test_one_metric_can_be_reset_alone():
    layer = InputSum(True, name="a")
    layer(X)
    layer.metrics[0].reset_state()
    assert [float(m.result()) for m in layer.metrics] == [0, 2 * X.sum()]


def test_stateless_call_does_not_change_the_layer():
    if keras.backend.backend() != "jax":
        pytest.skip("stateless_call is for JAX")
    layer = InputSum(name="a")
    layer.build((None, 2))
    _, variables = layer.stateless_call([], layer.non_trainable_variables, X)
    assert float(variables[0][0, 0]) == pytest.approx(X.sum())
    assert float(layer.variables[0][0, 0]) == 0


def test_too_many_metrics_are_an_error():
    class Many(LayerMetrics, keras.layers.Layer):
        def call(self, inputs):
            for i in range(33):
                self.add_metric(1.0, f"metric_{i}")
            return inputs

    with pytest.raises(ValueError, match=r"room for 32 metrics.*'metric_32'"):
        Many()(X)


def test_metrics_cannot_be_updated_directly():
    layer = InputSum(name="a")
    layer(X)
    with pytest.raises(NotImplementedError, match="`add_metric`"):
        layer.metrics[0].update_state(1.0)


@pytest.mark.parametrize("value", [1, "name", (1, 2), None])
def test_bad_export_metrics(value):
    with pytest.raises(TypeError, match="`export_metrics` must be"):
        InputSum(export_metrics=value)


def test_models_with_layer_metrics():
    class Functional(LayerMetrics, keras.Model):
        def __init__(self):
            inputs = keras.Input((2,))
            super().__init__(inputs, keras.layers.Dense(2)(inputs))

    class Subclass(LayerMetrics, keras.Model):
        def __init__(self):
            super().__init__(name="mine")
            self.dense = keras.layers.Dense(2)

        def call(self, inputs):
            self.add_metric(ops.sum(inputs), "total")
            return self.dense(inputs)

    assert Functional().metrics == []
    model = Subclass()
    model.compile("sgd", "mse")
    logs = model.evaluate(X, X, batch_size=6, return_dict=True, verbose=0)
    assert logs["mine/total"] == pytest.approx(X.sum())


def test_a_symbolic_call_does_not_change_the_values():
    layer = InputSum(name="a")
    layer(X)
    layer(keras.Input((2,)))
    assert float(layer.metrics[0].result()) == pytest.approx(X.sum())


def test_bad_metrics():
    layer = InputSum(name="a")
    with pytest.raises(ValueError, match=r"must be a scalar.*'vector'"):
        layer.add_metric(X, "vector")
    with pytest.raises(TypeError, match="name of a metric must be a string"):
        layer.add_metric(1.0, 3)
