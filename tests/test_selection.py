import numpy as np
import oracle
import pytest
from keras import ops

from keras_moe.selection import top_k, valid_tokens


def select(probs, *args, **kwargs):
    selection = top_k(
        ops.convert_to_tensor(np.array(probs, "float32")), *args, **kwargs
    )
    return tuple(ops.convert_to_numpy(part) for part in selection)


def test_a_table():
    probs = [[[0.5, 0.2, 0.3], [0.1, 0.8, 0.1], [0.0, 0.0, 0.0]]]
    index, weight = select(probs, 2)
    np.testing.assert_array_equal(index, [[[0, 2], [1, 0], [-1, -1]]])
    np.testing.assert_allclose(weight, [[[0.5, 0.3], [0.8, 0.1], [0, 0]]])


def test_normalized_weights_are_1_in_sum():
    _, weight = select([[[0.5, 0.2, 0.3], [0.0, 0.0, 0.0]]], 2, normalize=True)
    np.testing.assert_allclose(weight, [[[0.625, 0.375], [0, 0]]], rtol=1e-6)


def test_of_equals_the_lower_index_comes_first():
    index, _ = select(np.full((1, 5, 4), 0.25), 3)
    np.testing.assert_array_equal(index, np.tile([0, 1, 2], (1, 5, 1)))


@pytest.mark.parametrize("k", [1, 2, 5])
def test_against_the_oracle_on_tables_with_ties(k, rng):
    probs = rng.integers(0, 4, size=(3, 40, 5)) / 8 + 0.125
    index, weight = select(probs, k)
    for g in range(3):
        for t in range(40):
            expected = oracle.best(probs[g, t], k)
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
