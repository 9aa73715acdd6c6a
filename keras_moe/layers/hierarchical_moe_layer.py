"""Mixture of Experts with two levels of routing."""

import keras

from keras_moe.kernels import ops
from keras_moe.layers.capacity_layer import CapacityMoeLayer
from keras_moe.losses import router_z_loss
from keras_moe.routers import MaskedRouter, Router, Top2MaskedRouter
from keras_moe.routing.dispatch import dispatch
from keras_moe.routing.placement import (
    assign_slots,
    compose_routings,
    selection_load,
)
from keras_moe.routing.values import Slots


@keras.saving.register_keras_serializable(package="keras_moe")
class HierarchicalMoeLayer(CapacityMoeLayer):
    """A Mixture-of-Experts layer with two levels of routing.

    The outer router dispatches tokens to groups of experts. The inner router, which has
    one gate per group, dispatches the tokens of each group to its experts. The combine
    weights of both levels are multiplied.

    A token whose combine weight for a group is at most 1/2 has no first choice there:
    its best expert counts as its second choice.

    Args:
        experts: layer as for `MoeLayer`, with `outer · inner` experts, those of the
            first group first.
        outer_router: `Router` that returns `Slots`, for the groups of experts.
        inner_router: `Top2MaskedRouter` without hidden layers, for the experts of a
            group. The routers must have different names.
        train_capacity_factor: float above 0, the capacity factor of both levels in
            training. The tokens of the inner level are the slots of the outer level.
            Defaults to 1.25.
        eval_capacity_factor: the same in inference. Defaults to 2.
        examples_per_group: see `MoeLayer`. Defaults to 1.
        min_expert_capacity: int, the smallest capacity on both levels. Defaults to 4.
        name: string.
        **kwargs: forwarded to `keras.layers.Layer`.

    Call arguments:
        inputs: `[batch, ..., h]`, of rank 2 or more.
        mask: see `MoeLayer`.
        training: bool.
        return_routing: bool, whether to return the routing, too.

    Returns:
        `[batch, ..., h]`; with `return_routing` a pair of this and `Slots` of all
        experts, whose `probs` divide the probability of a group evenly.

    Raises:
        ValueError: if arguments are out of range or incompatible.
        TypeError: if an argument has another type, or the outer router returns another
            routing than `Slots`.

    Example:

    ```python
    layer = keras_moe.HierarchicalMoeLayer(
        keras_moe.FeedForwardExperts(num_experts=8, d_ff=64),
        keras_moe.Top2MaskedRouter(2, name="outer"),
        keras_moe.Top2MaskedRouter(4, name="inner"),
    )
    layer(np.ones((2, 8, 16))).shape  # (2, 8, 16)
    ```

    Reference:
        [Shazeer et al., 2017](https://arxiv.org/abs/1701.06538), appendix B.
    """

    serialized_sublayers = ("experts", "outer_router", "inner_router")

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
                "`eval_capacity_factor`: the slots of the outer level are the tokens "
                "of the inner level. Received: "
                f"train_capacity_factor={train_capacity_factor}, "
                f"eval_capacity_factor={eval_capacity_factor}."
            )
        self._check_routers(outer_router, inner_router)
        inner_router.router_weights.num_gates = outer_router.num_experts
        self.outer_router = outer_router
        self.inner_router = inner_router

    def build(self, input_shape):
        super().build(input_shape)
        hidden = input_shape[-1]
        if not self.outer_router.built:
            self.outer_router.build((None, None, hidden))
        if not self.inner_router.built:
            outer = self.outer_router.num_experts
            self.inner_router.build((None, outer, None, hidden))
        self.restore_trainable()

    @property
    def experts_per_token(self):
        outer, inner = self.outer_router, self.inner_router
        groups = outer.experts_per_token
        if groups is None:
            return None
        # A group with a weight of at most 1/2 uses one expert; of weights that sum to
        # at most 1, only one is above.
        sums_to_1 = isinstance(outer, Top2MaskedRouter) or (
            isinstance(outer, MaskedRouter) and outer.weights_sum_to_at_most_1
        )
        important = 1 if sums_to_1 else groups
        return important * inner.experts_per_token + groups - important

    def count_slots(self, tokens, training):
        outer = self.capacity(tokens, self.outer_router, training)
        return self.num_experts * self.capacity(outer, self.inner_router, training)

    def compute_routing(self, tokens, mask, training, report=True):
        outer = self.call_router(self.outer_router, tokens, mask, training, report)
        if not isinstance(outer, Slots):
            raise TypeError(
                "`outer_router` must return `Slots`. "
                f"Received: {type(outer).__name__} from "
                f"{type(self.outer_router).__name__}."
            )
        inner = self._compute_inner_routing(tokens, outer, training, report)
        return compose_routings(outer, inner)

    def _compute_inner_routing(self, tokens, outer, training, report):
        """Returns `Slots` of the inner level, one group per outer buffer `[c]`."""
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
        first, both = router.select(probs, training, important)
        load = selection_load(first, router.num_experts)
        capacity = self.capacity(c, router, training)
        slots = assign_slots(both, probs, capacity, load=load)
        if report:
            self._report_inner(slots, first, important, logits, valid)
            slots = router.with_attached_losses(slots)
        return slots

    def _report_inner(self, slots, first, important, logits, valid):
        """Adds losses and metrics of the inner level.

        The balance loss is that of the important tokens, averaged over all slots of the
        outer level, including the empty ones.
        """
        router = self.inner_router
        c = ops.cast(ops.shape(valid)[1], "float32")
        chosen = ops.cast(ops.sum(first.expert_index >= 0, axis=(1, 2)), "float32")
        share = slots.load * ops.expand_dims(chosen / c, -1)
        probs = ops.where(ops.expand_dims(important, -1), slots.probs, 0.0)
        loss = ops.sum(ops.stop_gradient(share) * ops.sum(probs, axis=1) / c, axis=-1)
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
            raise ValueError("`inner_router` must not have hidden layers.")
        if inner_router.balance_scope != "group":
            raise ValueError(
                '`inner_router` must have `balance_scope="group"`. '
                f"Received: {inner_router.balance_scope!r}."
            )
        expected = outer_router.num_experts * inner_router.num_experts
        if expected != self.num_experts:
            raise ValueError(
                "`experts` must have as many experts as the groups together: "
                f"{outer_router.num_experts} groups of {inner_router.num_experts} are "
                f"{expected}. Received: {self.num_experts}."
            )

    def get_config(self):
        return {
            **super().get_config(),
            "outer_router": keras.saving.serialize_keras_object(self.outer_router),
            "inner_router": keras.saving.serialize_keras_object(self.inner_router),
        }
