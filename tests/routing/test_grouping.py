import numpy as np
import oracle
import pytest
from keras import ops

from keras_moe.routing.grouping import expert_capacity, group, ungroup

SHAPES = [(4, 6, 3), (5, 6, 3), (1, 1, 3), (3, 7, 3), (0, 4, 3)]
EXAMPLES = [1, 2, 3, 0.5, 1 / 3, 0.25, None]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("examples", EXAMPLES)
@pytest.mark.parametrize("masked", [False, True])
def test_groups_match_the_oracle(shape, examples, masked, rng):
    x = rng.normal(size=shape).astype("float32")
    mask = rng.random(shape[:2]) < 0.7 if masked else None
    tokens, valid = group(
        ops.convert_to_tensor(x),
        None if mask is None else ops.convert_to_tensor(mask),
        examples,
    )
    tokens = ops.convert_to_numpy(tokens)
    if valid is None:
        valid = np.ones(tokens.shape[:2], bool)
    valid = ops.convert_to_numpy(valid)
    expected = [g for g in oracle.groups(x, mask, examples) if g]
    for i, members in enumerate(expected):
        for j, member in enumerate(members):
            assert valid[i, j] == (mask is None or mask[member])
            np.testing.assert_array_equal(tokens[i, j], x[member] * valid[i, j])
    assert valid.sum() == (x[..., 0].size if mask is None else mask.sum())
    assert not tokens[~valid].any()


@pytest.mark.parametrize("shape", [*SHAPES, (6, 3), (2, 3, 2, 3)])
@pytest.mark.parametrize("examples", EXAMPLES)
def test_ungroup_is_the_inverse_of_group(shape, examples, rng):
    x = ops.convert_to_tensor(rng.normal(size=shape).astype("float32"))
    tokens, _ = group(x, None, examples)
    restored = ungroup(tokens, x, examples)
    np.testing.assert_array_equal(
        ops.convert_to_numpy(restored), ops.convert_to_numpy(x)
    )


def test_whole_groups_need_no_mask():
    x = ops.zeros((4, 6, 3))
    assert group(x, None, 1)[1] is None
    assert group(x, None, 2)[1] is None
    assert group(x, None, 0.5)[1] is None
    assert group(x, None, 3)[1] is not None


def test_masked_nonfinite_tokens_become_0():
    x = np.array([[[1.0], [np.nan], [np.inf]]], "float32")
    tokens, _ = group(ops.convert_to_tensor(x), np.array([[True, False, False]]), 1)
    np.testing.assert_array_equal(ops.convert_to_numpy(tokens), [[[1.0], [0.0], [0.0]]])


@pytest.mark.parametrize(
    ("t", "experts", "factor", "minimum", "capacity"),
    [
        (8, 4, 1.0, 1, 2),
        (8, 4, 1.25, 1, 2),  # 2.5 rounds to even
        (12, 8, 1.0, 1, 2),  # 1.5 rounds to even
        (4, 8, 1.0, 1, 1),  # 0.5 rounds to 0, but never below 1
        (4, 8, 0.1, 1, 1),
        (4, 2, 9.0, 1, 4),  # never above t
        (64, 8, 0.1, 4, 4),
        (2, 8, 0.1, 4, 2),
    ],
)
def test_capacity(t, experts, factor, minimum, capacity):
    assert expert_capacity(t, experts, factor, minimum) == capacity


def test_a_capacity_from_a_tensor_is_rounded_the_same():
    for experts in (3, 8, 64):
        for factor in (0.5, 1.0, 1.25, 2.0):
            for t in (1, 4, 7, 12, 100, 4094):
                capacity = expert_capacity(
                    ops.convert_to_tensor(t, "int32"), experts, factor, 1
                )
                assert int(capacity) == expert_capacity(t, experts, factor, 1)
