import numpy as np
import pytest
from keras import ops
from layer_check import check_layer

from keras_moe import (
    ExpertsChooseMaskedRouter,
    FeedForwardExperts,
    HierarchicalMoeLayer,
    MaskedRouter,
    RouterMask,
    Slots,
    Top2MaskedRouter,
)

OUTER, INNER, H, F = 2, 3, 6, 10


def make_layer(outer=None, inner=None, **kwargs):
    options = {"kernel_initializer": "he_normal", "second_policy_eval": "all"}
    return HierarchicalMoeLayer(
        FeedForwardExperts(
            OUTER * INNER,
            F,
            kernel_initializer="he_normal",
            dtype=kwargs.get("dtype"),
        ),
        outer or Top2MaskedRouter(OUTER, name="outer", **options),
        inner or Top2MaskedRouter(INNER, name="inner", **options),
        **kwargs,
    )


def expected_routing(layer, x, capacity):
    """Returns the (token, weight) pairs of each expert, for one group `[t, h]`."""
    gates = {w.path.split("/", 1)[1]: w.numpy() for w in layer.weights}
    outer_slots = top2(
        probabilities(x, gates, "outer"), [True] * len(x), [True] * len(x), capacity
    )
    expected = []
    for n, row in enumerate(outer_slots):
        tokens = [token for token, _ in row] + [0] * (capacity - len(row))
        valid = [True] * len(row) + [False] * (capacity - len(row))
        important = [w > 0.5 for _, w in row] + [False] * (capacity - len(row))
        probs = probabilities(x[tokens], gates, "inner", n)
        # The capacity of an inner expert follows from `capacity` tokens in its group.
        inner = min(max(round(2.0 * capacity / INNER), 4), capacity)
        for chosen in top2(probs, valid, important, inner):
            expected.append([(tokens[slot], row[slot][1] * w) for slot, w in chosen])
    return expected


def probabilities(x, gates, name, n=None):
    kernel = gates[f"{name}/router_weights/kernel"]
    bias = gates[f"{name}/router_weights/bias"]
    if n is not None:
        kernel, bias = kernel[n], bias[n, 0]
    z = np.exp(x @ kernel + bias)
    return z / z.sum(-1, keepdims=True)


def top2(probs, valid, important, c):
    slots = [[] for _ in range(probs.shape[1])]
    choices = []
    for token, p in enumerate(probs):
        a, b = np.argsort(-p)[:2]
        if not valid[token]:
            continue
        if important[token]:
            choices += [(0, token, a, p[a] / (p[a] + p[b]))]
            choices += [(1, token, b, p[b] / (p[a] + p[b]))]
        else:
            choices += [(1, token, a, 1.0)]
    for _, token, expert, weight in sorted(choices, key=lambda choice: choice[:2]):
        if len(slots[expert]) < c:
            slots[expert].append((token, weight))
    return slots


def test_both_levels_match_the_expected_routing(rng):
    x = rng.normal(size=(1, 24, H)).astype("float32")
    layer = make_layer(name="moe")
    routing = layer.route(x)
    index = ops.convert_to_numpy(routing.token_index)[0]
    weight = ops.convert_to_numpy(routing.weight)[0]
    for e, row in enumerate(expected_routing(layer, x[0], 24)):
        filled = index[e] >= 0
        assert list(index[e][filled]) == [token for token, _ in row]
        np.testing.assert_allclose(
            weight[e][filled], [w for _, w in row], rtol=1e-4, atol=1e-6
        )


def test_shapes_and_sums(rng):
    x = rng.normal(size=(3, 24, H)).astype("float32")
    outputs, routing = make_layer()(x, return_routing=True)
    assert outputs.shape == x.shape and isinstance(routing, Slots)
    assert routing.probs.shape == (3, 24, OUTER * INNER)
    for part in (routing.probs, routing.load):
        np.testing.assert_allclose(ops.convert_to_numpy(part).sum(-1), 1, rtol=1e-5)


def test_masked_tokens_do_not_affect_others(rng):
    x = rng.normal(size=(2, 24, H)).astype("float32")
    mask = rng.random((2, 24)) < 0.6
    layer = make_layer()
    outputs = ops.convert_to_numpy(layer(x, mask=mask))
    assert not outputs[~mask].any()
    other = np.where(mask[..., None], x, np.nan)
    np.testing.assert_array_equal(
        ops.convert_to_numpy(layer(other, mask=mask)), outputs
    )


def test_both_levels_report_metrics_and_losses(rng):
    x = rng.normal(size=(2, 24, H)).astype("float32")
    layer = make_layer(name="moe")
    layer(x)
    metrics = layer.outer_router.metrics + layer.inner_router.metrics
    values = {m.name: float(m.result()) for m in metrics}
    assert len(values) == 14
    assert {"moe/outer/expert_usage", "moe/inner/expert_usage"} <= values.keys()
    assert len(layer.losses) == 2
    assert all(np.isfinite(value) for value in values.values())
    inner = values["moe/inner/load_balancing_loss"]
    assert float(layer.losses[1]) == pytest.approx(0.01 * inner)
    layer = make_layer()
    layer.route(x)
    assert layer.losses == [] and layer.inner_router.metrics == []


@pytest.mark.thorough
def test_the_layer_check(tmp_path):
    check_layer(make_layer, (12, H), tmp_path / "model.keras")


def test_other_outer_routers(rng):
    x = rng.normal(size=(2, 24, H)).astype("float32")
    for router in (MaskedRouter, ExpertsChooseMaskedRouter):
        outputs = make_layer(outer=router(OUTER, name="outer"))(x)
        assert ops.convert_to_numpy(outputs).any()


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (
            {"outer": Top2MaskedRouter(3, name="o")},
            ValueError,
            "3 groups of 3 are 9",
        ),
        ({"outer": FeedForwardExperts(2, 3)}, TypeError, "`outer_router` must be"),
        ({"inner": MaskedRouter(INNER, name="i")}, TypeError, "`inner_router` must be"),
        (
            {"inner": Top2MaskedRouter(INNER, name="outer")},
            ValueError,
            "different names",
        ),
        (
            {"inner": Top2MaskedRouter(INNER, name="i", hidden_layers=[2])},
            ValueError,
            "hidden layers",
        ),
        ({"train_capacity_factor": 0}, ValueError, "train_capacity_factor=0"),
        ({"min_expert_capacity": 0}, ValueError, "min_expert_capacity=0"),
    ],
)
def test_bad_arguments(arguments, error, message):
    with pytest.raises(error, match=message):
        make_layer(**arguments)


class Dense(MaskedRouter):
    def compute_routing(self, probs, expert_capacity, training=None):
        slots = super().compute_routing(probs, expert_capacity, training)
        return RouterMask(slots.dispatch_mask, slots.combine_array)

    def load_balancing_loss(self, routing):
        return 0.0


def test_an_outer_router_must_return_slots(rng):
    layer = make_layer(outer=Dense(OUTER, name="outer"))
    x = rng.normal(size=(2, 8, H)).astype("float32")
    with pytest.raises(TypeError, match=r"must return `Slots`.*RouterMask from Dense"):
        layer(x)


@pytest.mark.parametrize(
    ("outer", "maximum"),
    [
        (Top2MaskedRouter(OUTER, name="outer"), 3),
        (MaskedRouter(OUTER, name="outer"), 2),
        (MaskedRouter(OUTER, num_selected_experts=2, name="outer"), 3),
        # All sigmoids may be above 1/2.
        (
            MaskedRouter(
                OUTER, num_selected_experts=2, mechanism="sigmoid", name="outer"
            ),
            4,
        ),
    ],
)
def test_the_maximum_number_of_experts_per_token(outer, maximum, rng):
    layer = make_layer(outer=outer, eval_capacity_factor=99.0, min_expert_capacity=99)
    assert layer.experts_per_token == maximum
    x = 10 * rng.normal(size=(4, 32, H)).astype("float32")
    counts = ops.convert_to_numpy(layer.route(x).slots_per_token)
    assert counts.max() == maximum
