"""A Mixture-of-Experts layer beside a layer for every token."""

import keras

from keras_moe import checks, initializers
from keras_moe.experts import FeedForward
from keras_moe.gate import UnquantizedDense
from keras_moe.moe_layer import MoeLayer
from keras_moe.serialization import unquantized, with_parts


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
            self.backbone_gate_layer = UnquantizedDense(
                1,
                activation="sigmoid",
                use_bias=False,
                kernel_initializer=initializers.get(
                    "kernel_initializer", kernel_initializer
                ),
                name="backbone_gate",
                dtype=unquantized(self.dtype_policy),
            )
        self.backbone_d_ff = self.backbone.d_ff
        self.inner_dropout = self.backbone.inner_dropout
        self.output_dropout = self.backbone.output_dropout
        self.activation = self.backbone.activation
        self.gated = self.backbone.gated
        self.use_bias = self.backbone.use_bias
        self.kernel_initializer = self.backbone.kernel_initializer
        self.bias_initializer = self.backbone.bias_initializer
        self.supports_masking = True

    def build(self, input_shape):
        if not self.backbone.built:
            self.backbone.build(input_shape)
        if self.backbone_gate and not self.backbone_gate_layer.built:
            self.backbone_gate_layer.build(input_shape)
        if not self.moe.built:
            self.moe.build(input_shape)

    def call(self, inputs, mask=None, training=None):
        backbone = self.backbone(inputs, training=training)
        if self.backbone_gate:
            backbone = self.backbone_gate_layer(inputs) * backbone
        return backbone + self.moe(inputs, mask=mask, training=training)

    def quantized_call(self, *args, **kwargs):
        # What is quantised is inside.
        return self.call(*args, **kwargs)

    def compute_output_shape(self, input_shape):
        return input_shape

    def get_build_config(self):
        # As for `MoeLayer`.
        return None

    def get_config(self):
        backbone = self.backbone.get_config()
        shared = ("inner_dropout", "output_dropout", "activation", "gated", "use_bias")
        shared += ("kernel_initializer", "bias_initializer")
        return {
            **super().get_config(),
            "dtype": backbone["dtype"],
            "moe": keras.saving.serialize_keras_object(self.moe),
            "backbone_d_ff": backbone["d_ff"],
            "backbone_gate": self.backbone_gate,
            **{name: backbone[name] for name in shared},
        }

    @classmethod
    def from_config(cls, config):
        return cls(**with_parts(config, "moe"))
