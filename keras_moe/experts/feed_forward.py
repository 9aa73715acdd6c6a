"""A feed-forward layer, and what it shares with feed-forward experts."""

import functools
import inspect

import keras

from keras_moe.experts.adaptation import AdaptableLayer
from keras_moe.experts.dense import Dense
from keras_moe.kernels import ops
from keras_moe.utils import checks, initializers
from keras_moe.utils.serialization import base_dtype_policy


class BaseFeedForward(AdaptableLayer):
    """Two dense layers with an activation between them, or three if gated. Abstract.

    A subclass creates its dense layers in `_make_dense`. The arguments are those of
    `FeedForward`.
    """

    # Of the config: how each dense layer is quantized, by its name.
    _quantization = {}

    def __init__(
        self,
        d_ff,
        *,
        inner_dropout,
        output_dropout,
        activation,
        gated,
        use_bias,
        kernel_initializer,
        bias_initializer,
        remat,
        **kwargs,
    ):
        super().__init__(**kwargs)
        self.d_ff = checks.whole_number("d_ff", d_ff)
        self.inner_dropout = checks.number("inner_dropout", inner_dropout, below=1)
        self.output_dropout = checks.number("output_dropout", output_dropout, below=1)
        self.activation = checks.from_keras(
            "activation", activation, keras.activations.get
        )
        self.gated = checks.boolean("gated", gated)
        self._takes_both = _takes_gate_and_inner(self.activation)
        if self._takes_both and not self.gated:
            raise ValueError(
                "`activation` is a function of the gate and of the inner layer, so "
                f"`gated` must be true. Received: activation={activation!r}."
            )
        self.use_bias = checks.boolean("use_bias", use_bias)
        self.kernel_initializer = initializers.get(
            "kernel_initializer", kernel_initializer
        )
        self.bias_initializer = initializers.get("bias_initializer", bias_initializer)
        self.remat = checks.boolean("remat", remat)
        self.intermediate_layer = self._make_dense(self.d_ff, name="intermediate")
        if self.gated:
            self.gate_layer = self._make_dense(self.d_ff, name="gate")
        policy = base_dtype_policy(self.dtype_policy)
        self.inner_dropout_layer = keras.layers.Dropout(
            self.inner_dropout, dtype=policy
        )
        self.output_dropout_layer = keras.layers.Dropout(
            self.output_dropout, dtype=policy
        )
        self.supports_masking = True

    def _make_dense(self, units, name):
        """Creates a dense layer with `units` outputs."""
        raise NotImplementedError

    def _dense_arguments(self, name):
        return {
            "use_bias": self.use_bias,
            "kernel_initializer": initializers.clone(self.kernel_initializer),
            "bias_initializer": initializers.clone(self.bias_initializer),
            "dtype": self.dtype_policy,
            "name": name,
        }

    def build(self, input_shape):
        hidden = input_shape[-1]
        self.output_layer = self._make_dense(hidden, name="output")
        self._build_dense(self.intermediate_layer, input_shape)
        if self.gated:
            self._build_dense(self.gate_layer, input_shape)
        self._build_dense(self.output_layer, (*input_shape[:-1], self.d_ff))
        self.restore_trainable()

    def _build_dense(self, dense, input_shape):
        if isinstance(dense.dtype_policy, keras.dtype_policies.DTypePolicyMap):
            # Of a quantized layer with a map, Keras saves no scales.
            dense.dtype_policy = dense.dtype_policy[f"{self.path}/{dense.name}"]
        settings = self._quantization.get(dense.name)
        if settings is None:
            dense.build(input_shape)
            return
        dense.dtype_policy = keras.dtype_policies.deserialize(settings["dtype"])
        dense.quantization_config = keras.saving.deserialize_keras_object(
            settings["config"]
        )
        dense.build(input_shape)
        if settings["lora_rank"]:
            dense.enable_lora(settings["lora_rank"], settings["lora_alpha"])

    @property
    def dense_layers(self):
        """The dense layers of a built layer: intermediate, output, gate if gated.

        Their order is that of the arguments of `_feed_forward`. It is also the order
        in which a file stores them.
        """
        gate = [self.gate_layer] if self.gated else []
        return [self.intermediate_layer, self.output_layer, *gate]

    def call(self, inputs, training=None):
        return self._feed_forward(inputs, training, *self.dense_layers)

    def _feed_forward(self, inputs, training, intermediate, output, gate=None):
        # Without dropout the layer is not called: its call takes longer than an op.
        drop = finish = _identity
        if self.inner_dropout:
            drop = functools.partial(self.inner_dropout_layer, training=training)
        if self.output_dropout:
            finish = functools.partial(self.output_dropout_layer, training=training)
        if self.remat and self.inner_dropout and training:
            # Sampled outside the rematerialized function, which runs twice.
            shape = (*ops.shape(inputs)[:-1], self.d_ff)
            noise = drop(ops.ones(shape, dtype=self.compute_dtype))
            drop = functools.partial(ops.multiply, noise)

        def compute(inputs):
            inner = intermediate(inputs)
            opened = None if gate is None else gate(inputs)
            return output(drop(self._activate(inner, opened)))

        if self.remat:
            compute = keras.remat(compute)
        return finish(compute(inputs))

    def _activate(self, inner, gate):
        if gate is None:
            return self.activation(inner)
        if self._takes_both:
            return self.activation(gate, inner)
        return self.activation(gate) * inner

    def compute_output_shape(self, input_shape):
        return input_shape

    def get_config(self):
        quantization = self._serialized_quantization()
        return {
            **super().get_config(),
            **({"quantization": quantization} if quantization else {}),
            "d_ff": self.d_ff,
            "inner_dropout": self.inner_dropout,
            "output_dropout": self.output_dropout,
            "activation": keras.activations.serialize(self.activation),
            "gated": self.gated,
            "use_bias": self.use_bias,
            "kernel_initializer": initializers.serialize(self.kernel_initializer),
            "bias_initializer": initializers.serialize(self.bias_initializer),
            "remat": self.remat,
        }

    def _serialized_quantization(self):
        """Returns how each quantized dense layer is quantized, by its name.

        The adapters of a quantized layer are kept: merged, they would be rounded.
        """
        layers = self.dense_layers if self.built else []
        return {
            dense.name: {
                "dtype": keras.dtype_policies.serialize(dense.dtype_policy),
                "config": keras.saving.serialize_keras_object(
                    dense.quantization_config
                ),
                "lora_rank": dense.lora_rank,
                "lora_alpha": dense.lora_alpha,
            }
            for dense in layers
            if dense.quantization_mode is not None
        }

    @classmethod
    def from_config(cls, config):
        config = dict(config)
        quantization = config.pop("quantization", {})
        layer = super().from_config(config)
        layer._quantization = quantization
        return layer


def _identity(x):
    return x


def _takes_gate_and_inner(activation):
    """Returns whether a function has two arguments without a default."""
    try:
        parameters = inspect.signature(activation).parameters.values()
    except ValueError:  # A function of C has no signature.
        return False
    positional = (
        inspect.Parameter.POSITIONAL_ONLY,
        inspect.Parameter.POSITIONAL_OR_KEYWORD,
    )
    required = [p for p in parameters if p.kind in positional and p.default is p.empty]
    return len(required) == 2


@keras.saving.register_keras_serializable(package="keras_moe")
class FeedForward(BaseFeedForward):
    """A feed-forward layer, the same for every token.

    `activation(x · W1 + b1) · W2 + b2`. With `gated=True`, and the gate's weights `Wg`
    and `bg`, `(activation(x · Wg + bg) * (x · W1 + b1)) · W2 + b2`.

    Args:
        d_ff: int, the size `f` of the inner layer.
        inner_dropout: float in [0, 1), the dropout rate after the activation.
            Defaults to 0.
        output_dropout: float in [0, 1), the dropout rate after the output. Defaults
            to 0.
        activation: name or function. With `gated=True` it may be a function of both
            the gate and the inner layer, such as
            `keras_moe.activations.clamped_swiglu`. Defaults to `"gelu"`, the exact one.
        gated: bool, whether to gate the inner layer; with `activation="silu"` this is
            SwiGLU. Defaults to `False`.
        use_bias: bool. Defaults to `True`.
        kernel_initializer: initializer of the kernels. Defaults to `None`,
            `TruncatedNormal(stddev=0.02)`.
        bias_initializer: initializer of the biases. Defaults to `"zeros"`.
        remat: bool, whether to recompute the inner layer for the gradient instead of
            keeping it in memory. Defaults to `False`.
        name: string.
        **kwargs: forwarded to `keras.layers.Layer`.

    Call arguments:
        inputs: `[batch, ..., h]`.
        training: bool, whether to apply dropout.

    Returns:
        `[batch, ..., h]`.

    Example:

    ```python
    layer = keras_moe.FeedForward(d_ff=64, activation="silu", gated=True)
    layer(np.ones((2, 8, 16))).shape  # (2, 8, 16)
    ```

    Reference:
        [Shazeer, 2020](https://arxiv.org/abs/2002.05202) on gated layers.
    """

    def __init__(
        self,
        d_ff,
        *,
        inner_dropout=0.0,
        output_dropout=0.0,
        activation="gelu",
        gated=False,
        use_bias=True,
        kernel_initializer=None,
        bias_initializer="zeros",
        remat=False,
        name=None,
        **kwargs,
    ):
        super().__init__(
            d_ff,
            inner_dropout=inner_dropout,
            output_dropout=output_dropout,
            activation=activation,
            gated=gated,
            use_bias=use_bias,
            kernel_initializer=kernel_initializer,
            bias_initializer=bias_initializer,
            remat=remat,
            name=name,
            **kwargs,
        )

    def _make_dense(self, units, name):
        return Dense(units, **self._dense_arguments(name))
