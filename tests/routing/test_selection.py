import numpy as np
import oracle
import pytest
from keras import ops

from keras_moe.routing.selection import (
    next_best,
    top_k,
    valid_tokens,
    within_best_groups,
)


def select(probs, *args, **kwargs):
    selection = top_k(
        ops.convert_to_tensor(np.array(probs, "float32")), *args, **kwargs
    )
    return tuple(ops.convert_to_numpy(part) for part in selection)


def test_top_k_table():
    probs = [[[0.5, 0.2, 0.3], [0.1, 0.8, 0.1], [0.0, 0.0, 0.0]]]
    index, weight = select(probs, 2)
    np.testing.assert_array_equal(index, [[[0, 2], [1, 0], [-1, -1]]])
    np.testing.assert_allclose(weight, [[[0.5, 0.3], [0.8, 0.1], [0, 0]]])


def test_normalized_weights_sum_to_1():
    _, weight = select([[[0.5, 0.2, 0.3], [0.0, 0.0, 0.0]]], 2, normalize=True)
    np.testing.assert_allclose(weight, [[[0.625, 0.375], [0, 0]]], rtol=1e-6)


def test_ties_go_to_the_lower_index():
    index, _ = select(np.full((1, 5, 4), 0.25), 3)
    np.testing.assert_array_equal(index, np.tile([0, 1, 2], (1, 5, 1)))


@pytest.mark.parametrize("k", [1, 2, 5])
def test_top_k_matches_the_oracle_with_ties(k, rng):
    probs = rng.integers(0, 4, size=(3, 40, 5)) / 8 + 0.125
    index, weight = select(probs, k)
    for g in range(3):
        for t in range(40):
            expected = oracle.top_k(probs[g, t], k)
            assert list(index[g, t]) == expected
            np.testing.assert_allclose(weight[g, t], probs[g, t][expected])


def test_a_nan_token_is_valid_and_keeps_its_nan():
    probs = [[[np.nan, np.nan], [0.2, 0.8]]]
    index, weight = select(probs, 1)
    np.testing.assert_array_equal(index, [[[0], [1]]])
    np.testing.assert_allclose(weight, [[[np.nan], [0.8]]])


def test_valid_tokens():
    probs = ops.convert_to_tensor([[[0.5, 0.5], [0.0, 0.0], [np.nan, np.nan]]])
    np.testing.assert_array_equal(
        ops.convert_to_numpy(valid_tokens(probs)), [[True, False, True]]
    )


def test_scores_select_and_probabilities_are_the_weights():
    probs = ops.convert_to_tensor(np.array([[[0.5, 0.2, 0.3]]], "float32"))
    scores = ops.convert_to_tensor(np.array([[[-np.inf, 5.0, 4.0]]], "float32"))
    selection = top_k(probs, 2, scores=scores)
    np.testing.assert_array_equal(selection.expert_index, [[[1, 2]]])
    np.testing.assert_allclose(selection.weight, [[[0.2, 0.3]]])
    # An expert with a score of -inf is never selected.
    selection = top_k(probs, 3, normalize=True, scores=scores)
    np.testing.assert_array_equal(selection.expert_index, [[[1, 2, -1]]])
    np.testing.assert_allclose(selection.weight, [[[0.4, 0.6, 0.0]]], rtol=1e-6)


def test_next_best_table():
    # All tokens rank the experts 0, 1, 2; each expert has one slot.
    probs = np.array([[[0.5, 0.3, 0.2]] * 4], "float32")
    selection = next_best(ops.convert_to_tensor(probs), 1, 1)
    np.testing.assert_array_equal(selection.expert_index, [[[0], [1], [2], [-1]]])
    np.testing.assert_allclose(selection.weight, [[[0.5], [0.3], [0.2], [0]]])


@pytest.mark.parametrize("k", [1, 2, 3])
@pytest.mark.parametrize("c", [1, 3, 20])
def test_next_best_matches_sequential_assignment(k, c, rng):
    g, t, e = 6, 20, 5
    probs = rng.integers(1, 6, size=(g, t, e)).astype("float32") / 32
    valid = rng.random((g, t)) < 0.8
    probs[~valid] = 0
    found = next_best(ops.convert_to_tensor(probs), k, c, normalize=True)
    index = ops.convert_to_numpy(found.expert_index)
    weight = ops.convert_to_numpy(found.weight)
    for i in range(g):
        expected = {}
        for expert, row in enumerate(oracle.next_best(probs[i], valid[i], k, c, True)):
            for token, w in row:
                expected[token, expert] = w
        assigned = {
            (token, index[i, token, choice]): weight[i, token, choice]
            for token in range(t)
            for choice in range(k)
            if index[i, token, choice] >= 0
        }
        assert assigned == pytest.approx(expected)


def test_within_best_groups_table():
    # Groups (0, 1), (2, 3), (4, 5); the two with the best sums are kept.
    scores = ops.convert_to_tensor(
        np.array([[[0.9, 0.0, 0.5, 0.5, 0.4, 0.3]]], "float32")
    )
    kept = ops.convert_to_numpy(within_best_groups(scores, 3, 2))
    np.testing.assert_allclose(kept, [[[0.9, 0.0, 0.5, 0.5, -np.inf, -np.inf]]])
