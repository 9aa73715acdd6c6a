"""What Mixture-of-Experts layers with routers and a capacity share."""

from keras import ops

from keras_moe import checks
from keras_moe.base_layer import BaseMoeLayer
from keras_moe.grouping import expert_capacity
from keras_moe.kernels import as_size


class CapacityMoeLayer(BaseMoeLayer):
    """Abstract: experts have slots, more or fewer in training.

    Args:
        experts: see `BaseMoeLayer`.
        train_capacity_factor: float above 0, the capacity in training; `None`
            for no capacity.
        eval_capacity_factor: the same outside training.
        min_expert_capacity: int, the least slots of an expert for a group.
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
        """The slots of an expert of `router` for a group of so many tokens."""
        factor = self.train_capacity_factor if training else self.eval_capacity_factor
        if factor is None:
            return None
        return expert_capacity(
            tokens, router.num_experts, factor, self.min_expert_capacity
        )

    def ask(self, router, tokens, mask, training, report):
        """What a router decides, with or without losses and metrics."""
        decide = router if report else router.route
        return decide(
            tokens,
            expert_capacity=self.capacity(
                as_size(ops.shape(tokens)[1]), router, training
            ),
            mask=mask,
            training=training,
        )

    @property
    def is_dropless(self):
        """Whether there is no capacity, in training or outside it."""
        return None in (self.train_capacity_factor, self.eval_capacity_factor)

    def get_config(self):
        return {
            **super().get_config(),
            "train_capacity_factor": self.train_capacity_factor,
            "eval_capacity_factor": self.eval_capacity_factor,
            "min_expert_capacity": self.min_expert_capacity,
        }
