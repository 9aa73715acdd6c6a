"""The Mixture-of-Experts layer: experts and a router."""

import inspect
import warnings

import keras

from keras_moe import losses
from keras_moe.kernels import XLA_COMPILES_ROWS
from keras_moe.layers.capacity_layer import CapacityMoeLayer
from keras_moe.routers import Router
from keras_moe.routers.gate import UnquantizedDense
from keras_moe.routing.values import check_has_probs
from keras_moe.utils import checks, initializers


@keras.saving.register_keras_serializable(package="keras_moe")
class MoeLayer(CapacityMoeLayer):
    """A sparse Mixture-of-Experts layer.

    The router dispatches each token to a few experts. The output of a token is the sum
    of its experts' outputs, multiplied by the router's combine weights.

    With a capacity factor, an expert has `round(factor · t / e)` slots for a group of
    `t` tokens, and assignments beyond that are dropped. A token whose assignments are
    all dropped gets 0, so put a residual connection around the layer. With a factor of
    `None` there is no capacity, and nothing is dropped (dropless).

    The dtype policy of this layer does not change those of `experts` and `router`: pass
    `dtype` to the experts, too, or set a global policy.

    Args:
        experts: layer with `num_experts` that maps `[g, e, c, h]` to the same shape,
            such as `FeedForwardExperts`.
        router: `Router` with the same number of experts.
        train_capacity_factor: float above 0, the capacity factor in training; `None`
            for no capacity, where tokens choose. Defaults to 1.
        eval_capacity_factor: the same in inference. Defaults to 1.
        examples_per_group: float, the number of examples that are routed together: n;
            1/n, with which each example is split into n groups; or `None` for the whole
            batch. A group that is not full is padded with masked tokens. Defaults to 1.
        min_expert_capacity: int, the smallest capacity of an expert. The largest is
            `t`. Defaults to 1.
        weighted_inputs: bool, whether the combine weights multiply the experts' inputs
            instead of their outputs. Defaults to `False`.
        latent_dim: int, the size to which tokens are projected before the experts; the
            sum of the experts' outputs is projected back. The router reads the tokens
            themselves. Defaults to `None`, no projections.
        name: string.
        **kwargs: forwarded to `keras.layers.Layer`.

    Call arguments:
        inputs: `[batch, ..., h]`, of rank 2 or more.
        mask: bool `[batch, ...]`, false for a masked token. Masked tokens take no slot,
            get 0, and do not count in losses and metrics. Defaults to the Keras mask of
            the inputs.
        training: bool.
        return_routing: bool, whether to return the routing, too.
        router_inputs: `[batch, ..., h]`, what the router reads. Defaults to the inputs.
        expert_index: int `[batch, ..., k]` or in groups `[g, t, k]`, the experts of
            each token, used instead of those that the router selects, such as
            `expert_index` of another call's routing; -1 for no expert. The combine
            weights are still those of the router. Defaults to `None`.

    Returns:
        `[batch, ..., h]`; with `return_routing` a pair of this and the routing.

    Raises:
        ValueError: if arguments are out of range or incompatible, for inputs of rank 1,
            for a mask of another shape, and for groups of a single token.
        TypeError: if an argument has another type.

    Example:

    ```python
    inputs = keras.Input((128, 64))
    moe = keras_moe.MoeLayer(
        keras_moe.FeedForwardExperts(num_experts=8, d_ff=256),
        keras_moe.MaskedRouter(num_experts=8, num_selected_experts=2),
        train_capacity_factor=None,
        eval_capacity_factor=None,
    )
    model = keras.Model(inputs, inputs + moe(inputs))
    ```

    Reference:
        [Shazeer et al., 2017](https://arxiv.org/abs/1701.06538), equation 1;
        [Fedus et al., 2021](https://arxiv.org/abs/2101.03961), section 2.2, for the
        capacity;
        [Elango et al., 2026](https://arxiv.org/abs/2601.18089) for `latent_dim`.
    """

    serialized_sublayers = ("experts", "router")
    supports_replay = True

    def __init__(
        self,
        experts,
        router,
        *,
        train_capacity_factor=1.0,
        eval_capacity_factor=1.0,
        examples_per_group=1.0,
        min_expert_capacity=1,
        weighted_inputs=False,
        latent_dim=None,
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
            _check_supports_dropless(experts, router)
            self.supports_jit = XLA_COMPILES_ROWS
        self.router = router
        self.weighted_inputs = checks.boolean("weighted_inputs", weighted_inputs)
        if latent_dim is not None:
            self.latent_dim = checks.whole_number("latent_dim", latent_dim)
        self._warn_if_balanced_load_is_dropped()

    def build(self, input_shape):
        super().build(input_shape)
        if not self.router.built:
            self.router.build((None, None, input_shape[-1]))
        for dense in getattr(self.experts, "dense_layers", []):
            dense.takes_rows = self.is_dropless
        if self.latent_dim is not None:
            hidden = input_shape[-1]
            self.latent_input = self._projection(
                "latent_input", hidden, self.latent_dim
            )
            self.latent_output = self._projection(
                "latent_output", self.latent_dim, hidden
            )
        self.restore_trainable()

    def _projection(self, name, size, units):
        layer = UnquantizedDense(
            units,
            use_bias=False,
            kernel_initializer=initializers.get("kernel_initializer", None),
            dtype=self.dtype_policy,
            name=name,
        )
        layer.build((None, size))
        return layer

    def _call_experts(self, tokens, routing, training):
        if self.latent_dim is None:
            return super()._call_experts(tokens, routing, training)
        latent = self.latent_input(tokens)
        return self.latent_output(super()._call_experts(latent, routing, training))

    def compute_routing(self, tokens, mask, training, report=True, **kwargs):
        return self.call_router(self.router, tokens, mask, training, report, **kwargs)

    @property
    def experts_per_token(self):
        return self.router.experts_per_token

    def count_slots(self, tokens, training):
        capacity = self.capacity(tokens, self.router, training)
        return None if capacity is None else self.num_experts * capacity

    def balance_loss(self, routing):
        """Returns the unweighted load-balancing loss of a routing.

        Args:
            routing: `Slots` or `Rows`, from `route` or a call with `return_routing`.

        Returns:
            A float32 scalar: 1 for a balanced load, `e / k` if all tokens select the
            same experts with certainty, 0 for no tokens.
        """
        check_has_probs(routing)
        scope = getattr(self.router, "balance_scope", "group")
        return losses.load_balancing_loss(
            routing.probs, routing.load, per_group=scope == "group"
        )

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

    def _warn_if_balanced_load_is_dropped(self):
        if self.min_expert_capacity > 1:
            return  # The capacity may be larger.
        k = self.router.min_experts_per_token or 0
        factors = (self.train_capacity_factor, self.eval_capacity_factor)
        factor = min((f for f in factors if f is not None), default=k)
        if factor < k:
            warnings.warn(
                f"A capacity factor of {factor:g} is below the number of experts per "
                f"token, {k}: some assignments are dropped even if the load is "
                f"balanced. Use capacity factors of at least {k}, or `None` for no "
                "capacity.",
                stacklevel=3,
            )

    def get_config(self):
        return {
            **super().get_config(),
            "router": keras.saving.serialize_keras_object(self.router),
            "weighted_inputs": self.weighted_inputs,
            "latent_dim": self.latent_dim,
        }


def _check_supports_dropless(experts, router):
    if not router.supports_dropless:
        raise ValueError(
            f"{type(router).__name__} needs a capacity: where experts choose, the "
            "capacity is what each selects, and a custom router must set "
            "`supports_dropless = True`. "
            "Received: None as `train_capacity_factor` or `eval_capacity_factor`."
        )
    if "group_sizes" not in inspect.signature(experts.call).parameters:
        raise ValueError(
            "Without a capacity (None as `train_capacity_factor` or "
            "`eval_capacity_factor`), `experts` must accept rows: "
            "`call(inputs, group_sizes=None)`, with inputs [rows, hidden] sorted by "
            f"expert. Received: {type(experts).__name__}."
        )
