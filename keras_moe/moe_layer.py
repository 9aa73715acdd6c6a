"""The Mixture-of-Experts layer: a router, and a capacity."""

import inspect
import warnings

import keras

from keras_moe import losses
from keras_moe.capacity_layer import CapacityMoeLayer
from keras_moe.kernels import XLA_COMPILES_ROWS
from keras_moe.routers import Router
from keras_moe.routing import check_has_probs
from keras_moe.serialization import with_parts


@keras.saving.register_keras_serializable(package="keras_moe")
class MoeLayer(CapacityMoeLayer):
    """A sparse Mixture-of-Experts layer.

    Each token goes to a few experts, and gets the sum of their results, each
    with the weight that the router gives it. A token whose experts are all
    full gets 0; put a residual connection around the layer.

    Args:
        experts: a layer with `num_experts` that maps `[g, e, c, h]` to the
            same shape, such as `FeedForwardExperts`.
        router: a `Router` with as many experts.
        train_capacity_factor: float above 0, the capacity in training. An
            expert has `round(factor · t / e)` slots for a group of `t` tokens,
            at least `min_expert_capacity` and at most `t`. Where tokens choose,
            it bounds what an expert takes; where experts choose, it is what
            each expert takes. `None`, where tokens choose: no capacity, so that
            no token is dropped, and each costs the experts it goes to.
        eval_capacity_factor: the same outside training.
        examples_per_group: how many examples of the batch are routed together:
            a whole number, one over a whole number (each example is cut into
            groups), or `None` for all. What does not fill its last group is
            filled up with masked tokens.
        min_expert_capacity: int, the least slots of an expert for a group.
        name: string.
        **kwargs: forwarded to `keras.layers.Layer`.

    Call arguments:
        inputs: `[batch, ..., h]`, of any rank from 2.
        mask: bool `[batch, ...]`, false for tokens that take no slot, get 0
            and count in no loss or metric; the mask of the inputs by default.
        training: bool.
        return_routing: bool.

    Returns:
        `[batch, ..., h]`; with `return_routing` a pair of this and the routing.

    Raises:
        ValueError: for arguments that do not fit together, inputs of rank 1,
            a mask of another shape, and groups of a single token.
        TypeError: for arguments of another type.

    Example:

    ```python
    inputs = keras.Input((128, 64))
    outputs = keras_moe.MoeLayer(
        keras_moe.FeedForwardExperts(num_experts=8, d_ff=256),
        keras_moe.MaskedRouter(num_experts=8),
        train_capacity_factor=1.25,
        eval_capacity_factor=2.0,
    )(inputs)
    model = keras.Model(inputs, inputs + outputs)
    ```
    """

    def __init__(
        self,
        experts,
        router,
        *,
        train_capacity_factor=1.0,
        eval_capacity_factor=1.0,
        examples_per_group=1.0,
        min_expert_capacity=1,
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
        self._check_router(router)
        if self.is_dropless:
            _check_dropless(experts, router)
            self.supports_jit = XLA_COMPILES_ROWS
        self.router = router
        self._warn_of_certain_drops()

    def build(self, input_shape):
        super().build(input_shape)
        if not self.router.built:
            self.router.build((None, None, input_shape[-1]))

    def decide(self, tokens, mask, training, report=True):
        return self.ask(self.router, tokens, mask, training, report)

    @property
    def experts_per_token(self):
        return self.router.experts_per_token

    def count_slots(self, tokens, training):
        capacity = self.capacity(tokens, self.router, training)
        return None if capacity is None else self.num_experts * capacity

    def balance_loss(self, routing):
        """The balance loss of a routing, unweighted.

        Args:
            routing: `Slots` or `Rows`, from `route` or a call with
                `return_routing`.

        Returns:
            A float32 scalar: 1 at balance, `e / k` when all tokens are sure of
            the same expert, 0 for no tokens.
        """
        check_has_probs(routing)
        return losses.load_balancing_loss(routing.probs, routing.load)

    def _check_router(self, router):
        if not isinstance(router, Router):
            raise TypeError(
                f"`router` must be a `Router`. Received: {type(router).__name__}."
            )
        if router.num_experts != self.num_experts:
            raise ValueError(
                "`experts` and `router` must have the same number of experts. "
                f"Received: {self.num_experts} and {router.num_experts}."
            )

    def _warn_of_certain_drops(self):
        k = getattr(self.router, "num_selected_experts", 0)
        factors = (self.train_capacity_factor, self.eval_capacity_factor)
        factor = min((f for f in factors if f is not None), default=k)
        if factor < k:
            warnings.warn(
                f"A capacity factor of {factor:g} is below the number of experts that "
                f"a token wants, {k}: some choices find no slot even at perfect "
                f"balance. Use factors of at least {k}.",
                stacklevel=3,
            )

    def get_config(self):
        return {
            **super().get_config(),
            "router": keras.saving.serialize_keras_object(self.router),
        }

    @classmethod
    def from_config(cls, config):
        return cls(**with_parts(config, "experts", "router"))


def _check_dropless(experts, router):
    if not router.supports_dropless:
        raise ValueError(
            f"{type(router).__name__} needs a capacity: where experts choose it is "
            "what each takes, and a router of one's own must say `supports_dropless`. "
            "Received: None as `train_capacity_factor` or `eval_capacity_factor`."
        )
    if "group_sizes" not in inspect.signature(experts.call).parameters:
        raise ValueError(
            "Without a capacity (None as `train_capacity_factor` or "
            "`eval_capacity_factor`), `experts` must take rows: "
            "`call(inputs, group_sizes=None)`, with inputs [rows, hidden] sorted by "
            f"expert. Received: {type(experts).__name__}."
        )
