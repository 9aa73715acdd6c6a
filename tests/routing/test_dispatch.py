import numpy as np
import pytest
from keras import ops

from keras_moe import RouterMask
from keras_moe.routing.dispatch import combine, dispatch
from keras_moe.routing.placement import assign_slots
from keras_moe.routing.selection import top_k

g, t, e, c, h = 3, 7, 4, 2, 5


@pytest.fixture
def slots(rng):
    probs = rng.dirichlet(np.ones(e), size=(g, t)).astype("float32")
    probs[1, :3] = 0
    probs = ops.convert_to_tensor(probs)
    return assign_slots(top_k(probs, 2), probs, c)


def to_numpy(x):
    return ops.convert_to_numpy(x)


def test_dispatch_gathers_the_tokens_of_the_slots(slots, rng):
    tokens = rng.normal(size=(g, t, h)).astype("float32")
    buffers = to_numpy(dispatch(ops.convert_to_tensor(tokens), slots))
    assert buffers.shape == (1, e, g * c, h)
    index = to_numpy(slots.token_index)
    for i, j, k in np.ndindex(g, e, c):
        token = index[i, j, k]
        expected = tokens[i, token] if token >= 0 else np.zeros(h)
        np.testing.assert_array_equal(buffers[0, j, i * c + k], expected)


def test_combine_sums_the_weighted_outputs(slots, rng):
    results = rng.normal(size=(1, e, g * c, h)).astype("float32")
    outputs = to_numpy(combine(ops.convert_to_tensor(results), slots))
    index, weight = to_numpy(slots.token_index), to_numpy(slots.weight)
    expected = np.zeros((g, t, h))
    for i, j, k in np.ndindex(g, e, c):
        if index[i, j, k] >= 0:
            expected[i, index[i, j, k]] += weight[i, j, k] * results[0, j, i * c + k]
    np.testing.assert_allclose(outputs, expected, rtol=1e-5, atol=1e-6)


def test_a_router_mask_is_equivalent_to_slots(slots, rng):
    dense = RouterMask(slots.dispatch_mask, slots.combine_array)
    tokens = ops.convert_to_tensor(rng.normal(size=(g, t, h)).astype("float32"))
    np.testing.assert_allclose(
        to_numpy(dispatch(tokens, dense)), to_numpy(dispatch(tokens, slots)), rtol=1e-6
    )
    results = ops.convert_to_tensor(rng.normal(size=(1, e, g * c, h)).astype("float32"))
    np.testing.assert_allclose(
        to_numpy(combine(results, dense)), to_numpy(combine(results, slots)), rtol=1e-5
    )


def test_combine_multiplies_in_float32(slots):
    results = ops.ones((1, e, g * c, h), dtype="bfloat16")
    outputs = combine(results, slots)
    assert "bfloat16" in str(outputs.dtype)
    expected = combine(ops.ones((1, e, g * c, h)), slots)
    np.testing.assert_array_equal(
        to_numpy(ops.cast(outputs, "float32")),
        to_numpy(ops.cast(ops.cast(expected, "bfloat16"), "float32")),
    )


def test_other_types_are_refused(slots):
    with pytest.raises(TypeError, match=r"`Slots`, `Rows` or a `RouterMask`.*tuple"):
        dispatch(ops.zeros((g, t, h)), (1, 2))
    with pytest.raises(TypeError, match=r"`Slots`, `Rows` or a `RouterMask`.*tuple"):
        combine(ops.zeros((1, e, g * c, h)), (1, 2))
