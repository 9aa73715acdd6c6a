"""A Mixture-of-Experts layer plus a feed-forward layer for every token."""

import keras

from keras_moe.experts import FeedForward
from keras_moe.experts.adaptation import AdaptableLayer
from keras_moe.kernels import ops
from keras_moe.layers.moe_layer import MoeLayer
from keras_moe.routers import Gate
from keras_moe.utils import checks


@keras.saving.register_keras_serializable(package="keras_moe")
class MoeLayerWithBackbone(AdaptableLayer):
    """A `MoeLayer` plus a feed-forward layer for every token (a shared expert).

    `backbone(x) + moe(x)`. With `backbone_gate=True`, and a kernel `w` `[h, 1]`,
    `sigmoid(x · w) * backbone(x) + moe(x)`, as in Qwen's shared expert. With
    `average=True`, half of the sum.

    Args:
        moe: `MoeLayer`.
        backbone_d_ff: int, the size of the backbone's inner layer.
        backbone_gate: bool, whether to gate the backbone's output. Defaults to `False`.
        average: bool, whether to divide the sum by 2. Defaults to `False`.
        inner_dropout: float in [0, 1), the dropout rate after the backbone's
            activation. Defaults to 0.
        output_dropout: float in [0, 1), the dropout rate after the backbone's output.
            Defaults to 0.
        activation: name or function. Defaults to `"gelu"`, the exact one.
        gated: bool, whether to gate the backbone's inner layer. Defaults to `False`.
        use_bias: bool. Defaults to `True`.
        kernel_initializer: initializer of the backbone's kernels. Defaults to `None`,
            `TruncatedNormal(stddev=0.02)`.
        bias_initializer: initializer of the backbone's biases. Defaults to `"zeros"`.
        name: string.
        **kwargs: forwarded to `keras.layers.Layer`.

    Call arguments:
        inputs: `[batch, ..., h]`.
        mask: see `MoeLayer`. The backbone processes masked tokens, too.
        training: bool.
        router_inputs: see `MoeLayer`.
        expert_index: see `MoeLayer`.

    Returns:
        `[batch, ..., h]`.

    Raises:
        ValueError: if an argument is out of range.
        TypeError: if an argument has another type.

    Example:

    ```python
    moe = keras_moe.MoeLayer(
        keras_moe.FeedForwardExperts(8, 64),
        keras_moe.MaskedRouter(8),
        train_capacity_factor=None,
        eval_capacity_factor=None,
    )
    layer = keras_moe.MoeLayerWithBackbone(moe, backbone_d_ff=64)
    layer(np.ones((2, 8, 16))).shape  # (2, 8, 16)
    ```

    Reference:
        [Dai et al., 2024](https://arxiv.org/abs/2401.06066), section 3.2, for shared
        experts.
    """

    serialized_sublayers = ("moe",)
    built_shape = None

    def __init__(
        self,
        moe,
        backbone_d_ff,
        *,
        backbone_gate=False,
        average=False,
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
        self.average = checks.boolean("average", average)
        if self.backbone_gate:
            self.backbone_gate_layer = Gate(
                1,
                mechanism="sigmoid",
                use_bias=False,
                kernel_initializer=self.backbone.kernel_initializer,
                name="backbone_gate",
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
        self.built_shape = tuple(input_shape)
        self.restore_trainable()

    def call(
        self, inputs, mask=None, training=None, router_inputs=None, expert_index=None
    ):
        backbone = self.backbone(inputs, training=training)
        if self.backbone_gate:
            gate = self.backbone_gate_layer(inputs)
            backbone = ops.cast(gate, backbone.dtype) * backbone
        moe = self.moe(
            inputs,
            mask=mask,
            training=training,
            router_inputs=router_inputs,
            expert_index=expert_index,
        )
        return (backbone + moe) / 2 if self.average else backbone + moe

    def _adaptable_parts(self):
        return [self.moe.experts, self.backbone]

    def rematerialized_call(self, layer_call, *args, **kwargs):
        call = super().rematerialized_call(layer_call, *args, **kwargs)
        self.moe.rematerializes |= call is not layer_call
        return layer_call  # Its sublayers are rematerialized.

    @property
    def metrics(self):
        return []  # Keras collects those of the router itself.

    def compute_output_shape(self, input_shape):
        return input_shape

    @classmethod
    def from_config(cls, config):
        config = dict(config)
        quantization = config.pop("quantization", {})
        layer = super().from_config(config)
        layer.backbone._quantization = quantization
        return layer

    def get_build_config(self):
        # The owner of this layer builds it, so that its path begins with the owner's.
        return None

    def get_config(self):
        backbone = self.backbone.get_config()
        shared = ("inner_dropout", "output_dropout", "activation", "gated", "use_bias")
        shared += ("kernel_initializer", "bias_initializer")
        quantization = backbone.get("quantization")
        return {
            **super().get_config(),
            **({"quantization": quantization} if quantization else {}),
            "moe": keras.saving.serialize_keras_object(self.moe),
            "backbone_d_ff": backbone["d_ff"],
            "backbone_gate": self.backbone_gate,
            "average": self.average,
            **{name: backbone[name] for name in shared},
        }
