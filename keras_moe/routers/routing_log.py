"""The routing log: sums over batches that `RoutingMonitor` reads."""

import numpy as np
from keras import ops

from keras_moe.kernels.state import OwnedVariable


class RoutingLog:
    """Sums over batches of what a router did.

    This is not a Keras object, so Keras does not track the variable as a weight.

    Args:
        owner: the router.
        num_experts: int.
    """

    def __init__(self, owner, num_experts):
        self.sums = OwnedVariable(owner, "routing_log", (num_experts + 6,))

    def update(self, *, valid, left_behind, z_loss, largest, selected, load):
        """Adds a batch.

        Args:
            valid: float32 scalar, the number of valid tokens.
            left_behind: float32 scalar, the fraction of these without an expert.
            z_loss: float32 scalar, unweighted.
            largest: pair of float32 scalars, the result of `max_loads`.
            selected: float32 scalar, the number of selected experts.
            load: float32 `[e]`, the load of each expert in tokens.
        """
        figures = [valid, valid * left_behind, valid * z_loss, *largest, selected]
        self.sums.add(ops.concatenate([ops.stack(figures), load]))

    def read(self):
        """Returns a dict of the sums since the last `clear`, as numpy values."""
        sums = ops.convert_to_numpy(self.sums)
        tokens, left_behind, z_loss, max_load, groups, selected, *load = sums
        return {
            "tokens": tokens,
            "left_behind": left_behind,
            "z_loss": z_loss,
            "max_load": max_load,
            "groups": groups,
            "selected": selected,
            "load": np.array(load),
        }

    def clear(self):
        """Sets the sums to 0."""
        self.sums.assign(ops.zeros(self.sums.shape, dtype="float32"))
