import numpy as np
import oracle
import pytest
from keras import ops
from tables import check_slots, random_tables

from keras_moe import Slots
from keras_moe.routing.placement import (
    PRIORITIES,
    assign_slots,
    choose_tokens,
    compose_routings,
    selection_load,
)
from keras_moe.routing.selection import top_k


def numpy_slots(slots):
    return type(slots)(*(ops.convert_to_numpy(part) for part in slots))


def tokens_choose(probs, k, c, priority="choice"):
    probs = ops.convert_to_tensor(np.asarray(probs, "float32"))
    return numpy_slots(assign_slots(top_k(probs, k), probs, c, priority))


def experts_choose(probs, c):
    probs = ops.convert_to_tensor(np.asarray(probs, "float32"))
    return numpy_slots(choose_tokens(probs, c))


THREE_TOKENS = [[[0.7, 0.2, 0.1], [0.6, 0.3, 0.1], [0.5, 0.1, 0.4]]]


def test_top_1_table():
    # All tokens select expert 0, which has two slots.
    slots = tokens_choose(THREE_TOKENS, 1, 2)
    np.testing.assert_array_equal(slots.token_index, [[[0, 1], [-1, -1], [-1, -1]]])
    np.testing.assert_allclose(slots.weight, [[[0.7, 0.6], [0, 0], [0, 0]]])
    np.testing.assert_allclose(slots.load, [[1, 0, 0]])


def test_top_2_table():
    # Second choices: expert 1 for tokens 0 and 1, expert 2 for token 2.
    slots = tokens_choose(THREE_TOKENS, 2, 2)
    np.testing.assert_array_equal(slots.token_index, [[[0, 1], [0, 1], [2, -1]]])
    np.testing.assert_allclose(slots.weight, [[[0.7, 0.6], [0.2, 0.3], [0.4, 0]]])
    np.testing.assert_allclose(slots.load, [[3 / 6, 2 / 6, 1 / 6]])


def test_first_choices_have_priority():
    # Token 0's second choice is the first choice of tokens 1 and 2.
    probs = [[[0.6, 0.4], [0.1, 0.9], [0.2, 0.8]]]
    slots = tokens_choose(probs, 2, 2)
    np.testing.assert_array_equal(slots.token_index, [[[0, 1], [1, 2]]])


def test_masked_tokens_use_no_slots_and_empty_groups_have_no_load():
    probs = [[[0.0, 0.0], [0.9, 0.1]], [[0.0, 0.0], [0.0, 0.0]]]
    slots = tokens_choose(probs, 1, 2)
    np.testing.assert_array_equal(
        slots.token_index, [[[1, -1], [-1, -1]], [[-1, -1], [-1, -1]]]
    )
    np.testing.assert_allclose(slots.load, [[1, 0], [0, 0]])
    slots = experts_choose(probs, 2)
    np.testing.assert_array_equal(
        slots.token_index, [[[1, -1], [1, -1]], [[-1, -1], [-1, -1]]]
    )
    np.testing.assert_allclose(slots.weight, [[[0.9, 0], [0.1, 0]], [[0, 0], [0, 0]]])


def test_expert_choice_table():
    slots = experts_choose(THREE_TOKENS, 1)
    np.testing.assert_array_equal(slots.token_index, [[[0], [1], [2]]])
    np.testing.assert_allclose(slots.weight, [[[0.7], [0.3], [0.4]]])
    np.testing.assert_allclose(slots.load, [[1 / 3] * 3])


def test_a_nan_token_does_not_displace_others():
    probs = np.array(THREE_TOKENS)
    probs[0, 0] = np.nan
    slots = tokens_choose(probs, 1, 3)
    np.testing.assert_array_equal(slots.token_index[0, 0], [0, 1, 2])
    np.testing.assert_allclose(slots.weight[0, 0], [np.nan, 0.6, 0.5])
    np.testing.assert_array_equal(experts_choose(probs, 2).token_index[0, 0], [1, 2])


def test_token_priority_table():
    probs = [[[0.6, 0.4], [0.1, 0.9], [0.2, 0.8]]]
    slots = tokens_choose(probs, 2, 2, "token")
    np.testing.assert_array_equal(slots.token_index, [[[0, 1], [0, 1]]])


def test_probability_priority_table():
    slots = tokens_choose([[[0.6, 0.4], [0.9, 0.1], [0.8, 0.2]]], 1, 2, "probability")
    np.testing.assert_array_equal(slots.token_index, [[[1, 2], [-1, -1]]])
    np.testing.assert_allclose(slots.weight, [[[0.9, 0.8], [0, 0]]])


@pytest.mark.parametrize("priority", sorted({*PRIORITIES} - {"random"}))
@pytest.mark.parametrize("k", [1, 2, 3])
@pytest.mark.parametrize("c", [1, 4, 13])
@pytest.mark.parametrize("ties", [False, True])
def test_token_choice_matches_the_oracle(k, c, ties, priority, rng):
    probs, valid = random_tables(rng, ties)
    expected = [
        oracle.tokens_choose(probs[i], valid[i], k, c, priority=priority)
        for i in range(3)
    ]
    check_slots(tokens_choose(probs, k, c, priority), expected, c, rtol=1e-6)


@pytest.mark.parametrize("c", [1, 4, 13])
@pytest.mark.parametrize("ties", [False, True])
def test_expert_choice_matches_the_oracle(c, ties, rng):
    probs, valid = random_tables(rng, ties)
    expected = [oracle.experts_choose(probs[i], valid[i], c) for i in range(3)]
    check_slots(experts_choose(probs, c), expected, c, rtol=1e-6)


def test_selection_load():
    probs = ops.convert_to_tensor(np.array(THREE_TOKENS, "float32"))
    load = selection_load(top_k(probs, 2), 3)
    np.testing.assert_allclose(ops.convert_to_numpy(load), [[3 / 6, 2 / 6, 1 / 6]])


def test_compose_routings_table():
    """Two groups of two experts: inner slots index outer slots; weights multiply."""
    outer = Slots(
        token_index=np.array([[[3, 0], [1, -1]]], "int32"),
        weight=np.array([[[0.5, 1.0], [0.25, 0]]], "float32"),
        probs=np.array([[[0.5, 0.5], [0.2, 0.8], [0, 0], [1, 0]]], "float32"),
        load=np.array([[0.5, 0.5]], "float32"),
    )
    inner = Slots(
        token_index=np.array([[[1], [0]], [[0], [-1]]], "int32"),
        weight=np.array([[[0.4], [0.6]], [[1.0], [0]]], "float32"),
        probs=np.zeros((2, 2, 2), "float32"),
        load=np.zeros((2, 2), "float32"),
    )
    outer, inner = (
        Slots(*(ops.convert_to_tensor(part) for part in slots[:4]))
        for slots in (outer, inner)
    )
    slots = numpy_slots(compose_routings(outer, inner))
    np.testing.assert_array_equal(slots.token_index, [[[0], [3], [1], [-1]]])
    np.testing.assert_allclose(slots.weight, [[[0.4], [0.3], [0.25], [0]]])
    np.testing.assert_allclose(slots.probs[0, 1], [0.1, 0.1, 0.4, 0.4])
    np.testing.assert_allclose(slots.load, [[1 / 3, 1 / 3, 1 / 3, 0]])
