import keras
import numpy as np
import oracle
import pytest
from keras import ops

from keras_moe import ExpertsChooseMaskedRouter, MaskedRouter, Router
from keras_moe.placement import place
from keras_moe.selection import top_k


def route(router, x, **kwargs):
    slots = router(x, **kwargs)
    return type(slots)(*(ops.convert_to_numpy(part) for part in slots))


@pytest.mark.parametrize("k", [1, 2, None])
@pytest.mark.parametrize("masked", [False, True])
def test_against_the_oracle(k, masked, rng):
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
    for i in range(g):
        if k is None:
            expected, _ = oracle.experts_choose(probs[i], valid[i], c)
        else:
            expected, _ = oracle.tokens_choose(probs[i], valid[i], k, c, True)
        index, weight = oracle.as_arrays(expected, c)
        np.testing.assert_array_equal(slots.token_index[i], index)
        np.testing.assert_allclose(slots.weight[i], weight, rtol=1e-5)
    np.testing.assert_allclose(
        slots.probs, probs * valid[..., None], rtol=1e-4, atol=1e-6
    )


def test_losses_are_weighted_and_added_alike_in_training_and_evaluation(rng):
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


def test_route_says_the_same_and_leaves_no_trace(rng):
    x = rng.normal(size=(2, 9, 6)).astype("float32")
    router = MaskedRouter(4, router_z_loss_weight=1.0)
    router.build(x.shape)
    alone = router.route(x, expert_capacity=3)
    assert router.losses == [] and router.metrics == []
    for a, b in zip(alone, router(x, expert_capacity=3), strict=True):
        np.testing.assert_array_equal(ops.convert_to_numpy(a), ops.convert_to_numpy(b))


def test_routing_is_float32_under_every_policy(rng):
    x = ops.cast(rng.normal(size=(2, 9, 6)), "bfloat16")
    for policy in ("mixed_bfloat16", "mixed_float16", "bfloat16", "float64"):
        router = MaskedRouter(4, dtype=policy, router_z_loss_weight=1.0)
        slots = router(x, expert_capacity=3)
        dtypes = [keras.backend.standardize_dtype(part.dtype) for part in slots]
        assert dtypes == ["int32", "float32", "float32", "float32"]


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


def test_a_router_must_say_how_it_routes():
    with pytest.raises(NotImplementedError, match="WithoutARule must implement"):
        WithoutARule(4)(np.zeros((1, 2, 3)), expert_capacity=1)


class Constant(Router):
    """A router of one's own with a metric of its own."""

    metric_names = (*Router.metric_names, "mine")

    def compute_routing(self, probs, expert_capacity, training=None):
        return place(top_k(probs, 1), probs, expert_capacity)

    def report(self, routing, logits, mask):
        super().report(routing, logits, mask)
        self.add_metric(ops.mean(routing.probs), "mine")


def test_a_router_of_one_s_own(rng):
    x = rng.normal(size=(2, 9, 6)).astype("float32")
    router = Constant(4, export_metrics=("mine", "expert_usage"))
    router(x, expert_capacity=3)
    names = [m.name for m in router.metrics]
    assert names == ["router/expert_usage", "router/mine"]
    router.route(x, expert_capacity=3)
    assert float(router.metrics[1].result()) == pytest.approx(0.25)
    assert ops.convert_to_numpy(router.variables[-1])[1].max() == 1


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
