"""The Mixture-of-Experts layer."""

import warnings

import keras
from keras import ops

from keras_moe import checks, initializers, losses
from keras_moe.dispatch import combine, dispatch
from keras_moe.experts import FeedForward
from keras_moe.grouping import expert_capacity, group, ungroup
from keras_moe.routers import Router
from keras_moe.routing import Slots
from keras_moe.serialization import with_parts


@keras.saving.register_keras_serializable(package="keras_moe")
class MoeLayer(keras.layers.Layer):
    """A sparse Mixture-of-Experts layer.

    Each token goes to a few experts, and gets the sum of their results, each
    with the weight that the router gives it. A token whose experts are all
    full gets 0; put a residual connection around the layer.

    Args:
        experts: a layer with `num_experts` that maps `[g, e, c, h]` to the
            same shape, such as `FeedForwardExperts`.
        router: a `Router` with as many experts.
        train_capacity_factor: float above 0, or, the capacity in training. An
            expert has `round(factor · t / e)` slots for a group of `t` tokens,
            at least `min_expert_capacity` and at most `t`. Where tokens choose,
            it bounds what an expert takes; where experts choose, it is what
            each expert takes.
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
        super().__init__(name=name, **kwargs)
        _check_parts(experts, router)
        self.experts = experts
        self.router = router
        self.num_experts = router.num_experts
        self.train_capacity_factor = checks.number(
            "train_capacity_factor", train_capacity_factor, above=True
        )
        self.eval_capacity_factor = checks.number(
            "eval_capacity_factor", eval_capacity_factor, above=True
        )
        self.examples_per_group = checks.examples_per_group(examples_per_group)
        self.min_expert_capacity = checks.whole_number(
            "min_expert_capacity", min_expert_capacity
        )
        self._warn_of_certain_drops()
        self.supports_masking = True

    def build(self, input_shape):
        self._check_input_shape(input_shape)
        hidden = input_shape[-1]
        self.input_spec = keras.InputSpec(min_ndim=2, axes={-1: hidden})
        if not self.router.built:
            self.router.build((None, None, hidden))
        # A symbolic call builds any layer, with or without a `build`.
        buffers = keras.KerasTensor(
            (1, self.num_experts, None, hidden), dtype=self.compute_dtype
        )
        results = self.experts(buffers)
        if results.shape[1] != self.num_experts or results.shape[-1] != hidden:
            raise ValueError(
                "`experts` must return the shape that they are given. "
                f"Received: {results.shape} for {buffers.shape}."
            )

    def call(self, inputs, mask=None, training=None, return_routing=False):
        tokens, mask = self._group(inputs, mask)
        routing = self.router(
            tokens,
            expert_capacity=self._expert_capacity(tokens, training),
            mask=mask,
        )
        buffers = dispatch(tokens, routing)
        results = self.experts(buffers)
        outputs = combine(results, routing)
        outputs = ungroup(outputs, inputs, self.examples_per_group)
        return (outputs, routing) if return_routing else outputs

    def route(self, inputs, mask=None, training=False):
        """Where the tokens go, without any loss, metric or expert.

        Args:
            inputs: `[batch, ..., h]`.
            mask: bool `[batch, ...]`, or `None`.
            training: bool.

        Returns:
            The routing: `Slots` or a `RouterMask`, in groups.
        """
        inputs = ops.cast(ops.convert_to_tensor(inputs), self.compute_dtype)
        if not self.built:
            self.build(inputs.shape)
        tokens, mask = self._group(inputs, mask)
        return self.router.route(
            tokens,
            expert_capacity=self._expert_capacity(tokens, training),
            mask=mask,
            training=training,
        )

    def balance_loss(self, routing):
        """The balance loss of a routing, unweighted.

        Args:
            routing: `Slots`, from `route` or from a call with `return_routing`.

        Returns:
            A float32 scalar: 1 at balance, `e` at worst, 0 for no tokens.
        """
        if not isinstance(routing, Slots):
            raise TypeError(
                "`balance_loss` needs the probabilities that `Slots` hold. "
                f"Received: {type(routing).__name__}."
            )
        return losses.load_balancing_loss(routing.probs, routing.load)

    def _group(self, inputs, mask):
        self._check_input_shape(inputs.shape)
        _check_mask_shape(mask, inputs)
        return group(inputs, mask, self.examples_per_group)

    def _expert_capacity(self, tokens, training):
        factor = self.train_capacity_factor if training else self.eval_capacity_factor
        t = ops.shape(tokens)[1]
        return expert_capacity(t, self.num_experts, factor, self.min_expert_capacity)

    def _check_input_shape(self, shape):
        if len(shape) < 2 or shape[-1] is None:
            raise ValueError(
                "Inputs must be (batch, ..., hidden), with a known last axis. "
                f"Received: input_shape={shape}."
            )
        examples = self.examples_per_group
        if len(shape) == 2 and examples is not None and examples <= 1:
            raise ValueError(
                "Inputs (batch, hidden) have one token an example, so groups of one "
                "example or less have one token, and routing has no choice. Use "
                "`examples_per_group=None`, or more examples. "
                f"Received: examples_per_group={examples:g}, input_shape={shape}."
            )

    def _warn_of_certain_drops(self):
        k = getattr(self.router, "num_selected_experts", 0)
        factor = min(self.train_capacity_factor, self.eval_capacity_factor)
        if factor < k:
            warnings.warn(
                f"A capacity factor of {factor:g} is below the number of experts that "
                f"a token wants, {k}: some choices find no slot even at perfect "
                f"balance. Use factors of at least {k}.",
                stacklevel=3,
            )

    def compute_output_shape(self, input_shape):
        return input_shape

    def compute_output_spec(
        self, inputs, mask=None, training=None, return_routing=False
    ):
        _check_mask_shape(mask, inputs)
        if return_routing:
            # The routing's shapes follow from running the layer on no data.
            return keras.Operation.compute_output_spec(
                self, inputs, mask=mask, training=training, return_routing=True
            )
        return keras.KerasTensor(inputs.shape, dtype=self.compute_dtype)

    def get_config(self):
        return {
            **super().get_config(),
            "experts": keras.saving.serialize_keras_object(self.experts),
            "router": keras.saving.serialize_keras_object(self.router),
            "train_capacity_factor": self.train_capacity_factor,
            "eval_capacity_factor": self.eval_capacity_factor,
            "examples_per_group": self.examples_per_group,
            "min_expert_capacity": self.min_expert_capacity,
        }

    @classmethod
    def from_config(cls, config):
        return cls(**with_parts(config, "experts", "router"))


@keras.saving.register_keras_serializable(package="keras_moe")
class MoeLayerWithBackbone(keras.layers.Layer):
    """A `MoeLayer` beside a small feed-forward layer for every token.

    `backbone(x) + moe(x)`; gated, with a kernel `w` `[h, 1]`,
    `sigmoid(x · w) * backbone(x) + moe(x)`, as Qwen's shared expert.

    Args:
        moe: a `MoeLayer`.
        backbone_d_ff: int, the width of the backbone's inner layer.
        backbone_gate: bool, whether the backbone's result is gated.
        inner_dropout: see `FeedForward`, as the following.
        output_dropout: float.
        activation: name or function.
        gated: bool.
        use_bias: bool.
        kernel_initializer: initializer.
        bias_initializer: initializer.
        name: string.
        **kwargs: forwarded to `keras.layers.Layer`.

    Call arguments:
        inputs: `[batch, ..., h]`.
        mask: see `MoeLayer`; the backbone takes every token.
        training: bool.

    Returns:
        `[batch, ..., h]`.
    """

    def __init__(
        self,
        moe,
        backbone_d_ff,
        *,
        backbone_gate=False,
        inner_dropout=0.0,
        output_dropout=0.0,
        activation="gelu",
        gated=False,
        use_bias=True,
        kernel_initializer=None,
        bias_initializer="zeros",
        name=None,
        **kwargs,
    ):
        super().__init__(name=name, **kwargs)
        if not isinstance(moe, MoeLayer):
            raise TypeError(
                f"`moe` must be a `MoeLayer`. Received: {type(moe).__name__}."
            )
        self.moe = moe
        self.backbone = FeedForward(
            checks.whole_number("backbone_d_ff", backbone_d_ff),
            inner_dropout=inner_dropout,
            output_dropout=output_dropout,
            activation=activation,
            gated=gated,
            use_bias=use_bias,
            kernel_initializer=kernel_initializer,
            bias_initializer=bias_initializer,
            name="backbone",
            dtype=self.dtype_policy,
        )
        self.backbone_gate = checks.boolean("backbone_gate", backbone_gate)
        if backbone_gate:
            self.backbone_gate_layer = keras.layers.Dense(
                1,
                activation="sigmoid",
                use_bias=False,
                kernel_initializer=initializers.get(kernel_initializer),
                name="backbone_gate",
                dtype=self.dtype_policy,
            )
        self.supports_masking = True

    def build(self, input_shape):
        self.backbone.build(input_shape)
        if self.backbone_gate:
            self.backbone_gate_layer.build(input_shape)
        if not self.moe.built:
            self.moe.build(input_shape)

    def call(self, inputs, mask=None, training=None):
        backbone = self.backbone(inputs, training=training)
        if self.backbone_gate:
            backbone = self.backbone_gate_layer(inputs) * backbone
        return backbone + self.moe(inputs, mask=mask, training=training)

    def compute_output_shape(self, input_shape):
        return input_shape

    def get_config(self):
        backbone = self.backbone.get_config()
        shared = ("inner_dropout", "output_dropout", "activation", "gated", "use_bias")
        shared += ("kernel_initializer", "bias_initializer")
        return {
            **super().get_config(),
            "moe": keras.saving.serialize_keras_object(self.moe),
            "backbone_d_ff": backbone["d_ff"],
            "backbone_gate": self.backbone_gate,
            **{name: backbone[name] for name in shared},
        }

    @classmethod
    def from_config(cls, config):
        return cls(**with_parts(config, "moe"))


def _check_parts(experts, router):
    if not isinstance(experts, keras.layers.Layer) or not hasattr(
        experts, "num_experts"
    ):
        raise TypeError(
            "`experts` must be a Keras layer with an attribute `num_experts`. "
            f"Received: {type(experts).__name__}."
        )
    if not isinstance(router, Router):
        raise TypeError(
            f"`router` must be a `Router`. Received: {type(router).__name__}."
        )
    if experts.num_experts != router.num_experts:
        raise ValueError(
            "`experts` and `router` must have the same number of experts. "
            f"Received: {experts.num_experts} and {router.num_experts}."
        )


def _check_mask_shape(mask, inputs):
    if mask is None:
        return
    received, expected = tuple(mask.shape), tuple(inputs.shape[:-1])
    if len(received) != len(expected) or any(
        r != e for r, e in zip(received, expected, strict=True) if None not in (r, e)
    ):
        raise ValueError(
            "`mask` must have the shape of the inputs without the last axis, "
            f"{expected}. Received: a mask of shape {received}."
        )
