import keras
import numpy as np
import oracle
import pytest
from keras import ops
from samples import prefer_first
from tables import check_slots, random_tables

from keras_moe import (
    BiasBalancedMaskedRouter,
    ExpertsChooseMaskedRouter,
    MaskedRouter,
    Router,
    Top2MaskedRouter,
)
from keras_moe.routing.placement import assign_slots
from keras_moe.routing.selection import top_k


def route(router, x, **kwargs):
    slots = router(x, **kwargs)
    return type(slots)(*(ops.convert_to_numpy(part) for part in slots))


@pytest.mark.parametrize("k", [1, 2, None])
@pytest.mark.parametrize("masked", [False, True])
def test_routers_match_the_oracle(k, masked, rng):
    g, t, h, e, c = 2, 9, 6, 4, 3
    x = rng.normal(size=(g, t, h)).astype("float32")
    mask = rng.random((g, t)) < 0.7 if masked else None
    if k is None:
        router = ExpertsChooseMaskedRouter(e, kernel_initializer="glorot_uniform")
    else:
        router = MaskedRouter(
            e,
            num_selected_experts=k,
            normalize_weights=True,
            kernel_initializer="glorot_uniform",
        )
    slots = route(router, x, expert_capacity=c, mask=mask)
    kernel, bias = router.get_weights()
    probs = oracle.softmax(x.astype("float64") @ kernel + bias)
    valid = np.ones((g, t), bool) if mask is None else mask
    if k is None:
        expected = [oracle.experts_choose(probs[i], valid[i], c) for i in range(g)]
    else:
        expected = [
            oracle.tokens_choose(probs[i], valid[i], k, c, True) for i in range(g)
        ]
    check_slots(slots, expected, c)
    np.testing.assert_allclose(
        slots.probs, probs * valid[..., None], rtol=1e-4, atol=1e-6
    )


def test_losses_are_weighted_in_training_and_evaluation(rng):
    x = rng.normal(size=(2, 9, 6)).astype("float32")
    router = MaskedRouter(4, router_z_loss_weight=0.5, load_balancing_loss_weight=0.25)
    for training in (False, True):
        router(x, expert_capacity=3, training=training)
        z_loss, balance_loss = (float(loss) for loss in router.losses)
        values = {m.name.split("/")[-1]: float(m.result()) for m in router.metrics}
        assert z_loss == pytest.approx(0.5 * values["unscaled_router_z_loss"])
        assert z_loss == pytest.approx(values["router_z_loss"])
        assert balance_loss == pytest.approx(0.25 * values["load_balancing_loss"])


def test_no_loss_is_added_with_weight_0(rng):
    x = rng.normal(size=(2, 9, 6)).astype("float32")
    for router in (
        MaskedRouter(4, load_balancing_loss_weight=0.0),
        ExpertsChooseMaskedRouter(4),
    ):
        router(x, expert_capacity=3)
        assert router.losses == []


def test_route_returns_the_same_and_adds_no_losses_or_metrics(rng):
    x = rng.normal(size=(2, 9, 6)).astype("float32")
    router = MaskedRouter(4, router_z_loss_weight=1.0)
    router.build(x.shape)
    expected = router.route(x, expert_capacity=3)
    assert router.losses == [] and router.metrics == []
    for a, b in zip(expected, router(x, expert_capacity=3), strict=True):
        np.testing.assert_array_equal(ops.convert_to_numpy(a), ops.convert_to_numpy(b))


def test_routing_is_float32_under_every_policy(rng):
    x = ops.cast(rng.normal(size=(2, 9, 6)), "bfloat16")
    for policy in ("mixed_bfloat16", "mixed_float16", "bfloat16", "float64"):
        router = MaskedRouter(4, dtype=policy, router_z_loss_weight=1.0)
        slots = router(x, expert_capacity=3)
        dtypes = [keras.backend.standardize_dtype(part.dtype) for part in slots]
        assert dtypes == ["int32", "float32", "float32", "float32", "int32"]


def test_only_the_named_metrics_are_exported(rng):
    x = rng.normal(size=(2, 9, 6)).astype("float32")
    router = MaskedRouter(4, export_metrics=("expert_usage",))
    router(x, expert_capacity=3)
    assert [m.name for m in router.metrics] == ["router/expert_usage"]
    router = MaskedRouter(4, export_metrics=False)
    router(x, expert_capacity=3)
    assert router.metrics == []
    assert len(router.variables) == len(router.weights) == 2


def test_config():
    router = MaskedRouter(
        4,
        jitter_noise=0.1,
        use_bias=False,
        kernel_initializer="glorot_uniform",
        bias_initializer="ones",
        router_z_loss_weight=0.5,
        export_metrics=("expert_usage",),
        num_selected_experts=2,
        normalize_weights=True,
        load_balancing_loss_weight=0.5,
        name="other",
    )
    config = router.get_config()
    copy = MaskedRouter.from_config(config)
    assert copy.get_config() == config
    assert config["num_selected_experts"] == 2 and config["normalize_weights"]
    assert config["jitter_noise"] == 0.1 and not config["use_bias"]
    assert config["load_balancing_loss_weight"] == 0.5
    assert copy.router_weights.kernel_initializer.__class__.__name__ == "GlorotUniform"


class WithoutARule(Router):
    pass


def test_compute_routing_must_be_implemented():
    with pytest.raises(NotImplementedError, match="WithoutARule must implement"):
        WithoutARule(4)(np.zeros((1, 2, 3)), expert_capacity=1)


class Constant(Router):
    """A custom router with an additional metric."""

    metric_names = (*Router.metric_names, "mine")

    def compute_routing(self, probs, expert_capacity, training=None):
        return assign_slots(top_k(probs, 1), probs, expert_capacity)

    def report(self, routing, logits, mask):
        super().report(routing, logits, mask)
        self.add_metric(ops.mean(routing.probs), "mine")


def test_a_custom_router(rng):
    x = rng.normal(size=(2, 9, 6)).astype("float32")
    router = Constant(4, export_metrics=("mine", "expert_usage"))
    router(x, expert_capacity=3)
    names = [m.name for m in router.metrics]
    assert names == ["router/expert_usage", "router/mine"]
    router.route(x, expert_capacity=3)
    assert float(router.metrics[1].result()) == pytest.approx(0.25)
    means = next(v for v in router.variables if v.name.endswith("running_means"))
    assert ops.convert_to_numpy(means)[:, 1].max() == 1


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({"num_experts": 0}, ValueError),
        ({"num_experts": None}, TypeError),
        ({"num_selected_experts": 5}, ValueError),
        ({"num_selected_experts": 0}, ValueError),
        ({"num_selected_experts": 1.0}, TypeError),
        ({"normalize_weights": None}, TypeError),
        ({"load_balancing_loss_weight": -1}, ValueError),
        ({"router_z_loss_weight": float("nan")}, ValueError),
        ({"jitter_noise": 1}, ValueError),
        ({"export_metrics": "expert_usage"}, TypeError),
        ({"export_metrics": 1}, TypeError),
        ({"export_metrics": ("unknown",)}, ValueError),
    ],
)
def test_bad_arguments(arguments, error):
    with pytest.raises(error):
        MaskedRouter(**{"num_experts": 4, **arguments})


# Options of MaskedRouter.


@pytest.mark.parametrize("priority", ["choice", "token", "probability"])
def test_priorities_match_the_oracle(priority, rng):
    x = rng.normal(size=(1, 30, 6)).astype("float32")
    router = MaskedRouter(
        3, num_selected_experts=2, priority=priority, kernel_initializer="he_normal"
    )
    slots = route(router, x, expert_capacity=10)
    expected = oracle.tokens_choose(
        slots.probs[0], np.ones(30), 2, 10, priority=priority
    )
    check_slots(slots, [expected], 10, rtol=1e-6)


def test_next_best_overflow_matches_the_oracle(rng):
    x = rng.normal(size=(1, 30, 6)).astype("float32")
    router = MaskedRouter(
        3,
        num_selected_experts=2,
        normalize_weights=True,
        priority="token",
        overflow="next_best",
        bias_initializer=lambda *shape, **dtype: 0.04 * prefer_first(*shape, **dtype),
    )
    slots = route(router, x, expert_capacity=20)
    expected = oracle.next_best(slots.probs[0], np.ones(30), 2, 20, True)
    index, weight = oracle.as_arrays(expected, 20)
    np.testing.assert_array_equal(slots.token_index[0], index)
    np.testing.assert_allclose(slots.weight[0], weight, rtol=1e-5)
    # Every token selects expert 0 before dropping, but 10 tokens get no slot there.
    assert slots.load[0, 0] == 0.5
    assert (slots.token_index[0, 1:] >= 0).sum() >= 30


@pytest.mark.parametrize("make", [MaskedRouter, ExpertsChooseMaskedRouter])
def test_a_sigmoid_gate_has_raw_weights_and_normalized_probabilities(make, rng):
    x = rng.normal(size=(1, 9, 6)).astype("float32")
    router = make(3, mechanism="sigmoid")
    slots = route(router, x, expert_capacity=9)
    np.testing.assert_allclose(slots.probs.sum(-1), 1, rtol=1e-5)
    assert slots.weight.max() > 0.4


def test_a_gumbel_gate_samples_in_training(rng):
    x = rng.normal(size=(8, 9, 6)).astype("float32")
    router = MaskedRouter(3, mechanism="gumbel")
    a = route(router, x, expert_capacity=9)
    b = route(router, x, expert_capacity=9, training=True)
    assert (a.token_index != b.token_index).any()
    np.testing.assert_allclose(b.weight[b.token_index >= 0], 1, rtol=1e-6)


# BiasBalancedMaskedRouter.


def test_the_bias_affects_the_selection_but_not_the_weights(rng):
    x = rng.normal(size=(1, 9, 6)).astype("float32")
    router = BiasBalancedMaskedRouter(
        4, num_selected_experts=2, routed_scaling_factor=2.5
    )
    router.build(x.shape)
    router.expert_bias.assign([0.0, 9.0, 0.0, 5.0])
    slots = route(router, x, expert_capacity=9)
    assert (slots.token_index[0, [1, 3]] == np.arange(9)).all()
    assert (slots.token_index[0, [0, 2]] == -1).all()
    kernel, bias = router.router_weights.get_weights()
    scores = 1 / (1 + np.exp(-(x[0] @ kernel + bias)))
    expected = 2.5 * scores[:, [1, 3]].T / scores[:, [1, 3]].sum(-1)
    np.testing.assert_allclose(slots.weight[0, [1, 3]], expected, rtol=1e-5)
    assert router.losses == []


def test_the_bias_is_updated_by_the_sign_of_the_load_error(rng):
    x = rng.normal(size=(2, 9, 6)).astype("float32")
    mask = rng.random((2, 9)) < 0.8
    router = BiasBalancedMaskedRouter(4, bias_update_rate=0.25)
    router.build(x.shape)
    router.router_weights.kernel.assign(rng.normal(size=(6, 4)))
    expected = np.zeros(4)
    for _ in range(3):
        slots = route(router, x, expert_capacity=9, mask=mask, training=True)
        load = (slots.token_index >= 0).sum(axis=(0, 2))
        expected += 0.25 * np.sign(load.mean() - load)
        expected -= expected.mean()
        bias = ops.convert_to_numpy(router.expert_bias)
        np.testing.assert_allclose(bias, expected, atol=1e-6)
    assert expected.any()


def test_the_bias_is_updated_by_the_load_of_several_batches(rng):
    """Two batches with `bias_update_steps=2` are as one batch of all their tokens."""
    x = rng.normal(size=(3, 4, 9, 6)).astype("float32")

    def make(steps):
        router = BiasBalancedMaskedRouter(
            4,
            num_selected_experts=2,
            bias_update_rate=0.25,
            bias_update_steps=steps,
            kernel_initializer=keras.initializers.HeNormal(seed=1),
        )
        router.build(x.shape[1:])
        return router

    once, twice = make(1), make(2)
    for batch in x:
        once(batch, expert_capacity=9, training=True)
        before = np.copy(twice.expert_bias)
        twice(batch[:1], expert_capacity=9, training=True)
        np.testing.assert_array_equal(np.copy(twice.expert_bias), before)
        twice(batch[1:], expert_capacity=9, training=True)
        np.testing.assert_allclose(
            np.copy(twice.expert_bias), np.copy(once.expert_bias), atol=1e-6
        )
    assert np.copy(once.expert_bias).any()
    # The sums are no weights.
    assert len(twice.weights) == len(once.weights)
    other = BiasBalancedMaskedRouter.from_config(twice.get_config())
    assert other.bias_update_steps == 2


def test_the_bias_is_not_updated_outside_training(rng):
    x = rng.normal(size=(2, 9, 6)).astype("float32")
    router = BiasBalancedMaskedRouter(4, kernel_initializer="he_normal")
    router(x, expert_capacity=9)
    router.route(x, expert_capacity=9, training=True)
    router.trainable = False
    router(x, expert_capacity=9, training=True)
    assert not ops.convert_to_numpy(router.expert_bias).any()


def test_experts_are_selected_from_the_best_groups(rng):
    x = rng.normal(size=(1, 50, 6)).astype("float32")
    router = BiasBalancedMaskedRouter(
        8,
        num_selected_experts=4,
        num_expert_groups=4,
        num_selected_groups=2,
        kernel_initializer="he_normal",
    )
    slots = route(router, x, expert_capacity=50)
    kernel, bias = router.router_weights.get_weights()
    scores = 1 / (1 + np.exp(-(x[0] @ kernel + bias)))
    for token in range(50):
        groups = oracle.top_k([sum(s) for s in scores[token].reshape(4, 2)], 2)
        chosen = {e for e in range(8) if token in slots.token_index[0, e]}
        assert chosen == {2 * g + i for g in groups for i in (0, 1)}


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({"num_expert_groups": 3}, ValueError),
        ({"num_selected_groups": 2}, ValueError),
        ({"num_expert_groups": 4, "num_selected_experts": 3}, ValueError),
        ({"routed_scaling_factor": 0}, ValueError),
        ({"bias_update_rate": -1}, ValueError),
        ({"mechanism": "gumbel"}, ValueError),
    ],
)
def test_bad_arguments_of_the_bias_balanced_router(arguments, error):
    with pytest.raises(error):
        BiasBalancedMaskedRouter(8, **arguments)


# Top2MaskedRouter.

TWO = np.log([[[0.6, 0.3, 0.1], [0.2, 0.2, 0.6], [0.89, 0.1, 0.01]]]).astype("float32")


def top2(**kwargs):
    # The kernel is the identity, so that the tokens are the logits.
    return Top2MaskedRouter(
        3,
        kernel_initializer="identity",
        use_bias=False,
        second_policy_train="all",
        **kwargs,
    )


@pytest.mark.parametrize(
    ("policy", "expected"),
    [
        # First choices 0, 2, 0; second choices 1, 0 (full), 1.
        ("all", [[0, 2], [0, 2], [1, -1]]),
        ("none", [[0, 2], [-1, -1], [1, -1]]),
        # Second weights 1/3, 1/4 and about 0.1.
        ("threshold", [[0, 2], [0, -1], [1, -1]]),
    ],
)
def test_second_policies_table(policy, expected):
    router = top2(second_policy_eval=policy, second_threshold_eval=0.3)
    slots = route(router, TWO, expert_capacity=2)
    np.testing.assert_array_equal(slots.token_index, [expected])
    # First weights are below 1 under every policy.
    np.testing.assert_allclose(slots.weight[0, 0, 0], 0.6 / 0.9, rtol=1e-5)
    # The load counts first choices.
    np.testing.assert_allclose(slots.load, [[2 / 3, 0, 1 / 3]], rtol=1e-6)


def test_the_random_policy_keeps_in_proportion_to_the_weight():
    router = Top2MaskedRouter(
        3,
        kernel_initializer="identity",
        use_bias=False,
        second_policy_train="random",
        second_threshold_train=0.5,
    )
    x = np.repeat(TWO[:, :1], 4000, axis=1)
    slots = route(router, x, expert_capacity=4000, training=True)
    kept = (slots.token_index[0, 1] >= 0).mean()
    assert kept == pytest.approx((1 / 3) / 0.5, abs=0.03)


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({"num_experts": 1}, ValueError),
        ({"second_policy_train": "most"}, ValueError),
        ({"second_policy_eval": 1}, TypeError),
        ({"second_threshold_train": -1}, ValueError),
        ({"mechanism": "gumbel"}, ValueError),
    ],
)
def test_bad_arguments_of_the_top_2_router(arguments, error):
    with pytest.raises(error):
        Top2MaskedRouter(**{"num_experts": 4, **arguments})


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({"priority": "first"}, ValueError),
        ({"overflow": "next"}, ValueError),
        ({"overflow": "next_best"}, ValueError),
        ({"mechanism": "gumbel", "num_selected_experts": 2}, ValueError),
    ],
)
def test_bad_options(arguments, error):
    with pytest.raises(error):
        MaskedRouter(4, **arguments)


# Comparisons with the oracle over random tables, with recorded random values.


def record_draws(monkeypatch, name):
    """Returns a list that receives all values drawn by `keras.random.<name>`."""
    drawn, draw = [], getattr(keras.random, name)

    def draw_and_record(*args, **kwargs):
        drawn.append(draw(*args, **kwargs))
        return drawn[-1]

    monkeypatch.setattr(keras.random, name, draw_and_record)
    return drawn


@pytest.mark.parametrize("policy", ["all", "none", "threshold", "random"])
@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("c", [1, 4, 13])
@pytest.mark.parametrize("training", [False, True])
def test_top_2_matches_the_oracle(policy, ties, c, training, rng, monkeypatch):
    probs, valid = random_tables(rng, ties)
    router = Top2MaskedRouter(
        6,
        second_policy_train=policy,
        second_policy_eval=policy,
        second_threshold_train=0.4,
        second_threshold_eval=0.3,
    )
    drawn = record_draws(monkeypatch, "uniform")
    slots = router.compute_routing(ops.convert_to_tensor(probs), c, training)
    noise = ops.convert_to_numpy(drawn[0])[..., 0] if drawn else None
    assert bool(drawn) == (policy == "random")
    threshold = 0.4 if training else 0.3

    def keeps(group):
        return {
            "all": lambda token, weight: True,
            "none": lambda token, weight: False,
            "threshold": lambda token, weight: weight > threshold,
            "random": lambda token, weight: noise[group, token] < weight / threshold,
        }[policy]

    expected = [oracle.top_two(probs[i], valid[i], c, keeps(i)) for i in range(3)]
    check_slots(slots, expected, c)


@pytest.mark.parametrize("k", [1, 2])
@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize(("groups", "selected"), [(1, 1), (3, 2), (2, 1)])
@pytest.mark.parametrize("c", [1, 4, 13])
def test_bias_balanced_matches_the_oracle(k, ties, groups, selected, c, rng):
    scores, valid = random_tables(rng, ties)
    router = BiasBalancedMaskedRouter(
        6,
        num_selected_experts=k,
        routed_scaling_factor=2.5,
        num_expert_groups=groups,
        num_selected_groups=selected,
    )
    router.build((None, None, 4))
    # In sixteenths, like tied scores, so that their sums tie as well.
    bias = rng.integers(-3, 4, size=6) / 16
    router.expert_bias.assign(bias)
    slots = router.compute_routing(ops.convert_to_tensor(scores), c)
    expected = [
        oracle.bias_balanced(scores[i], bias, valid[i], k, c, groups, selected, 2.5)
        for i in range(3)
    ]
    check_slots(slots, expected, c)


def test_the_bias_over_training_steps_matches_the_oracle(rng):
    router = BiasBalancedMaskedRouter(
        6, num_selected_experts=2, bias_update_rate=0.1, kernel_initializer="he_normal"
    )
    router.build((None, None, 4))
    kernel = router.router_weights.get_weights()[0]
    bias = np.zeros(6)
    for _ in range(5):
        x = rng.normal(size=(3, 7, 4)).astype("float32")
        mask = rng.random((3, 7)) < 0.8
        slots = router(x, expert_capacity=3, mask=mask, training=True)
        scores = 1 / (1 + np.exp(-(x.astype("float64") @ kernel)))
        expected = [
            oracle.bias_balanced(scores[i], bias, mask[i], 2, 3) for i in range(3)
        ]
        check_slots(slots, expected, 3)
        load = sum(counts for _, counts in expected)
        bias += 0.1 * np.sign(load.mean() - load)
        bias -= bias.mean()
        np.testing.assert_allclose(
            ops.convert_to_numpy(router.expert_bias), bias, atol=1e-6
        )


@pytest.mark.parametrize("mechanism", ["softmax", "gumbel", "sigmoid"])
def test_training_noise_matches_the_oracle(mechanism, rng, monkeypatch):
    """Jitter on the inputs, noise on the logits, a Gumbel sample."""
    router = MaskedRouter(
        6,
        mechanism=mechanism,
        jitter_noise=0.2,
        noise_std=0.5,
        kernel_initializer="he_normal",
    )
    router.build((None, None, 4))
    kernel = router.router_weights.get_weights()[0].astype("float64")
    x = rng.normal(size=(3, 7, 4)).astype("float32")
    uniform = record_draws(monkeypatch, "uniform")
    normal = record_draws(monkeypatch, "normal")
    slots = router(x, expert_capacity=3, training=True)
    jitter, noise = (ops.convert_to_numpy(drawn[0]) for drawn in (uniform, normal))
    logits = (x * jitter).astype("float64") @ kernel + 0.5 * noise
    if mechanism == "gumbel":
        logits = logits - np.log(-np.log(ops.convert_to_numpy(uniform[1])))
        probs = np.eye(6)[logits.argmax(-1)]
    elif mechanism == "sigmoid":
        probs = 1 / (1 + np.exp(-logits))
    else:
        probs = oracle.softmax(logits)
    valid = np.ones(7, bool)
    expected = [oracle.tokens_choose(probs[i], valid, 1, 3) for i in range(3)]
    check_slots(slots, expected, 3)
    # Nothing is drawn outside training.
    drawn = len(uniform) + len(normal)
    router(x, expert_capacity=3)
    assert len(uniform) + len(normal) == drawn
