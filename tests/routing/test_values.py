import numpy as np
import pytest
from keras import ops

from keras_moe import RouterMask, Slots

# Two groups of three tokens; two experts with two slots each.
SLOTS = Slots(
    token_index=np.array([[[0, 2], [2, -1]], [[-1, -1], [1, -1]]], "int32"),
    weight=np.array([[[0.5, 0.25], [0.75, 0]], [[0, 0], [1, 0]]], "float32"),
    probs=np.ones((2, 3, 2), "float32") / 2,
    load=np.ones((2, 2), "float32") / 2,
)


@pytest.fixture
def slots():
    return Slots(*(ops.convert_to_tensor(part) for part in SLOTS[:4]))


def expected_mask():
    mask = np.zeros((2, 3, 2, 2))
    for g, e, c in np.ndindex(2, 2, 2):
        if SLOTS.token_index[g, e, c] >= 0:
            mask[g, SLOTS.token_index[g, e, c], e, c] = 1
    return mask


def test_dense_arrays_of_slots(slots):
    mask = expected_mask()
    np.testing.assert_array_equal(ops.convert_to_numpy(slots.dispatch_mask), mask)
    np.testing.assert_array_equal(
        ops.convert_to_numpy(slots.combine_array), mask * SLOTS.weight[:, None]
    )


def test_slots_per_token(slots):
    expected = [[1, 0, 2], [0, 1, 0]]
    np.testing.assert_array_equal(ops.convert_to_numpy(slots.slots_per_token), expected)


def test_a_router_mask_has_the_properties_of_the_slots(slots):
    dense = RouterMask(slots.dispatch_mask, slots.combine_array)
    for name in ("weight", "assignments", "slots_per_token"):
        np.testing.assert_array_equal(
            ops.convert_to_numpy(getattr(dense, name)),
            ops.convert_to_numpy(getattr(slots, name)),
        )
