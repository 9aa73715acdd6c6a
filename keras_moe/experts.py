"""Feed-forward layers: one for all tokens, and one for each expert."""

import functools

import keras
from keras import ops

from keras_moe import checks, initializers
from keras_moe.expert_dense import ExpertDense
from keras_moe.kernels import RUNS_OP_BY_OP, split_rows
from keras_moe.serialization import unquantized, with_parts

# So few that going from one to the next costs less than it saves.
FEW_EXPERTS = 16


class _FeedForward(keras.layers.Layer):
    """Two dense layers with an activation between them, or three if gated.

    A subclass says what its dense layers are, in `_dense`.
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
        **kwargs,
    ):
        super().__init__(**kwargs)
        self.d_ff = checks.whole_number("d_ff", d_ff)
        self.inner_dropout = checks.number("inner_dropout", inner_dropout, below=1)
        self.output_dropout = checks.number("output_dropout", output_dropout, below=1)
        self.activation = checks.known("activation", activation, keras.activations.get)
        self.gated = checks.boolean("gated", gated)
        self.use_bias = checks.boolean("use_bias", use_bias)
        self.kernel_initializer = initializers.get(
            "kernel_initializer", kernel_initializer
        )
        self.bias_initializer = initializers.get("bias_initializer", bias_initializer)
        self.remat = checks.boolean("remat", remat)
        self.intermediate_layer = self._dense(self.d_ff, name="intermediate")
        if self.gated:
            self.gate_layer = self._dense(self.d_ff, name="gate")
        policy = unquantized(self.dtype_policy)
        self.inner_dropout_layer = keras.layers.Dropout(
            self.inner_dropout, dtype=policy
        )
        self.output_dropout_layer = keras.layers.Dropout(
            self.output_dropout, dtype=policy
        )
        self.supports_masking = True

    def _dense(self, units, name):
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
        self.output_layer = self._dense(hidden, name="output")
        # Made only now, it was not there when the layer was frozen.
        self.output_layer.trainable = self.trainable
        self.intermediate_layer.build(input_shape)
        if self.gated:
            self.gate_layer.build(input_shape)
        self.output_layer.build((*input_shape[:-1], self.d_ff))

    @property
    def dense_layers(self):
        """Those it has once it is built."""
        gate = [self.gate_layer] if self.gated else []
        return [self.intermediate_layer, self.output_layer, *gate]

    def call(self, inputs, training=None):
        return self._feed_forward(inputs, training, *self.dense_layers)

    def quantized_call(self, *args, **kwargs):
        # What is quantised is the dense layers.
        return self.call(*args, **kwargs)

    def _feed_forward(self, inputs, training, intermediate, output, gate=None):
        drop = functools.partial(self.inner_dropout_layer, training=training)
        if self.remat and self.inner_dropout and training:
            # Drawn outside of what runs twice.
            shape = (*ops.shape(inputs)[:-1], self.d_ff)
            noise = drop(ops.ones(shape, dtype=self.compute_dtype))
            drop = functools.partial(ops.multiply, noise)

        def work(inputs):
            x = intermediate(inputs)
            if gate is None:
                return output(drop(self.activation(x)))
            return output(drop(self.activation(gate(inputs)) * x))

        if self.remat:
            work = keras.remat(work)
        return self.output_dropout_layer(work(inputs), training=training)

    def compute_output_shape(self, input_shape):
        return input_shape

    def get_config(self):
        return {
            **super().get_config(),
            "dtype": self._policy_of_dense_layers(),
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

    def _policy_of_dense_layers(self):
        """Theirs, of which `quantize` makes quantised ones."""
        layers = self.dense_layers if self.built else [self.intermediate_layer]
        policies = {layer.dtype_policy.name for layer in layers}
        if len(policies) > 1:
            raise ValueError(
                "Dense layers of experts must be quantised alike to be saved. "
                f"Received: {sorted(policies)} in {self.path}."
            )
        return keras.dtype_policies.serialize(layers[0].dtype_policy)


@keras.saving.register_keras_serializable(package="keras_moe")
class FeedForward(_FeedForward):
    """A feed-forward layer: the same for every token.

    `activation(x · W1 + b1) · W2 + b2`; gated, with the gate's `Wg` and `bg`,
    `(activation(x · Wg + bg) * (x · W1 + b1)) · W2 + b2`.

    Args:
        d_ff: int, the width `f` of the inner layer.
        inner_dropout: float in [0, 1), the rate after the activation.
        output_dropout: float in [0, 1), the rate after the output.
        activation: name or function; `"gelu"` is the exact one.
        gated: bool, whether there is a gate: with `"silu"`, SwiGLU.
        use_bias: bool.
        kernel_initializer: initializer of both kernels;
            `TruncatedNormal(stddev=0.02)` by default.
        bias_initializer: initializer of both biases.
        remat: bool, whether the inner layer is computed again for the gradient
            instead of kept.
        name: string.
        **kwargs: forwarded to `keras.layers.Layer`.

    Call arguments:
        inputs: `[batch, ..., h]`.
        training: bool, whether to drop.

    Returns:
        `[batch, ..., h]`.

    Reference:
        [Shazeer, 2020](https://arxiv.org/abs/2002.05202) on gates.
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
        gated: bool, whether there is a gate: with `"silu"`, SwiGLU.
        use_bias: bool.
        kernel_initializer: initializer of the kernels `[e, h, f]` and
            `[e, f, h]`; `TruncatedNormal(stddev=0.02)` by default.
        bias_initializer: initializer of the biases `[e, 1, f]`, `[e, 1, h]`.
        remat: bool, whether the inner layer is computed again for the gradient
            instead of kept, which takes longer and less memory.
        name: string.
        **kwargs: forwarded to `keras.layers.Layer`.

    Call arguments:
        inputs: `[g, e, c, h]`, the tokens in the slots of each expert; with
            `group_sizes` `[a, h]`, rows of tokens sorted by expert.
        group_sizes: int32 `[e]`, how many rows each expert has; rows that are
            left over get 0.
        training: bool, whether to drop.

    Returns:
        The shape of the inputs.

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
        _check_shape(input_shape, self.num_experts)
        super().build(input_shape)

    def call(self, inputs, group_sizes=None, training=None):
        if self._can_go_one_by_one(inputs, group_sizes):
            return self._one_by_one(inputs, group_sizes, training)
        layers = self.dense_layers
        if group_sizes is not None:
            layers = [functools.partial(x, group_sizes=group_sizes) for x in layers]
        return self._feed_forward(inputs, training, *layers)

    def _can_go_one_by_one(self, inputs, group_sizes):
        return (
            RUNS_OP_BY_OP
            and self.num_experts <= FEW_EXPERTS
            and not self.remat
            and (group_sizes is not None or inputs.shape[0] == 1)
            and all(x.quantization_mode is None for x in self.dense_layers)
        )

    def _one_by_one(self, inputs, group_sizes, training):
        """One expert's network after the other, as long as its rows are cached."""
        if group_sizes is None:
            rows, rest = ops.unstack(inputs[0], self.num_experts), []
        else:
            *rows, rest = split_rows(inputs, group_sizes)
            rest = [ops.zeros_like(rest)]
        layers = [layer.of_each_expert() for layer in self.dense_layers]
        results = [
            self._feed_forward(x, training, *dense)
            for x, *dense in zip(rows, *layers, strict=True)
        ]
        if group_sizes is None:
            return ops.expand_dims(ops.stack(results), axis=0)
        return ops.concatenate(results + rest, axis=0)

    def compute_output_shape(self, inputs_shape, group_sizes_shape=None):
        return inputs_shape

    def get_config(self):
        return {**super().get_config(), "num_experts": self.num_experts}


@keras.saving.register_keras_serializable(package="keras_moe")
class HeterogeneousExperts(keras.layers.Layer):
    """Experts of different architectures, each called on its own slots.

    Args:
        experts: a list of layers, each from `[g, c, h]` to the same shape,
            that treat a token without regard to its neighbours; one an expert.
        name: string.
        **kwargs: forwarded to `keras.layers.Layer`.

    Call arguments:
        inputs: `[g, e, c, h]`, the tokens in the slots of each expert.

    Returns:
        `[g, e, c, h]`.

    Raises:
        TypeError: if `experts` is no list of layers.
        ValueError: if it is empty, or the input has another number of experts.
    """

    def __init__(self, experts, *, name="experts", **kwargs):
        super().__init__(name=name, **kwargs)
        if not isinstance(experts, (list, tuple)) or not all(
            isinstance(expert, keras.layers.Layer) for expert in experts
        ):
            raise TypeError(
                f"`experts` must be a list of layers. Received: experts={experts!r}."
            )
        if not experts:
            raise ValueError("`experts` must hold at least one layer. Received: [].")
        self.experts = list(experts)
        self.num_experts = len(experts)

    def build(self, input_shape):
        _check_shape(input_shape, self.num_experts)
        groups, _, capacity, hidden = input_shape
        for expert in self.experts:
            # A symbolic call builds any layer, with or without a `build`.
            expert(
                keras.KerasTensor((groups, capacity, hidden), dtype=self.compute_dtype)
            )

    def call(self, inputs):
        slots = ops.unstack(inputs, self.num_experts, axis=1)
        results = [
            expert(tokens) for expert, tokens in zip(self.experts, slots, strict=True)
        ]
        return ops.stack(results, axis=1)

    def compute_output_shape(self, input_shape):
        return input_shape

    def get_config(self):
        experts = [keras.saving.serialize_keras_object(e) for e in self.experts]
        return {**super().get_config(), "experts": experts}

    @classmethod
    def from_config(cls, config):
        return cls(**with_parts(config, "experts"))


def _check_shape(input_shape, num_experts):
    if len(input_shape) != 4 or input_shape[1] != num_experts:
        raise ValueError(
            "Experts take [groups, experts, capacity, hidden] with "
            f"{num_experts} experts. Received: input_shape={input_shape}."
        )
