"""The router every router is: a gate, a choice, and what is said about it."""

import keras
from keras import ops

from keras_moe import checks
from keras_moe.gate import Gate
from keras_moe.losses import router_z_loss
from keras_moe.metrics import LayerMetrics, RoutingLog, routing_statistics
from keras_moe.routing import check_routing

# What a router's arguments and its gate's have in common.
GATE_ARGUMENTS = (
    "num_experts",
    "hidden_layers",
    "mechanism",
    "noise_std",
    "jitter_noise",
    "use_bias",
    "kernel_initializer",
    "bias_initializer",
)


class Router(LayerMetrics, keras.layers.Layer):
    """Abstract: decides which tokens go to which experts.

    A subclass says how in `compute_routing`; gate, losses and metrics are
    here. Everything is float32, whatever the dtype policy.

    Args:
        num_experts: int, the number of experts `e`.
        hidden_layers: see `Gate`, as the three that follow.
        mechanism: string.
        noise_std: float.
        jitter_noise: float.
        use_bias: bool, whether the gate has a bias.
        kernel_initializer: initializer of the gate's kernel;
            `TruncatedNormal(stddev=0.02)` by default.
        bias_initializer: initializer of the gate's bias.
        router_z_loss_weight: float, the weight of the z-loss, which is added
            in training and evaluation.
        export_metrics: `True`, `False`, or a tuple of names of `metric_names`. With
            `()` there are none, but `RoutingMonitor` still sees the router.
        name: string.
        **kwargs: forwarded to `keras.layers.Layer`.

    Call arguments:
        inputs: `[g, t, h]`, tokens in groups.
        expert_capacity: int, the slots of an expert for each group; `None` for
            no capacity, if `supports_dropless`.
        mask: bool `[g, t]`, false for a token to leave out, or `None`.
        training: bool.

    Attributes:
        log: a `RoutingLog`, `None` without metrics.

    Returns:
        `Slots`, `Rows` or a `RouterMask`.
    """

    metric_names = (
        "router_z_loss",
        "unscaled_router_z_loss",
        "load_balancing_loss",
        "fraction_tokens_left_behind",
        "router_confidence",
        "expert_usage",
    )
    load_balancing_loss_weight = 0.0
    # How many experts a token goes to at most; `None` where experts choose.
    experts_per_token = None
    # Before `__init__`, where Keras may already ask for `variables`.
    log = None
    # Whether `compute_routing` can do without an `expert_capacity`.
    supports_dropless = False

    def __init__(
        self,
        num_experts,
        *,
        hidden_layers=None,
        mechanism="softmax",
        noise_std=0.0,
        jitter_noise=0.0,
        use_bias=True,
        kernel_initializer=None,
        bias_initializer="zeros",
        router_z_loss_weight=0.0,
        export_metrics=True,
        name="router",
        **kwargs,
    ):
        super().__init__(name=name, export_metrics=export_metrics, **kwargs)
        if not isinstance(self.export_metrics, bool):
            unknown = set(self.export_metrics) - set(self.metric_names)
            if unknown:
                raise ValueError(
                    f"`export_metrics` must name metrics of {self.metric_names}. "
                    f"Received: {sorted(unknown)}."
                )
        self.router_z_loss_weight = checks.number(
            "router_z_loss_weight", router_z_loss_weight
        )
        self.router_weights = Gate(
            num_experts,
            hidden_layers=hidden_layers,
            mechanism=mechanism,
            noise_std=noise_std,
            jitter_noise=jitter_noise,
            use_bias=use_bias,
            kernel_initializer=kernel_initializer,
            bias_initializer=bias_initializer,
            name="router_weights",
        )
        for argument in GATE_ARGUMENTS:
            setattr(self, argument, getattr(self.router_weights, argument))
        if self.export_metrics is not False:
            self.log = RoutingLog(self.name, self.num_experts)
        self.input_spec = keras.InputSpec(ndim=3)
        self.supports_masking = True

    def build(self, input_shape):
        if not self.router_weights.built:
            self.router_weights.build(input_shape)

    def compute_routing(self, probs, expert_capacity, training=None):
        """Turns probabilities into a routing. To be overridden.

        It leaves no trace in the layer; metrics have their place in `report`.

        Args:
            probs: float32 `[g, t, e]`, what the gate says: 1 in sum for a
                valid token (but for a `"sigmoid"` gate), 0 for a masked one.
            expert_capacity: int `c`, or a scalar tensor where the number of
                tokens is not known; `None` for no capacity.
            training: bool.

        Returns:
            `Slots` or a `RouterMask`; `Rows` without a capacity.
        """
        raise NotImplementedError(
            f"{type(self).__name__} must implement "
            "`compute_routing(probs, expert_capacity, training)`."
        )

    def load_balancing_loss(self, routing):
        """The balance loss, unweighted; 0 for a router that needs none."""
        return ops.zeros((), dtype="float32")

    def call(self, inputs, *, expert_capacity, mask=None, training=None):
        routing, logits = self._decide(inputs, expert_capacity, mask, training)
        self.report(routing, logits, mask)
        return routing

    def route(self, inputs, *, expert_capacity, mask=None, training=False):
        """The routing alone: as `call`, but adds no loss and no metric."""
        inputs = ops.cast(inputs, self.compute_dtype)
        return self._decide(inputs, expert_capacity, mask, training)[0]

    def _decide(self, inputs, expert_capacity, mask, training):
        probs, logits = self.router_weights(
            inputs, training=training, return_logits=True
        )
        if mask is not None:
            probs = ops.where(ops.expand_dims(mask, -1), probs, 0.0)
        routing = self.compute_routing(probs, expert_capacity, training=training)
        check_routing(routing)
        return routing, logits

    def report(self, routing, logits, mask):
        """Adds losses and metrics. To be extended with metrics of one's own.

        `call` does it, `route` does not.

        Args:
            routing: what `compute_routing` returned.
            logits: float32 `[g, t, e]`.
            mask: bool `[g, t]`, or `None`.
        """
        groups, tokens, _ = ops.shape(logits)
        valid = groups * tokens if mask is None else ops.sum(ops.cast(mask, "float32"))
        self.add_losses_and_metrics(
            routing,
            z_loss=router_z_loss(logits, mask),
            balance_loss=self.load_balancing_loss(routing),
            valid=ops.cast(valid, "float32"),
        )

    def add_losses_and_metrics(self, routing, *, z_loss, balance_loss, valid):
        """Adds the losses with their weights, and the metrics.

        Args:
            routing: `Slots`, `Rows` or a `RouterMask`.
            z_loss: float32 scalar, unweighted.
            balance_loss: float32 scalar, unweighted.
            valid: float32 scalar, the number of tokens that are not masked.
        """
        self._add_weighted_loss(z_loss, self.router_z_loss_weight)
        self._add_weighted_loss(balance_loss, self.load_balancing_loss_weight)
        if self.export_metrics is False:
            return
        statistics = routing_statistics(routing, valid)
        self.add_metrics(
            {
                "router_z_loss": self.router_z_loss_weight * z_loss,
                "unscaled_router_z_loss": z_loss,
                "load_balancing_loss": balance_loss,
                **statistics,
            }
        )
        left_behind = statistics["fraction_tokens_left_behind"]
        self.log.update(routing, valid=valid, left_behind=left_behind, z_loss=z_loss)

    def _add_weighted_loss(self, loss, weight):
        if weight:
            # In the dtype of the task's loss, to which Keras adds it.
            self.add_loss(ops.cast(weight * loss, keras.config.floatx()))

    @property
    def running_state(self):
        return super().running_state + ([self.log.sums] if self.log else [])

    @property
    def metrics_prefix(self):
        """The path of the MoE layer, and the name if it is not `"router"`."""
        return super().metrics_prefix.removesuffix("/router")

    def get_config(self):
        gate = self.router_weights.get_config()
        return {
            **super().get_config(),
            **{name: gate[name] for name in GATE_ARGUMENTS},
            "router_z_loss_weight": self.router_z_loss_weight,
            "export_metrics": self.export_metrics,
        }
