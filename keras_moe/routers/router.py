"""The base class of routers: a gate, a routing, and its losses and metrics."""

import keras

from keras_moe.kernels import ops
from keras_moe.kernels.state import LossOutlet
from keras_moe.losses import load_loss, router_z_loss
from keras_moe.metrics import LayerMetrics
from keras_moe.routers.gate import Gate
from keras_moe.routers.routing_log import RoutingLog
from keras_moe.routing.statistics import routing_ratios, routing_sums
from keras_moe.routing.values import RouterMask, check_routing, with_expert_index
from keras_moe.utils import checks
from keras_moe.utils.composite import CompositeLayer

# The arguments that a router passes on to its gate.
GATE_ARGUMENTS = (
    "num_experts",
    "hidden_layers",
    "mechanism",
    "noise_std",
    "jitter_noise",
    "input_norm_epsilon",
    "use_bias",
    "kernel_initializer",
    "bias_initializer",
)

# Names of other packages for arguments of routers.
HINTS = {
    **dict.fromkeys(("top_k", "k", "num_experts_per_tok"), "`num_selected_experts`"),
    **dict.fromkeys(("loss_coef", "aux_loss_coef"), "`load_balancing_loss_weight`"),
    "capacity_factor": "`train_capacity_factor`, `eval_capacity_factor` of `MoeLayer`",
}


class Router(LayerMetrics, CompositeLayer):
    """Decides which experts process each token. Abstract.

    A subclass implements `compute_routing`. The gate, the losses and the metrics are
    provided here. Routing is float32 under every dtype policy.

    Args:
        num_experts: int, the number of experts `e`.
        hidden_layers: int or list of ints, the sizes of ReLU layers in the gate.
            Defaults to `None`, no hidden layers.
        mechanism: string, see `Gate`. Defaults to `"softmax"`.
        noise_std: float, the standard deviation of Gaussian noise added to the logits
            in training; or `"learned"`, see `Gate`. Defaults to 0.
        jitter_noise: float in [0, 1), the range of the noise by which the gate's inputs
            are multiplied in training. Defaults to 0.
        input_norm_epsilon: float; the gate's inputs are RMS-normalized with this
            epsilon, see `Gate`. Defaults to `None`, no normalization.
        use_bias: bool, whether the gate has a bias. Defaults to `True`.
        kernel_initializer: initializer of the gate's kernel. Defaults to `None`,
            `TruncatedNormal(stddev=0.02)`.
        bias_initializer: initializer of the gate's bias. Defaults to `"zeros"`.
        router_z_loss_weight: float, the weight of the z-loss, which is added in
            training and evaluation. Defaults to 0.
        export_metrics: `True`; `False`; or a tuple of names from `metric_names`. With
            `()` no metric is exported, but `RoutingMonitor` still sees the router.
            Defaults to `True`.
        name: string. Defaults to `"router"`.
        **kwargs: forwarded to `keras.layers.Layer`.

    Call arguments:
        inputs: `[g, t, h]`, tokens in groups.
        expert_capacity: int, the number of slots of an expert for each group; `None`
            for no capacity, if `supports_dropless`.
        mask: bool `[g, t]`, false for a masked token, or `None`.
        training: bool.
        expert_index: int `[g, t, k]`, the experts of each token, used instead of those
            that the router selects; -1 for no expert. The combine weights are still
            those of the router. Defaults to `None`.

    Returns:
        `Slots`, `Rows` or a `RouterMask`.

    Attributes:
        router_weights: the `Gate`.
        log: the `RoutingLog` that `RoutingMonitor` reads; `None` with
            `export_metrics=False`.
        metric_names: tuple of the names that `export_metrics` accepts.
        experts_per_token: int, the largest number of experts of a token; `None` if a
            token may have any number, as where experts choose. A subclass sets it.
        min_experts_per_token: int, the smallest number, before any is dropped; the
            same as `experts_per_token` unless a subclass sets it.
        supports_dropless: bool, whether `compute_routing` accepts `None` as
            `expert_capacity`. A subclass sets it. Defaults to `False`.
        load_balancing_loss_weight: float, the weight of `load_balancing_loss`. Defaults
            to 0.
        load_loss_weight: float, the weight of `keras_moe.losses.load_loss`, which is
            added in training. It needs a gate with noise. Defaults to 0.

    Example:

    ```python
    class FirstChoice(keras_moe.Router):
        experts_per_token = 1

        def compute_routing(self, probs, expert_capacity, training=None):
            selection = keras_moe.routing.top_k(probs, 1)
            return keras_moe.routing.assign_slots(selection, probs, expert_capacity)
    ```
    """

    metric_names = (
        "router_z_loss",
        "unscaled_router_z_loss",
        "load_balancing_loss",
        "fraction_tokens_left_behind",
        "router_confidence",
        "expert_usage",
        "max_load",
    )
    load_balancing_loss_weight = 0.0
    load_loss_weight = 0.0
    experts_per_token = None
    supports_dropless = False
    # Set before `__init__`, where Keras may read `variables`.
    log = None
    # Whether what is reported is that of a training step.
    _is_training = False

    def __init__(
        self,
        num_experts,
        *,
        hidden_layers=None,
        mechanism="softmax",
        noise_std=0.0,
        jitter_noise=0.0,
        input_norm_epsilon=None,
        use_bias=True,
        kernel_initializer=None,
        bias_initializer="zeros",
        router_z_loss_weight=0.0,
        export_metrics=True,
        name="router",
        **kwargs,
    ):
        checks.no_foreign_arguments(self, kwargs, HINTS)
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
            input_norm_epsilon=input_norm_epsilon,
            use_bias=use_bias,
            kernel_initializer=kernel_initializer,
            bias_initializer=bias_initializer,
            name="router_weights",
        )
        for argument in GATE_ARGUMENTS:
            setattr(self, argument, getattr(self.router_weights, argument))
        if self.export_metrics is not False:
            self.log = RoutingLog(self, self.num_experts)
        self._losses_outlet = LossOutlet(self)
        self.input_spec = keras.InputSpec(ndim=3)
        self.supports_masking = True

    @property
    def min_experts_per_token(self):
        return self.experts_per_token

    def build(self, input_shape):
        if not self.router_weights.built:
            self.router_weights.build(input_shape)
        self.restore_trainable()

    def compute_routing(self, probs, expert_capacity, training=None):
        """Turns probabilities into a routing. Subclasses must override it.

        It runs in `call` and in `route`, so it must not add losses or metrics: these
        belong in `report`.

        Args:
            probs: float32 `[g, t, e]`, the router probabilities: 1 in sum for a valid
                token (except with a `"sigmoid"` gate), 0 for a masked one.
            expert_capacity: int `c`, or a scalar tensor if the number of tokens is
                unknown; `None` for no capacity.
            training: bool.

        Returns:
            `Slots` or a `RouterMask`; `Rows` without a capacity.
        """
        raise NotImplementedError(
            f"{type(self).__name__} must implement "
            "`compute_routing(probs, expert_capacity, training)`."
        )

    def replay_routing(self, probs, expert_index, expert_capacity, training=None):
        """Turns given experts into a routing, with weights of their probabilities.

        A subclass that can do so overrides it.

        Args:
            probs: see `compute_routing`.
            expert_index: int `[g, t, k]`; -1 for no expert.
            expert_capacity: see `compute_routing`.
            training: bool.

        Returns:
            `Slots` or a `RouterMask`; `Rows` without a capacity.
        """
        raise ValueError(
            f"{type(self).__name__} does not support a given `expert_index`."
        )

    def load_balancing_loss(self, routing):
        """Returns the unweighted balance loss; 0 for a router without one."""
        return ops.zeros((), dtype="float32")

    def call(
        self, inputs, *, expert_capacity, mask=None, training=None, expert_index=None
    ):
        routing, logits, *noise = self._route(
            inputs, expert_capacity, mask, training, expert_index
        )
        self._is_training = bool(training)
        self.report(routing, logits, mask)
        self._is_training = False
        if training and self.load_loss_weight:
            loss = load_loss(logits, *noise, self.experts_per_token, mask)
            self._add_weighted_loss(loss, self.load_loss_weight)
        return self.with_attached_losses(routing)

    def rematerialized_call(self, layer_call, *args, **kwargs):
        return layer_call  # It keeps little, and losses and state stay in reach.

    def add_loss(self, loss):
        """Adds a scalar loss, also from within loops and rematerialized functions."""
        self._losses_outlet.add(loss, super().add_loss)

    def with_attached_losses(self, routing):
        """Returns a routing that carries the gradients of losses of an inner program.

        Args:
            routing: `Slots`, `Rows` or a `RouterMask`.
        """
        name = "combine_array" if isinstance(routing, RouterMask) else "weight"
        weight = self._losses_outlet.attach_to(getattr(routing, name))
        return routing._replace(**{name: weight})

    def route(
        self, inputs, *, expert_capacity, mask=None, training=False, expert_index=None
    ):
        """Returns the routing without adding losses or metrics.

        Args:
            inputs: `[g, t, h]`.
            expert_capacity: int, or `None`.
            mask: bool `[g, t]`, or `None`.
            training: bool.
            expert_index: int `[g, t, k]`, or `None`, see the call arguments.

        Returns:
            `Slots`, `Rows` or a `RouterMask`.
        """
        inputs = ops.cast(inputs, self.compute_dtype)
        return self._route(inputs, expert_capacity, mask, training, expert_index)[0]

    def _route(self, inputs, expert_capacity, mask, training, expert_index):
        probs, *logits_and_noise = self.router_weights(
            inputs, training=training, return_noise=True
        )
        if mask is not None:
            probs = ops.where(ops.expand_dims(mask, -1), probs, 0.0)
        if expert_index is None:
            routing = self.routing_of_logits(
                logits_and_noise[0], probs, expert_capacity, training
            )
        else:
            routing = self.replay_routing(
                probs, expert_index, expert_capacity, training=training
            )
        check_routing(routing)
        return with_expert_index(routing), *logits_and_noise

    def routing_of_logits(self, logits, probs, expert_capacity, training):
        """Turns logits and probabilities into a routing, by `compute_routing`.

        A subclass that needs the logits overrides it.

        Args:
            logits: float32 `[g, t, e]`, without noise.
            probs: see `compute_routing`.
            expert_capacity: see `compute_routing`.
            training: bool.

        Returns:
            `Slots`, `Rows` or a `RouterMask`.
        """
        return self.compute_routing(probs, expert_capacity, training=training)

    def report(self, routing, logits, mask):
        """Adds losses and metrics. Subclasses may extend it with metrics of their own.

        Args:
            routing: the result of `compute_routing`.
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
        """Adds the weighted losses and the metrics.

        Args:
            routing: `Slots`, `Rows` or a `RouterMask`.
            z_loss: float32 scalar, unweighted.
            balance_loss: float32 scalar, unweighted.
            valid: float32 scalar, the number of valid tokens.
        """
        self._add_weighted_loss(z_loss, self.router_z_loss_weight)
        self._add_weighted_loss(balance_loss, self.load_balancing_loss_weight)
        if self.export_metrics is False:
            return
        sums = routing_sums(routing, valid)
        self.add_metrics(
            {
                "router_z_loss": self.router_z_loss_weight * z_loss,
                "unscaled_router_z_loss": z_loss,
                "load_balancing_loss": balance_loss,
                "expert_usage": routing.expert_usage,
                **routing_ratios(sums),
            },
            # A batch without a valid token, such as that of a replica for which none is
            # left, does not count.
            weight=ops.cast(valid > 0, "float32"),
        )
        self.log.update(sums, z_loss)

    def _add_weighted_loss(self, loss, weight):
        if weight:
            # Keras adds it to the task's loss, which has this dtype.
            self.add_loss(ops.cast(weight * loss, keras.config.floatx()))

    @property
    def running_state(self):
        return super().running_state + ([self.log.sums] if self.log else [])

    @property
    def metrics_prefix(self):
        """The path of the MoE layer, followed by the name if it is not `"router"`."""
        return super().metrics_prefix.removesuffix("/router")

    def get_config(self):
        gate = self.router_weights.get_config()
        return {
            **super().get_config(),
            **{name: gate[name] for name in GATE_ARGUMENTS},
            "router_z_loss_weight": self.router_z_loss_weight,
            "export_metrics": self.export_metrics,
        }
