import csv
import warnings

import keras
import numpy as np
import pytest
from keras import ops
from layer_check import Subclassed, functional

from keras_moe import (
    BiasBalancedMaskedRouter,
    FeedForwardExperts,
    HierarchicalMoeLayer,
    MaskedRouter,
    MoeLayer,
    Top2MaskedRouter,
)
from keras_moe.callbacks import RoutingMonitor

E, F, H, T = 4, 8, 6, 12

# RoutingMonitor warns that these models drop tokens.
pytestmark = pytest.mark.filterwarnings("ignore:.* drops ")


def make_moe(name="moe", factor=1.0, k=1, **kwargs):
    router = MaskedRouter(
        E, num_selected_experts=k, kernel_initializer="he_normal", **kwargs
    )
    return MoeLayer(
        FeedForwardExperts(E, F),
        router,
        train_capacity_factor=factor,
        eval_capacity_factor=factor,
        name=name,
    )


@pytest.fixture
def x(rng):
    return rng.normal(size=(8, T, H)).astype("float32")


def compile_frozen(model):
    """Compiles a model with a learning rate of 0: each step has the same routing."""
    model.compile(keras.optimizers.SGD(0.0), "mse")
    return model


def expected_load(layer, x, training):
    routing = layer.route(x, training=training)
    return ops.convert_to_numpy(routing.load).mean(axis=0)


def nested():
    inner = functional(make_moe("inner"), (T, H))
    inputs = keras.Input((T, H))
    return keras.Model(inputs, inner(inputs))


MODELS = {
    "functional": lambda: functional(make_moe(), (T, H)),
    "nested": nested,
    "subclassed": lambda: Subclassed(make_moe()),
    "dropless": lambda: functional(make_moe(factor=None, k=2), (T, H)),
}


@pytest.mark.parametrize(
    "kind",
    [
        "nested",
        "dropless",
        pytest.param("functional", marks=pytest.mark.thorough),
        pytest.param("subclassed", marks=pytest.mark.thorough),
    ],
)
def test_records_match_the_routing(kind, x):
    model = compile_frozen(MODELS[kind]())
    monitor = RoutingMonitor()
    model.fit(
        x[:6],
        x[:6],
        batch_size=4,  # The second batch is partial.
        epochs=2,
        validation_data=(x[6:], x[6:]),
        callbacks=[monitor],
        shuffle=False,
        verbose=0,
    )
    phases = [(r["epoch"], r["phase"]) for r in monitor.history]
    assert phases == [(n, p) for n in (0, 1) for p in ("train", "validation")]
    layer = model.layers[-1]
    layer = layer.layers[-1] if kind == "nested" else layer
    for record, data in zip(monitor.history, (x[:6], x[6:]) * 2, strict=True):
        load = expected_load(layer, data, training=record["phase"] == "train")
        np.testing.assert_allclose(record["load"], load, atol=1e-6)
        group_loads = layer.route(data, training=record["phase"] == "train").load
        largest = ops.convert_to_numpy(group_loads).max(axis=-1).mean()
        assert record["max_load"] == pytest.approx(E * largest, rel=1e-5)
        assert record["min_load"] == pytest.approx(E * load.min(), rel=1e-5)
        entropy = -np.sum(load[load > 0] * np.log(load[load > 0])) / np.log(E)
        assert record["load_entropy"] == pytest.approx(entropy, rel=1e-5)
        routing = layer.route(data)
        is_routed = ops.convert_to_numpy(routing.slots_per_token) > 0
        assert record["left_behind"] == pytest.approx(1 - is_routed.mean(), abs=1e-6)
        _, logits = layer.router.router_weights(data, return_logits=True)
        logits = ops.convert_to_numpy(logits).astype("float64")
        z_loss = np.mean(np.log(np.exp(logits).sum(axis=-1)) ** 2)
        assert record["z_loss"] == pytest.approx(z_loss, rel=1e-4)
        assert record["layer"] == layer.path


def test_other_callbacks_receive_the_logs(x, tmp_path):
    model = functional(make_moe(export_metrics=()), (T, H))
    model.compile("sgd", "mse")
    logger = keras.callbacks.CSVLogger(tmp_path / "log.csv")
    stop = keras.callbacks.EarlyStopping(
        "val_moe/max_load", mode="min", patience=0, baseline=0.5
    )
    history = model.fit(
        x,
        x,
        epochs=3,
        validation_data=(x, x),
        callbacks=[RoutingMonitor(), logger, stop],
        verbose=0,
    ).history
    # Training stops as early as possible, since no load is below 0.5.
    assert len(history["moe/max_load"]) == 2
    assert {"moe/left_behind", "val_moe/load_entropy", "moe/dead_experts"} <= set(
        history
    )
    with open(tmp_path / "log.csv") as file:
        row, _ = csv.DictReader(file)
    assert float(row["moe/max_load"]) == pytest.approx(history["moe/max_load"][0])


def test_records_every_few_batches(x):
    model = compile_frozen(MODELS["functional"]())
    monitor = RoutingMonitor(every=2)
    model.fit(
        x, x, batch_size=1, epochs=2, callbacks=[monitor], shuffle=False, verbose=0
    )
    batches = [(r["epoch"], r["batch"]) for r in monitor.history]
    assert batches == [(n, b) for n in (0, 1) for b in (1, 3, 5, 7, None)]
    steps = [r["step"] for r in monitor.history]
    assert steps == [2, 4, 6, 8, 8, 10, 12, 14, 16, 16]
    layer = model.layers[-1]
    for record, first in zip(monitor.history[:4], range(0, 8, 2), strict=True):
        load = expected_load(layer, x[first : first + 2], training=True)
        np.testing.assert_allclose(record["load"], load, atol=1e-5)


def test_evaluate_without_fit(x):
    model = compile_frozen(MODELS["functional"]())
    monitor = RoutingMonitor()
    model.predict(x, verbose=0)  # Adds no records.
    model.evaluate(x, x, callbacks=[monitor], verbose=0)
    (record,) = monitor.history
    assert (record["phase"], record["epoch"]) == ("test", None)
    load = expected_load(model.layers[-1], x, training=False)
    np.testing.assert_allclose(record["load"], load, atol=1e-6)


def test_collapse_gives_a_warning(x):
    moe = make_moe("mixture")
    model = functional(moe, (T, H))
    moe.router.router_weights.bias.assign([0.0, 0.0, 50.0, 0.0])
    monitor = RoutingMonitor()
    compile_frozen(model)
    with pytest.warns(UserWarning, match=r"mixture has collapsed.*\[2\] have 100%"):
        model.fit(x, x, callbacks=[monitor], verbose=0)
    (record,) = monitor.history
    assert record["dead_experts"] == 3
    assert record["overloaded_experts"] == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # The warning is given once.
        model.fit(x, x, callbacks=[monitor], verbose=0)


@pytest.mark.parametrize("k", [1, 2])
def test_balanced_routing_gives_no_warning(k, x):
    model = compile_frozen(functional(make_moe(k=k, factor=2.0), (T, H)))
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        model.fit(x, x, callbacks=[RoutingMonitor()], verbose=0)


def test_hierarchical_layers(x):
    outer, inner = (Top2MaskedRouter(2, name=name) for name in ("outer", "inner"))
    layer = HierarchicalMoeLayer(FeedForwardExperts(E, F), outer, inner, name="deep")
    monitor = RoutingMonitor()
    compile_frozen(functional(layer, (T, H))).fit(x, x, callbacks=[monitor], verbose=0)
    assert [r["layer"] for r in monitor.history] == ["deep/outer", "deep/inner"]
    for record in monitor.history:
        assert record["load"].sum() == pytest.approx(1.0)


def test_to_csv(x, tmp_path):
    model = compile_frozen(MODELS["functional"]())
    monitor = RoutingMonitor()
    model.fit(x, x, epochs=2, callbacks=[monitor], verbose=0)
    monitor.to_csv(tmp_path / "routing.csv")
    with open(tmp_path / "routing.csv") as file:
        rows = list(csv.DictReader(file))
    assert [row["epoch"] for row in rows] == ["0", "1"]
    found = [float(rows[1][f"load_{i}"]) for i in range(E)]
    np.testing.assert_allclose(found, monitor.history[1]["load"], rtol=1e-6)


def test_biases_and_histograms(x, tmp_path):
    """Of two layers, of which one has a bias."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    router = BiasBalancedMaskedRouter(E, num_selected_experts=2, bias_update_rate=0.01)
    biased = MoeLayer(
        FeedForwardExperts(E, F),
        router,
        train_capacity_factor=None,
        eval_capacity_factor=None,
        name="biased",
    )
    inputs = keras.Input((T, H))
    model = keras.Model(inputs, make_moe("plain")(biased(inputs)))
    model.compile("sgd", "mse")
    monitor = RoutingMonitor(log_dir=tmp_path / "board")
    logs = model.fit(
        x, x, epochs=2, validation_data=(x, x), callbacks=[monitor], verbose=0
    ).history
    assert logs["biased/experts_per_token"] == pytest.approx([2, 2])
    assert logs["plain/experts_per_token"] == pytest.approx([1, 1])
    record, plain = monitor.history[-2:]
    assert "bias" not in plain
    np.testing.assert_array_equal(record["bias"], np.copy(router.expert_bias))
    monitor.to_csv(tmp_path / "routing.csv")
    with open(tmp_path / "routing.csv") as file:
        rows = list(csv.DictReader(file))
    assert rows[-1]["bias_0"] == ""
    assert float(rows[-2]["bias_3"]) == pytest.approx(float(record["bias"][3]))
    board = EventAccumulator(str(tmp_path / "board")).Reload()
    names = {
        "biased/train/expert_bias",
        "biased/train/expert_load",
        "plain/train/expert_load",
    }
    names |= {name.replace("train", "validation") for name in names}
    assert set(board.Tags()["tensors"]) == names
    steps = [event.step for event in board.Tensors("plain/train/expert_load")]
    assert steps == [1, 2]


def test_models_without_routers_to_monitor(x):
    for model in (
        functional(make_moe(export_metrics=False), (T, H)),
        functional(keras.layers.Dense(H), (T, H)),
    ):
        with pytest.raises(ValueError, match="no router to monitor"):
            compile_frozen(model).fit(x, x, callbacks=[RoutingMonitor()], verbose=0)


def test_dropped_tokens_give_a_warning(x):
    moe = make_moe("mixture", factor=1.0)
    model = compile_frozen(functional(moe, (T, H)))
    moe.router.router_weights.bias.assign([0.0, 0.0, 3.0, 0.0])
    monitor = RoutingMonitor(collapsed_below=0.0)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        model.fit(
            x, x, validation_data=(x, x), callbacks=[monitor], epochs=2, verbose=0
        )
    messages = [str(w.message) for w in caught if "drops" in str(w.message)]
    assert len(messages) == 2  # Once for training and once for validation.
    left_behind = monitor.history[0]["left_behind"]
    assert f"mixture drops {left_behind:.0%} of the tokens (train)" in messages[0]
    assert "`train_capacity_factor`" in messages[0]
    assert "`examples_per_group=None`" in messages[0]
    assert "(validation)" in messages[1] and "`eval_capacity_factor`" in messages[1]


def test_max_load_is_the_mean_over_groups(x):
    """Each group selects one expert: the batch is balanced, but the groups are not."""
    moe = make_moe(factor=None, k=1)
    model = compile_frozen(functional(moe, (T, H)))
    kernel = np.zeros((H, E), "float32")
    kernel[:E] = 9 * np.eye(E)
    moe.router.router_weights.kernel.assign(kernel)
    x = np.zeros((E, T, H), "float32")
    x[np.arange(E), :, np.arange(E)] = 1
    monitor = RoutingMonitor()
    model.fit(x, x, callbacks=[monitor], verbose=0)
    (record,) = monitor.history
    assert record["max_load"] == pytest.approx(E)
    assert record["min_load"] == pytest.approx(1)


def test_plotting_a_phase_without_records_is_an_error(x):
    monitor = RoutingMonitor()
    compile_frozen(MODELS["functional"]()).fit(x, x, callbacks=[monitor], verbose=0)
    assert monitor.plot().axes
    with pytest.raises(ValueError, match=r"phase 'test'.*`evaluate`.*\['train'\]"):
        monitor.plot("test")
    with pytest.raises(ValueError, match="`phase` must be one of"):
        monitor.plot("training")
