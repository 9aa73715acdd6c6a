"""Balance of the load, and routings that are random, in turn, or given."""

import itertools

import keras
import numpy as np
import oracle
import pytest
from keras import ops
from samples import E, F, H, inputs, numpy_call, prefer_first

from keras_moe import (
    BiasBalancedMaskedRouter,
    ExpertsChooseMaskedRouter,
    FeedForwardExperts,
    Gate,
    HierarchicalMoeLayer,
    MaskedRouter,
    MoeLayer,
    MoeLayerWithBackbone,
    RoundRobinRouter,
    SoftMoeLayer,
    Top2MaskedRouter,
    TopPMaskedRouter,
    route,
    select_experts,
)
from keras_moe.callbacks import BiasUpdateRateScheduler, RoutingMonitor
from keras_moe.inspection import layer_cost
from keras_moe.losses import importance_loss, load_loss
from keras_moe.routing import Selection, assign_slots


def make_layer(router, factor=2.0, **kwargs):
    experts = FeedForwardExperts(router.num_experts, F, kernel_initializer="he_normal")
    return MoeLayer(
        experts,
        router,
        train_capacity_factor=factor,
        eval_capacity_factor=factor,
        **kwargs,
    )


def compiled(layer, shape, **kwargs):
    model_inputs = keras.Input(shape)
    model = keras.Model(model_inputs, layer(model_inputs))
    model.compile(keras.optimizers.SGD(0.1), "mse", **kwargs)
    return model


# The scope of the balance loss


@pytest.mark.parametrize("router", [MaskedRouter, Top2MaskedRouter, TopPMaskedRouter])
def test_the_balance_loss_over_all_groups(router, rng):
    """Groups that are unbalanced, each to another expert, are balanced together."""
    x = inputs(rng, 3, 8)
    mask = np.arange(8) < np.array([[8], [5], [0]])
    values = {}
    for scope in ("group", "batch"):
        layer = make_layer(
            router(
                E,
                balance_scope=scope,
                load_balancing_loss_weight=0.5,
                kernel_initializer=keras.initializers.HeNormal(seed=3),
            )
        )
        layer(x, mask=mask)
        routing = layer.route(x, mask=mask)
        probs, load = (ops.convert_to_numpy(a) for a in (routing.probs, routing.load))
        valid = mask.sum(axis=1)
        if scope == "batch":
            probs, valid = probs.reshape(1, 24, E), valid.sum(keepdims=True)
            load = (load * mask.sum(axis=1)[:, None]).sum(0, keepdims=True) / valid
        expected = sum(
            E * np.sum(f * p.sum(axis=0)) for f, p in zip(load, probs, strict=True)
        )
        values[scope] = expected / valid.sum()
        (loss,) = layer.losses
        assert float(loss) == pytest.approx(0.5 * values[scope], rel=1e-5)
        assert float(layer.balance_loss(routing)) == pytest.approx(
            values[scope], rel=1e-5
        )
    assert abs(values["group"] - values["batch"]) > 1e-3


def test_inner_routers_have_groups():
    with pytest.raises(ValueError, match="balance_scope"):
        HierarchicalMoeLayer(
            FeedForwardExperts(4, F),
            MaskedRouter(2, name="outer"),
            Top2MaskedRouter(2, name="inner", balance_scope="batch"),
        )
    with pytest.raises(ValueError, match="balance_scope"):
        MaskedRouter(E, balance_scope="sequence")


# The metric of the load


def test_the_metric_of_the_largest_load(rng):
    """It shows a collapse that the balance loss of a uniform gate does not show."""
    router = MaskedRouter(E, bias_initializer=prefer_first, kernel_initializer="zeros")
    layer = make_layer(router, factor=None)
    model = compiled(layer, (8, H))
    layer.router.router_weights.bias.assign([1e-3, 0, 0, 0])
    logs = model.evaluate(inputs(rng, 4, 8), np.zeros((4, 8, H)), return_dict=True)
    name = next(name for name in logs if name.endswith("max_load"))
    assert logs[name] == E
    assert logs[name.replace("max_load", "load_balancing_loss")] < 1.01


def test_the_largest_load_is_a_mean_over_groups(rng):
    x = inputs(rng, 5, 8)
    mask = np.arange(8) < np.array([[8], [8], [3], [1], [0]])
    layer = make_layer(MaskedRouter(E, num_selected_experts=2, name="r"), name="moe")
    layer(x, mask=mask)
    load = ops.convert_to_numpy(layer.route(x, mask=mask).load)[:4]
    (found,) = (
        float(metric.result())
        for metric in layer.router.metrics
        if metric.name == "moe/r/max_load"
    )
    assert found == pytest.approx(np.mean(E * load.max(axis=1)), rel=1e-5)


# The rate of the bias


def test_the_rate_of_the_bias_can_be_set_while_training(rng):
    """Also in a step that is compiled already."""
    x = inputs(rng, 6, 8)
    router = BiasBalancedMaskedRouter(E, bias_update_rate=0.25)
    model = compiled(make_layer(router), (8, H))
    biases = []
    for rate in (0.25, 0.0, 0.5):
        router.bias_update_rate = rate
        before = np.copy(router.expert_bias)
        model.train_on_batch(x, x)
        biases.append(np.abs(np.copy(router.expert_bias) - before).max())
    assert biases[0] > 0.1 and biases[1] == 0 and biases[2] > biases[0]
    assert router.get_config()["bias_update_rate"] == 0.5
    assert all("rate" not in weight.path for weight in model.weights)
    with pytest.raises(ValueError, match="bias_update_rate"):
        router.bias_update_rate = -1.0


def test_a_constant_bias_keeps_its_mean(rng):
    router = BiasBalancedMaskedRouter(E, bias_update_rate=0.0)
    model = compiled(make_layer(router), (8, H))
    router.expert_bias.assign(np.array([3.0, 1.0, 2.0, 4.0]))
    x = inputs(rng, 4, 8)
    model.train_on_batch(x, x)
    np.testing.assert_array_equal(np.copy(router.expert_bias), [3, 1, 2, 4])


def test_the_scheduler_of_the_rate(rng):
    x = inputs(rng, 6, 8)
    router = BiasBalancedMaskedRouter(E, bias_update_rate=1.0)
    model = compiled(make_layer(router), (8, H))
    seen = []

    class Record(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            assert self.model is model
            seen.append(np.copy(router.expert_bias))

    def schedule(step):
        return 0.25 if step < 2 else 0.0

    callbacks = [BiasUpdateRateScheduler(schedule), Record()]
    model.fit(x, x, batch_size=2, epochs=2, callbacks=callbacks, verbose=0)
    changes = [np.abs(b - a).max() for a, b in itertools.pairwise(seen)]
    assert 0 < np.abs(seen[0]).max() <= 0.5
    assert changes[0] > 0
    assert changes[1:] == [0] * 4
    # Training that is continued goes on in the schedule.
    model.fit(x, x, batch_size=2, callbacks=callbacks, verbose=0)
    np.testing.assert_array_equal(seen[-1], seen[1])
    decay = keras.optimizers.schedules.ExponentialDecay(0.5, 1, 0.5)
    model.optimizer.iterations.assign(1)
    model.fit(x, x, callbacks=[BiasUpdateRateScheduler(decay)], verbose=0)
    assert router.bias_update_rate == 0.25


def test_the_scheduler_counts_updates_of_the_weights(rng):
    x, seen = inputs(rng, 8, 8), []

    def schedule(step):
        seen.append(step)
        return 0.1 * step

    model = compiled(make_layer(BiasBalancedMaskedRouter(E)), (8, H))
    scheduler = BiasUpdateRateScheduler(schedule)
    fit = {"batch_size": 1, "epochs": 2, "callbacks": [scheduler], "verbose": 0}
    optimizer = keras.optimizers.SGD(gradient_accumulation_steps=2)
    model.compile(optimizer, "mse")
    model.fit(x, x, **fit)
    assert seen == [i // 2 for i in range(16)]
    assert int(optimizer.iterations) == 8
    if keras.backend.backend() == "torch":
        return  # It has one step per execution.
    seen.clear()
    model.compile("sgd", "mse", steps_per_execution=3)
    model.fit(x, x, **fit)
    assert seen == [0, 3, 6, 8, 11, 14]


def test_the_scheduler_goes_on_after_a_restored_backup(rng, tmp_path):
    x, seen = inputs(rng, 4, 8), []

    class Interrupt(keras.callbacks.Callback):
        def on_epoch_end(self, epoch, logs=None):
            raise KeyboardInterrupt

    def schedule(step):
        seen.append(step)
        return 0.1

    model = compiled(make_layer(BiasBalancedMaskedRouter(E)), (8, H))
    # The first one, whose turn comes before the restored backup.
    callbacks = [
        BiasUpdateRateScheduler(schedule),
        keras.callbacks.BackupAndRestore(tmp_path / "backup"),
    ]
    fit = {"batch_size": 2, "epochs": 2, "verbose": 0}
    with pytest.raises(KeyboardInterrupt):
        model.fit(x, x, callbacks=[*callbacks, Interrupt()], **fit)
    model = compiled(make_layer(BiasBalancedMaskedRouter(E)), (8, H))
    model.fit(x, x, callbacks=callbacks, **fit)
    assert seen == [0, 1, 2, 3]


def test_the_scheduler_needs_a_bias(rng):
    x = inputs(rng, 2, 8)
    model = compiled(make_layer(MaskedRouter(E)), (8, H))
    with pytest.raises(ValueError, match="BiasBalancedMaskedRouter"):
        model.fit(x, x, callbacks=[BiasUpdateRateScheduler(float)], verbose=0)
    with pytest.raises(TypeError, match="schedule"):
        BiasUpdateRateScheduler(0.1)


# The losses of noisy gating


@pytest.mark.parametrize("noise_std", [0.5, "learned"])
def test_the_losses_of_noisy_gating(noise_std, rng):
    x = inputs(rng, 3, 8)
    mask = rng.random((3, 8)) < 0.8
    router = MaskedRouter(
        E,
        num_selected_experts=2,
        noise_std=noise_std,
        importance_loss_weight=0.5,
        load_loss_weight=0.25,
        load_balancing_loss_weight=0.0,
        kernel_initializer="he_normal",
    )
    layer = make_layer(router)
    layer(x)
    gate = router.router_weights
    seed = np.copy(gate.seed_generator.state)
    probs, *noise = gate(np.where(mask[..., None], x, 0), training=True, return_noise=1)
    probs = ops.where(mask[..., None], probs, 0.0)
    gate.seed_generator.state.assign(seed)
    layer(x, mask=mask, training=True)
    expected = 0.5 * importance_loss(probs), 0.25 * load_loss(*noise, 2, mask=mask)
    assert [float(loss) for loss in layer.losses] == pytest.approx(
        [float(loss) for loss in expected], rel=1e-5
    )
    # There is no noise in evaluation.
    probs, logits, noisy, std = gate(x, return_noise=True)
    np.testing.assert_array_equal(*map(ops.convert_to_numpy, (logits, noisy)))
    assert std == 0
    layer(x)
    (found,) = layer.losses
    assert float(found) == pytest.approx(float(0.5 * importance_loss(probs)), rel=1e-5)


def test_the_load_loss_spreads_the_load(rng):
    """It alone takes tokens from the expert that all prefer."""
    x = inputs(rng, 8, 16)
    router = MaskedRouter(
        E,
        noise_std="learned",
        load_loss_weight=1.0,
        load_balancing_loss_weight=0.0,
        bias_initializer=lambda shape, dtype: 0.02 * prefer_first(shape, dtype),
    )
    layer = make_layer(router, factor=None, name="moe")
    history = compiled(layer, (16, H)).fit(x, x, epochs=20, verbose=0).history
    assert history["moe/max_load"][0] > 1.3 * history["moe/max_load"][-1]


def test_what_the_load_loss_needs():
    with pytest.raises(ValueError, match="noise_std"):
        MaskedRouter(E, load_loss_weight=0.1)
    with pytest.raises(ValueError, match="num_selected_experts"):
        MaskedRouter(E, load_loss_weight=0.1, noise_std=1.0, num_selected_experts=E)


# Random priority


def test_random_priority_drops_random_tokens():
    """All 12 tokens select one expert, which has room for 4."""
    index = ops.zeros((1, 12, 1), dtype="int32")
    probs = ops.tile(ops.convert_to_tensor([[[0.75, 0.25]]]), (1, 12, 1))
    selection = Selection(index, probs[..., :1])
    counts = np.zeros(12)
    seed = keras.random.SeedGenerator(1)
    for _ in range(60):
        slots = assign_slots(selection, probs, 4, "random", seed=seed)
        tokens = ops.convert_to_numpy(slots.token_index)[0, 0]
        assert len(set(tokens)) == 4
        counts[tokens] += 1
        np.testing.assert_array_equal(ops.convert_to_numpy(slots.weight)[0, 0], 0.75)
    # Each is kept with a probability of 1/3: 20 ± 3.7 times.
    assert counts.min() > 5 and counts.max() < 36
    first, second = (
        ops.convert_to_numpy(assign_slots(selection, probs, 4, "random", seed=5)[0])
        for _ in range(2)
    )
    np.testing.assert_array_equal(first, second)


def test_random_priority_is_for_training_only(rng):
    x = inputs(rng, 2, 16)
    kernel = keras.initializers.HeNormal(seed=2)
    layers = [
        make_layer(MaskedRouter(E, priority=priority, kernel_initializer=kernel), 0.5)
        for priority in ("random", "choice")
    ]
    routings = [layer.route(x) for layer in layers]
    np.testing.assert_array_equal(routings[0].token_index, routings[1].token_index)
    a, b = (layers[0].route(x, training=True).token_index for _ in range(2))
    assert (ops.convert_to_numpy(a) != ops.convert_to_numpy(b)).any()


# Learned noise


def test_learned_noise(rng):
    gate = Gate(E, noise_std="learned", kernel_initializer="he_normal")
    x = inputs(rng, 2000)
    clean = ops.convert_to_numpy(gate(x, return_logits=True)[1])
    gate.noise_kernel.assign(rng.normal(size=(H, E)))
    scale = np.log1p(np.exp(x @ np.copy(gate.noise_kernel)))
    noisy = np.log(ops.convert_to_numpy(gate(x, training=True)))
    # Relative to the first expert, since a softmax ignores a common shift.
    difference = (noisy - noisy[:, :1]) - (clean - clean[:, :1])
    expected = np.sqrt(scale[:, 1:] ** 2 + scale[:, :1] ** 2)
    ratio = (difference[:, 1:] / expected).std(axis=0)
    np.testing.assert_allclose(ratio, 1, atol=0.08)
    np.testing.assert_array_equal(numpy_call(gate, x), numpy_call(gate, x))
    assert Gate.from_config(gate.get_config()).noise_std == "learned"
    with pytest.raises(TypeError, match="noise_std"):
        Gate(E, noise_std="loud")


# A total probability to reach


def test_top_p_by_loops(rng):
    x = inputs(rng, 2, 9)
    mask = rng.random((2, 9)) < 0.8
    for options in ({}, {"max_selected_experts": 2}, {"normalize_weights": True}):
        router = TopPMaskedRouter(
            E, threshold=0.6, kernel_initializer="he_normal", **options
        )
        layer = make_layer(router, factor=None)
        outputs, routing = layer(x, mask=mask, return_routing=True)
        probs, index = (
            ops.convert_to_numpy(a) for a in (routing.probs, routing.expert_index)
        )
        most = options.get("max_selected_experts", E)
        numbers = []
        for group in range(2):
            for token in range(9):
                chosen, total = [], 0.0
                for expert in oracle.top_k(probs[group, token], most):
                    if mask[group, token] and total < 0.6:
                        chosen.append(expert)
                        total += probs[group, token, expert]
                found = [i for i in index[group, token] if i >= 0]
                assert found == chosen
                numbers.append(len(chosen))
        weight = ops.convert_to_numpy(routing.weight)
        if "normalize_weights" in options:
            assert weight.sum() == pytest.approx(mask.sum(), rel=1e-5)
        (metric,) = (m for m in router.metrics if "experts_per_token" in m.name)
        assert float(metric.result()) == pytest.approx(sum(numbers) / mask.sum())
        assert 1 < sum(numbers) / mask.sum() < most
        assert np.isfinite(ops.convert_to_numpy(outputs)).all()


@pytest.mark.parametrize("threshold", [0, 1, 1.5, "half"])
def test_thresholds_of_top_p(threshold):
    with pytest.raises((ValueError, TypeError), match="threshold"):
        TopPMaskedRouter(E, threshold=threshold)


def test_the_entropy_loss_lowers_the_number_of_experts(rng):
    x = inputs(rng, 8, 16)
    router = TopPMaskedRouter(
        E, threshold=0.7, entropy_loss_weight=10.0, kernel_initializer="he_normal"
    )
    model = compiled(make_layer(router, factor=None, name="moe"), (16, H))
    history = model.fit(x, x, epochs=8, verbose=0).history["moe/experts_per_token"]
    assert history[-1] < 0.9 * history[0]


@pytest.mark.filterwarnings("error:A capacity factor")
def test_top_p_without_a_maximum(rng):
    """The number of experts is not fixed, and is not written to files."""
    x = inputs(rng, 4, 16)
    router = TopPMaskedRouter(E)
    layer = make_layer(router, factor=1.0, name="moe")
    model = compiled(layer, (16, H))
    assert router.get_config()["max_selected_experts"] is None
    assert layer_cost(layer, 16)["train_drops"] is None
    pruned = select_experts(layer, [0, 2])
    assert pruned.router.experts_per_token == 2
    np.testing.assert_array_equal(
        pruned.router.router_weights.kernel,
        np.copy(router.router_weights.kernel)[:, [0, 2]],
    )
    router.router_weights.bias.assign([0.0, 0.0, 50.0, 0.0])
    with pytest.warns(UserWarning, match=r"moe has collapsed.*\[2\] have 100%"):
        model.evaluate(x, x, callbacks=[RoutingMonitor(dropped_above=1.0)], verbose=0)


def test_a_nonfinite_token_of_top_p_has_a_nonfinite_output(rng):
    x = inputs(rng, 2, 8)
    x[1, 3] = np.nan
    outputs = numpy_call(make_layer(TopPMaskedRouter(E), factor=None), x)
    assert np.isnan(outputs[1, 3]).all()


# In turn


@pytest.mark.parametrize("factor", [1.0, None])
def test_round_robin_is_balanced(factor, rng):
    """Nothing is dropped with slots for the mean load."""
    x = inputs(rng, 2, 8) + 10  # Similar tokens.
    layer = make_layer(
        RoundRobinRouter(E, num_selected_experts=2),
        factor and 2 * factor,
    )
    routing = layer.route(x)
    np.testing.assert_allclose(routing.load, 0.25)
    index = ops.convert_to_numpy(routing.expert_index)
    np.testing.assert_array_equal(index[0, :3], [[0, 1], [2, 3], [0, 1]])
    assert (ops.convert_to_numpy(routing.slots_per_token) == 2).all()
    probs = ops.convert_to_numpy(routing.probs)
    expected = np.take_along_axis(probs, index, axis=-1).sum()
    assert ops.convert_to_numpy(routing.weight).sum() == pytest.approx(expected)
    # Groups of one token take turns, too.
    routing = layer.route(inputs(rng, 4, 1))
    np.testing.assert_array_equal(
        ops.convert_to_numpy(routing.expert_index)[:, 0], [[0, 1], [2, 3]] * 2
    )


# Given experts

REPLAYED = {
    "plain": lambda: MaskedRouter(E, num_selected_experts=2),
    "next best": lambda: MaskedRouter(
        E, num_selected_experts=2, priority="token", overflow="next_best"
    ),
    "scaled": lambda: MaskedRouter(
        E,
        num_selected_experts=2,
        normalize_weights=True,
        use_expert_scale=True,
        mechanism="sigmoid",
    ),
    "bias": lambda: BiasBalancedMaskedRouter(E, num_selected_experts=2),
    "top p": lambda: TopPMaskedRouter(E, threshold=0.6, normalize_weights=True),
}


@pytest.mark.parametrize("factor", [1.0, None])
@pytest.mark.parametrize("name", REPLAYED)
@pytest.mark.filterwarnings("ignore:A capacity factor of")
def test_a_replayed_routing_is_the_same(name, factor, rng):
    x = inputs(rng, 3, 10)
    mask = rng.random((3, 10)) < 0.8
    for examples in (1.0, 2.0, None):  # With 2, a group is padded.
        layer = make_layer(REPLAYED[name](), factor, examples_per_group=examples)
        expected, routing = layer(x, mask=mask, return_routing=True)
        index = routing.expert_index
        again, found = layer(x, mask=mask, return_routing=True, expert_index=index)
        np.testing.assert_array_equal(found.expert_index, index)
        again, expected = map(ops.convert_to_numpy, (again, expected))
        np.testing.assert_allclose(again, expected, atol=1e-6)


def test_given_experts_in_the_shape_of_the_inputs(rng):
    """Weights are those of the gate, and -1 is no expert."""
    x = inputs(rng, 3, 10)
    index = rng.integers(0, E, size=(3, 10, 1))
    index = np.concatenate([index, (index + 1) % E], axis=-1).astype("int32")
    index[0, :2, 1] = -1
    index[1, 0] = -1
    for examples in (1.0, 0.5, 2.0, None):
        router = MaskedRouter(E, num_selected_experts=1, kernel_initializer="he_normal")
        layer = make_layer(router, None, examples_per_group=examples)
        outputs = numpy_call(layer, x, expert_index=index)
        probs = numpy_call(router.router_weights, x)
        w1, b1, w2, b2 = layer.experts.get_weights()
        for example in range(3):
            for token in range(10):
                total = np.zeros(H)
                for expert in index[example, token]:
                    if expert >= 0:
                        y = oracle.feed_forward(
                            x[example, token], (w1, b1, w2, b2), expert
                        )
                        total += probs[example, token, expert] * y
                np.testing.assert_allclose(outputs[example, token], total, atol=1e-5)


@pytest.mark.parametrize("examples", [1.0, 0.5, 2.0, None])
@pytest.mark.parametrize("length", [10, None])
def test_given_experts_in_a_model(length, examples, rng):
    """As an input of a functional model, whose gate is trained."""
    x = inputs(rng, 4, 10)
    index = rng.integers(0, E, size=(4, 10, 2)).astype("int32")
    tokens, experts = keras.Input((length, H)), keras.Input((length, 2), dtype="int32")
    router = MaskedRouter(E, num_selected_experts=2)
    moe = make_layer(router, None, examples_per_group=examples)
    both = MoeLayerWithBackbone(moe, F)
    model = keras.Model([tokens, experts], both(tokens, expert_index=experts))
    model.compile(keras.optimizers.SGD(1.0), "mse")
    before = np.copy(moe.router.router_weights.kernel)
    found = route(model, [x, index])[both.moe.path].expert_index
    np.testing.assert_array_equal(np.reshape(found, index.shape), index)
    model.fit([x, index], x, batch_size=3, verbose=0)
    assert (np.copy(moe.router.router_weights.kernel) != before).any()
    load = moe.router.log.read()["load"]
    counts = np.bincount(index.ravel(), minlength=E)
    np.testing.assert_allclose(load / load.sum(), counts / counts.sum(), rtol=1e-5)


def test_a_routing_replayed_in_a_model(rng):
    """Both layers have one group of all tokens, whose number is unknown."""
    tokens = keras.Input((10, H))
    first, second = (
        make_layer(MaskedRouter(E), None, examples_per_group=None) for _ in range(2)
    )
    x, routing = first(tokens, return_routing=True)
    model = keras.Model(tokens, second(x, expert_index=routing.expert_index))
    model.compile("sgd", "mse")
    x = inputs(rng, 4, 10)
    model.fit(x, x, batch_size=3, verbose=0)
    loads = [layer.router.log.read()["load"] for layer in (first, second)]
    np.testing.assert_allclose(*loads, rtol=1e-5)


def test_a_custom_routing_without_its_selection(rng):
    class FirstExpert(MaskedRouter):
        def compute_routing(self, probs, expert_capacity, training=None):
            routing = super().compute_routing(probs, expert_capacity, training)
            return routing._replace(expert_index=None)

    tokens = keras.Input((8, H))
    outputs, routing = make_layer(FirstExpert(E))(tokens, return_routing=True)
    model = keras.Model(tokens, [outputs, routing.expert_index])
    found = model.predict(inputs(rng, 4, 8), verbose=0)
    assert found[1].shape == (4, 8, 0)


def test_experts_cannot_be_given_everywhere(rng):
    x, index = inputs(rng, 2, 8), np.zeros((2, 8, 1), "int32")
    layers = [
        make_layer(ExpertsChooseMaskedRouter(E)),
        make_layer(Top2MaskedRouter(E)),
        SoftMoeLayer(FeedForwardExperts(E, F)),
    ]
    for layer in layers:
        with pytest.raises(ValueError, match="expert_index"):
            layer(x, expert_index=index)
    layer = make_layer(MaskedRouter(E))
    for wrong in (index[:, :5], index[..., 0], np.zeros((2, 4, 2, 1), "int32")):
        with pytest.raises(ValueError, match="expert_index"):
            layer(x, expert_index=wrong)


def test_where_experts_choose_tokens_select_none(rng):
    layer = make_layer(ExpertsChooseMaskedRouter(E))
    assert tuple(layer.route(inputs(rng, 2, 8)).expert_index.shape) == (2, 8, 0)
