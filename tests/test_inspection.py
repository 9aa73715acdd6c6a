import keras
import numpy as np
import pytest
from layer_check import Subclassed, functional

from keras_moe import (
    ExpertsChooseMaskedRouter,
    FeedForwardExperts,
    HierarchicalMoeLayer,
    MaskedRouter,
    MoeLayer,
    MoeLayerWithBackbone,
    SoftMoeLayer,
    Top2MaskedRouter,
    summary,
)
from keras_moe.inspection import costs, expected_drops, layers_within
from keras_moe.routers import Router

E, F, H, T = 4, 8, 6, 16
OF_AN_EXPERT = 2 * H * F + F + H
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


def test_layers_within():
    class Block(keras.layers.Layer):
        def __init__(self, layer):
            super().__init__()
            self.parts = {"moe": [layer]}

        def call(self, inputs):
            return self.parts["moe"][0](inputs)

    first, second, third = (make_moe(name=f"moe_{i}") for i in range(3))
    inner = functional(first, (T, H))
    inputs = keras.Input((T, H))
    outputs = Block(second)(inner(inputs))
    outputs = MoeLayerWithBackbone(third, F)(first(outputs))  # The first one again.
    model = Subclassed(keras.Model(inputs, outputs))
    found = layers_within(model, MoeLayer)
    assert sorted(layer.name for layer in found) == ["moe_0", "moe_1", "moe_2"]
    assert len(layers_within(model, Router)) == 3
    assert layers_within(model, SoftMoeLayer) == []


@pytest.mark.parametrize("factor", [1.0, None])
def test_costs_where_tokens_choose(factor):
    found = costs(built(make_moe(k=2, factor=factor)), T)
    assert found["parameters"] == GATE + E * OF_AN_EXPERT
    assert found["active_parameters"] == GATE + 2 * OF_AN_EXPERT
    # Twice 1 times 16 tokens over 4 experts; each slot is computed.
    assert found["eval_capacity"] == (None if factor is None else 8)
    assert found["train_capacity"] == (None if factor is None else 4)
    assert found["flops_per_token"] == 2 * (GATE + 2 * OF_AN_EXPERT)
    if factor is None:
        assert found["train_drops"] is found["eval_drops"] is None
    else:
        assert found["train_drops"] == expected_drops(T, E, 2, 4) > 0.4


def test_costs_where_experts_choose():
    router = ExpertsChooseMaskedRouter(E)
    found = costs(built(make_moe(router=router)), T)
    assert found["active_parameters"] == GATE + 2 * OF_AN_EXPERT
    assert found["train_drops"] is None


def test_costs_of_two_levels_and_of_mixtures():
    outer, inner = (Top2MaskedRouter(2, name=name) for name in ("outer", "inner"))
    layer = HierarchicalMoeLayer(
        FeedForwardExperts(E, F),
        outer,
        inner,
        eval_capacity_factor=1.0,
        min_expert_capacity=1,
    )
    found = costs(built(layer), T)
    assert found["eval_capacity"] == 4  # 8 slots of 16 tokens; 4 slots of these 8.
    gates = 3 * (H * 2 + 2)
    assert found["active_parameters"] == gates + 4 * OF_AN_EXPERT
    soft = built(SoftMoeLayer(FeedForwardExperts(E, F), slots_per_expert=2))
    found = costs(soft, T)
    assert found["eval_capacity"] == 2
    assert found["active_parameters"] == found["parameters"]
    slots = H * E * 2 + 1
    assert found["flops_per_token"] == 2 * (slots + OF_AN_EXPERT * 8 // T)


@pytest.mark.parametrize(
    ("tokens", "k", "capacity"), [(16, 1, 4), (16, 2, 5), (64, 1, 20), (7, 4, 5)]
)
def test_expected_drops_are_those_of_random_choices(tokens, k, capacity, rng):
    scores = rng.random((20_000, tokens, E))
    chosen = scores.argsort(axis=-1) < k
    dropped = np.maximum(chosen.sum(axis=1) - capacity, 0).sum(axis=-1)
    expected = dropped.mean() / (tokens * k)
    found = expected_drops(tokens, E, k, capacity)
    assert found == pytest.approx(expected, rel=0.05, abs=2e-4)


def test_nothing_drops_where_there_is_room():
    assert expected_drops(16, E, 1, 16) == 0


def test_a_summary():
    inputs = keras.Input((T, H))
    outputs = make_moe(k=2, name="first")(inputs)
    outputs = make_moe(factor=None, name="second")(outputs)
    model = keras.Model(inputs, keras.layers.Dense(3)(outputs), name="mine")
    lines = []
    summary(model, T, print_fn=lines.append)
    assert len(lines) == 4
    assert lines[0].split()[:3] == ["layer", "experts", "k"]
    active = GATE + 2 * OF_AN_EXPERT
    expected = ["first", "4", "2", f"{GATE + 4 * OF_AN_EXPERT}", f"{active}"]
    expected += [f"{2 * active:,}", "4"]
    assert lines[1].split()[:7] == expected
    assert lines[2].split()[6:] == ["no", "limit", "-", "no", "limit", "-"]
    meets = active + GATE + OF_AN_EXPERT + 3 * H + 3
    total = 2 * (GATE + 4 * OF_AN_EXPERT) + 3 * H + 3
    assert lines[3] == f"mine: {total:,} parameters, of which a token meets {meets:,}."


def test_nothing_to_sum_up():
    with pytest.raises(ValueError, match="must have Mixture-of-Experts layers"):
        summary(functional(keras.layers.Dense(3), (T, H)), T)
    with pytest.raises(ValueError, match="be built"):
        summary(make_moe(), T)
