"""Feed-forward experts of equal size, computed together."""

import functools
import math

import keras

from keras_moe.experts.expert_dense import ExpertDense
from keras_moe.experts.feed_forward import BaseFeedForward
from keras_moe.kernels import GETS_NEW_PAGES, RUNS_OP_BY_OP, ops, split_rows
from keras_moe.utils import checks, memory
from keras_moe.utils.layouts import refuse_layout

# Up to this number, looping over the experts is faster than batching them, which writes
# more to memory.
FEW_EXPERTS = 16

# Tensors of so many numbers are returned to the operating system when they are freed.
LARGE = 2**22


@keras.saving.register_keras_serializable(package="keras_moe")
class FeedForwardExperts(BaseFeedForward):
    """A feed-forward layer for each expert, all of the same size.

    Each expert computes what `FeedForward` computes, with weights of its own. Identity
    experts have no weights: their outputs are their inputs.

    Args:
        num_experts: int, the number of experts `e`.
        d_ff: int, the size `f` of each expert's inner layer.
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
        kernel_initializer: initializer of each expert's kernels `[h, f]` and `[f, h]`.
            Defaults to `None`, `TruncatedNormal(stddev=0.02)`.
        bias_initializer: initializer of each expert's biases `[f]` and `[h]`. Defaults
            to `"zeros"`.
        num_identity_experts: int, how many of the experts, the last ones, are identity
            experts. Defaults to 0.
        remat: bool, whether to recompute the inner layer for the gradient instead of
            keeping it in memory. Defaults to `False`.
        name: string. Defaults to `"experts"`.
        **kwargs: forwarded to `keras.layers.Layer`.

    Call arguments:
        inputs: `[g, e, c, h]`, the tokens in the slots of each expert; with
            `group_sizes` `[a, h]`, rows of tokens sorted by expert.
        group_sizes: int32 `[e]`, the number of rows of each expert. Outputs of the
            remaining rows are 0.
        training: bool, whether to apply dropout.

    Returns:
        A tensor of the shape of the inputs.

    Raises:
        ValueError: if an argument is out of range, or the inputs have another rank or
            number of experts.
        TypeError: if an argument has another type.

    Example:

    ```python
    layer = keras_moe.MoeLayer(
        keras_moe.FeedForwardExperts(8, 64, activation="silu", gated=True),
        keras_moe.MaskedRouter(8),
        train_capacity_factor=None,
        eval_capacity_factor=None,
    )
    layer(np.ones((2, 8, 16))).shape  # (2, 8, 16)
    ```
    """

    def __init__(
        self,
        num_experts,
        d_ff,
        *,
        inner_dropout=0.0,
        output_dropout=0.0,
        activation="gelu",
        gated=False,
        use_bias=True,
        kernel_initializer=None,
        bias_initializer="zeros",
        num_identity_experts=0,
        remat=False,
        name="experts",
        **kwargs,
    ):
        # Set before the base class creates the dense layers.
        self.num_experts = checks.whole_number("num_experts", num_experts)
        self.num_identity_experts = checks.whole_number(
            "num_identity_experts",
            num_identity_experts,
            minimum=0,
            maximum=self.num_experts - 1,
        )
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
        experts = self.num_experts - self.num_identity_experts
        dense = ExpertDense(experts, units, **self._dense_arguments(name))
        dense.inner_is_input = name == "output"
        return dense

    def build(self, input_shape):
        checks.experts_shape(input_shape, self.num_experts)
        if self.num_identity_experts:
            refuse_layout(self, "`num_identity_experts` must be 0")
        groups, experts, *shape = input_shape
        super().build((groups, experts - self.num_identity_experts, *shape))

    def call(self, inputs, group_sizes=None, training=None):
        if not self.num_identity_experts:
            return self._call_experts(inputs, group_sizes, training)
        experts = self.num_experts - self.num_identity_experts
        if group_sizes is None:
            results = self._call_experts(inputs[:, :experts], None, training)
            return ops.concatenate([results, inputs[:, experts:]], axis=1)
        # The rows of identity experts come last, before those of no expert.
        sizes = ops.reshape(group_sizes, (-1, self.num_experts))
        ends = ops.cumsum(sizes, axis=1)
        first, last = ends[:, experts - 1 : experts], ends[:, -1:]
        parts = ops.shape(sizes)[0]
        row = ops.arange(ops.shape(inputs)[0] // parts, dtype=ends.dtype)
        is_identity = ops.logical_and(row >= first, row < last)  # parts rows
        is_identity = ops.reshape(is_identity, (-1, 1))
        sizes = ops.reshape(sizes[:, :experts], (-1,))
        results = self._call_experts(inputs, sizes, training)
        return ops.where(is_identity, inputs, results)

    def _call_experts(self, inputs, group_sizes, training):
        if self._can_loop(inputs, group_sizes):
            return self._loop_over_experts(inputs, group_sizes, training)
        layers = self.dense_layers
        if group_sizes is not None:
            layers = [functools.partial(x, group_sizes=group_sizes) for x in layers]
        return self._feed_forward(inputs, training, *layers)

    def _can_loop(self, inputs, group_sizes):
        return (
            RUNS_OP_BY_OP
            and (not GETS_NEW_PAGES or self._gets_new_pages(inputs))
            and self.num_experts - self.num_identity_experts <= FEW_EXPERTS
            and not self.remat
            and (group_sizes is not None or inputs.shape[0] == 1)
            and all(x.quantization_mode is None for x in self.dense_layers)
        )

    def _gets_new_pages(self, inputs):
        """Returns whether the inner layers of all experts at once get new memory."""
        size = math.prod(inputs.shape[:-1]) * self.d_ff
        return size >= LARGE and not memory.is_kept()

    def _loop_over_experts(self, inputs, group_sizes, training):
        """Computes one expert at a time, so that its rows stay in the cache."""
        if group_sizes is None:
            rows, remaining = ops.unstack(inputs[0]), []
        else:
            *rows, remaining = split_rows(inputs, group_sizes)
            remaining = [ops.zeros_like(remaining)]
        layers = [layer.per_expert_functions() for layer in self.dense_layers]
        results = [
            self._feed_forward(x, training, *dense)
            for x, *dense in zip(rows, *layers, strict=True)
        ]
        if group_sizes is None:
            return ops.expand_dims(ops.stack(results), axis=0)
        return ops.concatenate(results + remaining, axis=0)

    def compute_output_shape(self, inputs_shape, group_sizes_shape=None):
        return inputs_shape

    def get_config(self):
        return {
            **super().get_config(),
            "num_experts": self.num_experts,
            "num_identity_experts": self.num_identity_experts,
        }
