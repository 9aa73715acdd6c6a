"""Two levels: a choice among groups of experts, and one within each."""

import keras
from keras import ops

from keras_moe.capacity_layer import CapacityMoeLayer
from keras_moe.dispatch import dispatch
from keras_moe.losses import router_z_loss
from keras_moe.placement import compose, place, wanted_load
from keras_moe.routers import Router, Top2MaskedRouter
from keras_moe.serialization import with_parts


@keras.saving.register_keras_serializable(package="keras_moe")
class HierarchicalMoeLayer(CapacityMoeLayer):
    """A Mixture-of-Experts layer with two levels of routing.

    The outer router carries tokens to groups of experts. In each group the
    inner router, which has a gate of its own there, carries them on to the
    group's experts. A token that an outer expert holds with a weight of at
    most 1/2 is of lesser importance there: it is not given a first choice, and
    its best expert counts as its second choice.

    Args:
        experts: a layer as for `MoeLayer`, with `outer · inner` experts, those
            of the first group first.
        outer_router: a `Router` that returns `Slots`, for the groups.
        inner_router: a `Top2MaskedRouter`, for the experts of a group. The two
            routers need different names.
        train_capacity_factor: float above 0, of both levels: an expert of the
            inner level has slots for the slots of its group.
        eval_capacity_factor: the same outside training.
        examples_per_group: see `MoeLayer`.
        min_expert_capacity: int, the least slots on both levels.
        name: string.
        **kwargs: forwarded to `keras.layers.Layer`.

    Call arguments:
        inputs: `[batch, ..., h]`, of any rank from 2.
        mask: see `MoeLayer`.
        training: bool.
        return_routing: bool.

    Returns:
        `[batch, ..., h]`; with `return_routing` a pair of this and `Slots` of
        all experts, whose `probs` spread a group's probability evenly.

    Raises:
        ValueError: for arguments that do not fit together.
        TypeError: for arguments of another type.

    Reference:
        [Shazeer et al., 2017](https://arxiv.org/abs/1701.06538), appendix B.
    """

    def __init__(
        self,
        experts,
        outer_router,
        inner_router,
        *,
        train_capacity_factor=1.25,
        eval_capacity_factor=2.0,
        examples_per_group=1.0,
        min_expert_capacity=4,
        name=None,
        **kwargs,
    ):
        super().__init__(
            experts,
            train_capacity_factor=train_capacity_factor,
            eval_capacity_factor=eval_capacity_factor,
            examples_per_group=examples_per_group,
            min_expert_capacity=min_expert_capacity,
            name=name,
            **kwargs,
        )
        if self.is_dropless:
            raise ValueError(
                "Two levels of routing need a capacity, `train_capacity_factor` and "
                "`eval_capacity_factor`: an inner expert has slots for the slots of "
                "its group. Received: "
                f"train_capacity_factor={train_capacity_factor}, "
                f"eval_capacity_factor={eval_capacity_factor}."
            )
        self._check_routers(outer_router, inner_router)
        self.outer_router = outer_router
        self.inner_router = inner_router

    def build(self, input_shape):
        super().build(input_shape)
        hidden = input_shape[-1]
        if not self.outer_router.built:
            self.outer_router.build((None, None, hidden))
        if not self.inner_router.built:
            outer = self.outer_router.num_experts
            self.inner_router.router_weights.num_gates = outer
            self.inner_router.build((None, outer, None, hidden))

    @property
    def experts_per_token(self):
        outer = self.outer_router.experts_per_token
        return outer and outer * self.inner_router.experts_per_token

    def count_slots(self, tokens, training):
        outer = self.capacity(tokens, self.outer_router, training)
        return self.num_experts * self.capacity(outer, self.inner_router, training)

    def decide(self, tokens, mask, training, report=True):
        outer = self.ask(self.outer_router, tokens, mask, training, report)
        inner = self._decide_inner(tokens, outer, training, report)
        return compose(outer, inner)

    def _decide_inner(self, tokens, outer, training, report):
        """`Slots` with a group for each slot buffer `c` of the outer level."""
        router = self.inner_router
        groups, n, c = ops.shape(outer.token_index)
        buffers = dispatch(tokens, outer)  # 1 n g·c h
        buffers = ops.reshape(buffers, (n, groups, c, ops.shape(tokens)[2]))
        probs, logits = router.router_weights(
            ops.transpose(buffers, (1, 0, 2, 3)), training=training, return_logits=True
        )
        probs, logits = (
            ops.reshape(x, (groups * n, c, router.num_experts)) for x in (probs, logits)
        )
        weight = ops.reshape(outer.weight, (groups * n, c))
        valid = ops.reshape(outer.token_index >= 0, (groups * n, c))
        important = ops.logical_and(valid, weight > 0.5)
        probs = ops.where(ops.expand_dims(valid, -1), probs, 0.0)
        first, both = router.choose(probs, training, important)
        slots = place(both, probs, self.capacity(c, router, training))
        slots = slots._replace(load=wanted_load(first, router.num_experts))
        if report:
            self._report_inner(slots, first, important, logits, valid)
        return slots

    def _report_inner(self, slots, first, important, logits, valid):
        """Losses and metrics of the inner level.

        The balance loss is that of the important tokens, in means over all
        slots of the outer level, empty ones too.
        """
        router = self.inner_router
        c = ops.cast(ops.shape(valid)[1], "float32")
        chosen = ops.cast(ops.sum(first.expert_index >= 0, axis=(1, 2)), "float32")
        share = slots.load * ops.expand_dims(chosen / c, -1)
        liked = ops.where(ops.expand_dims(important, -1), slots.probs, 0.0)
        loss = ops.sum(ops.stop_gradient(share) * ops.sum(liked, axis=1) / c, axis=-1)
        router.add_losses_and_metrics(
            slots,
            z_loss=router_z_loss(logits, valid),
            balance_loss=router.num_experts * ops.mean(loss),
            valid=ops.sum(ops.cast(valid, "float32")),
        )

    def _check_routers(self, outer_router, inner_router):
        if not isinstance(outer_router, Router):
            raise TypeError(
                "`outer_router` must be a `Router`. "
                f"Received: {type(outer_router).__name__}."
            )
        if not isinstance(inner_router, Top2MaskedRouter):
            raise TypeError(
                "`inner_router` must be a `Top2MaskedRouter`. "
                f"Received: {type(inner_router).__name__}."
            )
        if outer_router.name == inner_router.name:
            raise ValueError(
                "`outer_router` and `inner_router` must have different names. "
                f"Received: {outer_router.name!r} for both."
            )
        if inner_router.router_weights.hidden_layers:
            raise ValueError("`inner_router` cannot have hidden layers.")
        wanted = outer_router.num_experts * inner_router.num_experts
        if wanted != self.num_experts:
            raise ValueError(
                f"{outer_router.num_experts} groups of {inner_router.num_experts} "
                f"experts are {wanted}. Received: {self.num_experts} `experts`."
            )

    def get_config(self):
        return {
            **super().get_config(),
            "outer_router": keras.saving.serialize_keras_object(self.outer_router),
            "inner_router": keras.saving.serialize_keras_object(self.inner_router),
        }

    @classmethod
    def from_config(cls, config):
        return cls(**with_parts(config, "experts", "outer_router", "inner_router"))
