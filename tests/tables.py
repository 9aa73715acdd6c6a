"""Random tables of probabilities, and a comparison of `Slots` with the oracle."""

import numpy as np
import oracle
from keras import ops


def random_tables(rng, ties):
    """Returns probabilities `[g, t, e]`, 0 for masked tokens, and the valid tokens."""
    g, t, e = 3, 13, 6
    probs = oracle.softmax(rng.normal(size=(g, t, e)))
    if ties:
        probs = rng.integers(1, 4, size=(g, t, e)) / 16
    valid = rng.random((g, t)) < 0.8
    valid[1] = False
    return np.where(valid[..., None], probs, 0).astype("float32"), valid


def check_slots(slots, expected, c, rtol=1e-5):
    """Compares `Slots` with the oracle's slots and counts of each group."""
    slots = type(slots)(*(ops.convert_to_numpy(part) for part in slots))
    assert len(slots.token_index) == len(expected)
    for i, (group_slots, counts) in enumerate(expected):
        index, weight = oracle.as_arrays(group_slots, c)
        load = counts / max(counts.sum(), 1)
        np.testing.assert_array_equal(slots.token_index[i], index)
        np.testing.assert_allclose(slots.weight[i], weight, rtol=rtol)
        np.testing.assert_allclose(slots.load[i], load, rtol=rtol / 10)
