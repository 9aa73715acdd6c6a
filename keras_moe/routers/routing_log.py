"""The routing log: sums over batches that `RoutingMonitor` reads."""

import numpy as np

from keras_moe.kernels import ops
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

    def update(self, sums, z_loss):
        """Adds a batch.

        Args:
            sums: `RoutingSums`.
            z_loss: float32 scalar, unweighted.
        """
        figures = [
            sums.valid,
            sums.left_behind,
            sums.valid * z_loss,
            sums.max_load,
            sums.groups,
            sums.selected,
        ]
        self.sums.add(ops.concatenate([ops.stack(figures), sums.load]))

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
