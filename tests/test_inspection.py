import keras
import numpy as np
import pytest
from layer_check import functional

from keras_moe import (
    ExpertsChooseMaskedRouter,
    FeedForwardExperts,
    HierarchicalMoeLayer,
    MaskedRouter,
    MoeLayer,
    Router,
    Rows,
    SoftMoeLayer,
    Top2MaskedRouter,
    route,
    summary,
)
from keras_moe.inspection import expected_drops, layer_cost
from keras_moe.routing import assign_slots, top_k

E, F, H, T = 4, 8, 6, 16
EXPERT = 2 * H * F + F + H
GATE = (H + 1) * E


def make_moe(k=1, factor=1.0, router=None, name="moe"):
    return MoeLayer(
        FeedForwardExperts(E, F),
        router or MaskedRouter(E, num_selected_experts=k),
        train_capacity_factor=factor,
        eval_capacity_factor=None if factor is None else 2 * factor,
        name=name,
    )


def built(layer):
    layer.build((None, T, H))
    return layer


@pytest.mark.parametrize("factor", [1.0, None])
def test_cost_of_token_choice(factor):
    found = layer_cost(built(make_moe(k=2, factor=factor)), T)
    assert found["parameters"] == GATE + E * EXPERT
    assert found["active_parameters"] == GATE + 2 * EXPERT
    # The capacity factor is 2 in evaluation: 2 · 16 / 4 slots, which are all computed.
    assert found["eval_capacity"] == (None if factor is None else 8)
    assert found["train_capacity"] == (None if factor is None else 4)
    assert found["flops_per_token"] == 2 * (GATE + 2 * EXPERT)
    if factor is None:
        assert found["train_drops"] is found["eval_drops"] is None
    else:
        assert found["train_drops"] == expected_drops(T, E, 2, 4) > 0.4


def test_cost_of_expert_choice():
    router = ExpertsChooseMaskedRouter(E)
    found = layer_cost(built(make_moe(router=router)), T)
    assert found["active_parameters"] == GATE + 2 * EXPERT
    assert found["train_drops"] is None


def test_cost_of_hierarchical_and_soft_layers():
    outer, inner = (Top2MaskedRouter(2, name=name) for name in ("outer", "inner"))
    layer = HierarchicalMoeLayer(
        FeedForwardExperts(E, F),
        outer,
        inner,
        eval_capacity_factor=1.0,
        min_expert_capacity=1,
    )
    found = layer_cost(built(layer), T)
    # 8 outer slots for 16 tokens, and 4 inner slots for these 8.
    assert found["eval_capacity"] == 4
    gates = 3 * (H * 2 + 2)
    assert found["active_parameters"] == gates + 3 * EXPERT
    soft = built(SoftMoeLayer(FeedForwardExperts(E, F), slots_per_expert=2))
    found = layer_cost(soft, T)
    assert found["eval_capacity"] == 2
    assert found["active_parameters"] == found["parameters"]
    slots = H * E * 2 + 1
    assert found["flops_per_token"] == 2 * (slots + EXPERT * 8 // T)


@pytest.mark.parametrize(
    ("tokens", "k", "capacity"), [(16, 1, 4), (16, 2, 5), (64, 1, 20), (7, 4, 5)]
)
def test_expected_drops_match_random_choices(tokens, k, capacity, rng):
    scores = rng.random((20_000, tokens, E))
    chosen = scores.argsort(axis=-1) < k
    dropped = np.maximum(chosen.sum(axis=1) - capacity, 0).sum(axis=-1)
    expected = dropped.mean() / (tokens * k)
    found = expected_drops(tokens, E, k, capacity)
    assert found == pytest.approx(expected, rel=0.05, abs=2e-4)


def test_expected_drops_are_0_with_enough_capacity():
    assert expected_drops(16, E, 1, 16) == 0


def test_summary():
    inputs = keras.Input((T, H))
    outputs = make_moe(k=2, name="first")(inputs)
    outputs = make_moe(factor=None, name="second")(outputs)
    model = keras.Model(inputs, keras.layers.Dense(3)(outputs), name="mine")
    lines = []
    summary(model, T, print_fn=lines.append)
    assert len(lines) == 4
    assert lines[0].split()[:3] == ["layer", "experts", "k"]
    active = GATE + 2 * EXPERT
    expected = ["first", "4", "2", f"{GATE + 4 * EXPERT}", f"{active}"]
    expected += [f"{2 * active:,}", "4"]
    assert lines[1].split()[:7] == expected
    assert lines[2].split()[6:] == ["no", "limit", "-", "no", "limit", "-"]
    total_active = active + GATE + EXPERT + 3 * H + 3
    total = 2 * (GATE + 4 * EXPERT) + 3 * H + 3
    assert lines[3] == f"mine: {total:,} parameters, {total_active:,} active per token."


def test_models_without_a_summary():
    with pytest.raises(ValueError, match="must be built and have"):
        summary(functional(keras.layers.Dense(3), (T, H)), T)
    with pytest.raises(ValueError, match="must be built"):
        summary(make_moe(), T)
    with pytest.raises(ValueError, match="must be built"):
        route(make_moe(), np.zeros((1, T, H)))


def test_the_default_group_size_is_that_of_the_built_shape():
    def lines(length, layer, **arguments):
        inputs = keras.Input((length, H))
        model = keras.Model(inputs, layer(inputs), name="mine")
        found = []
        summary(model, print_fn=found.append, **arguments)
        return found

    assert lines(T, make_moe()) == lines(T, make_moe(), tokens_per_group=T)
    assert lines(None, make_moe(factor=None))[1].split()[-1] == "-"
    with pytest.raises(ValueError, match="moe was built for inputs of unknown length"):
        lines(None, make_moe())


class CustomRouter(Router):
    """A dropless router without `experts_per_token`."""

    supports_dropless = True

    def compute_routing(self, probs, expert_capacity, training=None):
        return assign_slots(top_k(probs, 3), probs, expert_capacity)


def test_a_router_without_a_number_of_experts_per_token():
    inputs = keras.Input((T, H))
    layer = make_moe(factor=None, router=CustomRouter(E))
    model = keras.Model(inputs, layer(inputs), name="mine")
    lines = []
    summary(model, T, print_fn=lines.append)
    parameters = GATE + E * EXPERT
    assert lines[1].split()[1:6] == ["4", "-", str(parameters), "-", "-"]
    assert lines[2] == f"mine: {parameters} parameters."


def test_route_returns_the_routing_of_each_layer(rng):
    x = rng.normal(size=(3, T, H)).astype("float32")
    inputs = keras.Input((T, H))
    outputs = inputs + make_moe(k=2, name="first")(inputs)
    inner = functional(make_moe(factor=None, name="second"), (T, H))
    model = keras.Model(inputs, inner(outputs))
    model.compile("sgd", "mse")
    logs = model.evaluate(x, x, verbose=0, return_dict=True)
    for training in (False, True):
        routings = route(model, x, training=training)
        assert list(routings) == ["first", "second"]
        first = model.get_layer("first")
        for a, b in zip(
            routings["first"], first.route(x, training=training), strict=True
        ):
            np.testing.assert_array_equal(*map(keras.ops.convert_to_numpy, (a, b)))
        assert isinstance(routings["second"], Rows)
    # Metrics have not changed.
    assert {m.name: float(m.result()) for m in first.router.metrics} == {
        f"first/{n}": pytest.approx(logs[f"first/{n}"]) for n in Router.metric_names
    }
    assert model.evaluate(x, x, verbose=0, return_dict=True) == logs
    assert "compute_routing" not in vars(first)
