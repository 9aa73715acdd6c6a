"""Feed-forward layers: one for all tokens, and one for each expert."""

import keras
from keras import ops

from keras_moe import checks, initializers


class _FeedForward(keras.layers.Layer):
    """Two dense layers with an activation between them.

    A subclass says what its dense layers are, in `_dense`.
    """

    def __init__(
        self,
        d_ff,
        *,
        inner_dropout=0.0,
        output_dropout=0.0,
        activation="gelu",
        kernel_initializer=None,
        bias_initializer="zeros",
        **kwargs,
    ):
        super().__init__(**kwargs)
        self.d_ff = checks.whole_number("d_ff", d_ff)
        self.inner_dropout = checks.number("inner_dropout", inner_dropout, below=1)
        self.output_dropout = checks.number("output_dropout", output_dropout, below=1)
        self.activation = keras.activations.get(activation)
        self.kernel_initializer = initializers.get(kernel_initializer)
        self.bias_initializer = initializers.get(bias_initializer)
        self.intermediate_layer = self._dense(self.d_ff, name="intermediate")
        self.inner_dropout_layer = keras.layers.Dropout(
            self.inner_dropout, dtype=self.dtype_policy
        )
        self.output_dropout_layer = keras.layers.Dropout(
            self.output_dropout, dtype=self.dtype_policy
        )
        self.supports_masking = True

    def _dense(self, units, name):
        raise NotImplementedError

    def _dense_arguments(self, name):
        return {
            "kernel_initializer": initializers.clone(self.kernel_initializer),
            "bias_initializer": initializers.clone(self.bias_initializer),
            "dtype": self.dtype_policy,
            "name": name,
        }

    def build(self, input_shape):
        hidden = input_shape[-1]
        self.output_layer = self._dense(hidden, name="output")
        # Made only now, it was not there when the layer was frozen.
        self.output_layer.trainable = self.trainable
        self.intermediate_layer.build(input_shape)
        self.output_layer.build((*input_shape[:-1], self.d_ff))

    def call(self, inputs, training=None):
        x = self.activation(self.intermediate_layer(inputs))
        x = self.inner_dropout_layer(x, training=training)
        return self.output_dropout_layer(self.output_layer(x), training=training)

    def compute_output_shape(self, input_shape):
        return input_shape

    def get_config(self):
        return {
            **super().get_config(),
            "d_ff": self.d_ff,
            "inner_dropout": self.inner_dropout,
            "output_dropout": self.output_dropout,
            "activation": keras.activations.serialize(self.activation),
            "kernel_initializer": initializers.serialize(self.kernel_initializer),
            "bias_initializer": initializers.serialize(self.bias_initializer),
        }


@keras.saving.register_keras_serializable(package="keras_moe")
class FeedForward(_FeedForward):
    """A feed-forward layer: the same for every token.

    `activation(x · W1 + b1) · W2 + b2`.

    Args:
        d_ff: int, the width `f` of the inner layer.
        inner_dropout: float in [0, 1), the rate after the activation.
        output_dropout: float in [0, 1), the rate after the output.
        activation: name or function; `"gelu"` is the exact one.
        kernel_initializer: initializer of both kernels;
            `TruncatedNormal(stddev=0.02)` by default.
        bias_initializer: initializer of both biases.
        name: string.
        **kwargs: forwarded to `keras.layers.Layer`.

    Call arguments:
        inputs: `[batch, ..., h]`.
        training: bool, whether to drop.

    Returns:
        `[batch, ..., h]`.
    """

    def __init__(self, d_ff, *, name="feed_forward", **kwargs):
        super().__init__(d_ff, name=name, **kwargs)

    def _dense(self, units, name):
        return keras.layers.Dense(units, **self._dense_arguments(name))


@keras.saving.register_keras_serializable(package="keras_moe")
class FeedForwardExperts(_FeedForward):
    """A feed-forward layer for each expert, all of the same shape.

    Args:
        num_experts: int, the number of experts `e`.
        d_ff: int, the width `f` of each expert's inner layer.
        inner_dropout: float in [0, 1), the rate after the activation.
        output_dropout: float in [0, 1), the rate after the output.
        activation: name or function; `"gelu"` is the exact one.
        kernel_initializer: initializer of the kernels `[e, h, f]` and
            `[e, f, h]`; `TruncatedNormal(stddev=0.02)` by default.
        bias_initializer: initializer of the biases `[e, 1, f]`, `[e, 1, h]`.
        name: string.
        **kwargs: forwarded to `keras.layers.Layer`.

    Call arguments:
        inputs: `[g, e, c, h]`, the tokens in the slots of each expert.
        training: bool, whether to drop.

    Returns:
        `[g, e, c, h]`.

    Raises:
        ValueError: if the input has another rank or number of experts.
    """

    def __init__(self, num_experts, d_ff, *, name="experts", **kwargs):
        # Before the base class, which makes the dense layers.
        self.num_experts = checks.whole_number("num_experts", num_experts)
        super().__init__(d_ff, name=name, **kwargs)

    def _dense(self, units, name):
        return ExpertDense(self.num_experts, units, **self._dense_arguments(name))

    def build(self, input_shape):
        if len(input_shape) != 4 or input_shape[1] != self.num_experts:
            raise ValueError(
                "Experts take [groups, experts, capacity, hidden] with "
                f"{self.num_experts} experts. Received: input_shape={input_shape}."
            )
        super().build(input_shape)

    def get_config(self):
        return {**super().get_config(), "num_experts": self.num_experts}


class ExpertDense(keras.layers.EinsumDense):
    """A dense layer for each expert: `[g, e, c, h]` to `[g, e, c, units]`.

    It is an `EinsumDense`, with its `kernel`, LoRA and quantisation, but takes
    the matrix product of one group, the usual case, as it lies in memory.
    """

    def __init__(self, num_experts, units, **kwargs):
        super().__init__(
            "gech,ehf->gecf",
            output_shape=(num_experts, None, units),
            bias_axes="ef",
            **kwargs,
        )

    def call(self, inputs, training=None):
        if inputs.shape[0] != 1:
            return super().call(inputs, training=training)
        outputs = ops.matmul(ops.squeeze(inputs, axis=0), self.kernel)
        return ops.expand_dims(outputs + self.bias, axis=0)
