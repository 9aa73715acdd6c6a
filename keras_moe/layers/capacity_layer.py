"""The base class of layers with routers and a capacity."""

from keras_moe.kernels import as_size, ops
from keras_moe.layers.base_layer import BaseMoeLayer
from keras_moe.routing.grouping import expert_capacity
from keras_moe.utils import checks


class CapacityMoeLayer(BaseMoeLayer):
    """A Mixture-of-Experts layer with capacity factors. Abstract.

    Args:
        experts: see `BaseMoeLayer`.
        train_capacity_factor: float above 0, the capacity factor in training; `None`
            for no capacity.
        eval_capacity_factor: the same in inference.
        min_expert_capacity: int, the smallest capacity of an expert.
        **kwargs: see `BaseMoeLayer`.
    """

    def __init__(
        self,
        experts,
        *,
        train_capacity_factor,
        eval_capacity_factor,
        min_expert_capacity,
        **kwargs,
    ):
        super().__init__(experts, **kwargs)
        self.train_capacity_factor = checks.capacity_factor(
            "train_capacity_factor", train_capacity_factor
        )
        self.eval_capacity_factor = checks.capacity_factor(
            "eval_capacity_factor", eval_capacity_factor
        )
        self.min_expert_capacity = checks.whole_number(
            "min_expert_capacity", min_expert_capacity
        )

    def capacity(self, tokens, router, training):
        """Returns the capacity of an expert of a router for a group of `tokens`."""
        factor = self.train_capacity_factor if training else self.eval_capacity_factor
        if factor is None:
            return None
        return expert_capacity(
            tokens, router.num_experts, factor, self.min_expert_capacity
        )

    def call_router(self, router, tokens, mask, training, report, **kwargs):
        """Calls a router with its capacity, with or without losses and metrics."""
        call = router if report else router.route
        capacity = self.capacity(as_size(ops.shape(tokens)[1]), router, training)
        return call(
            tokens, expert_capacity=capacity, mask=mask, training=training, **kwargs
        )

    @property
    def is_dropless(self):
        """Whether there is no capacity in training, in inference, or in both."""
        return None in (self.train_capacity_factor, self.eval_capacity_factor)

    def get_config(self):
        return {
            **super().get_config(),
            "train_capacity_factor": self.train_capacity_factor,
            "eval_capacity_factor": self.eval_capacity_factor,
            "min_expert_capacity": self.min_expert_capacity,
        }
