"""A dense layer for each expert."""

import functools

import keras
from keras import ops

from keras_moe.kernels import grouped_dense


class ExpertDense(keras.layers.EinsumDense):
    """A dense layer for each expert: `[g, e, c, h]` to `[g, e, c, units]`.

    It is an `EinsumDense`, with its `kernel` and LoRA, but takes the matrix
    product of one group, the usual case, as it lies in memory; and with
    `group_sizes` it takes rows sorted by expert: `[a, h]` to `[a, units]`.
    `quantize` refuses every subclass of `EinsumDense`, so this one too.
    """

    def __init__(self, num_experts, units, use_bias=True, **kwargs):
        super().__init__(
            "gech,ehf->gecf",
            output_shape=(num_experts, None, units),
            bias_axes="ef" if use_bias else None,
            **kwargs,
        )

    def build(self, input_shape):
        super().build(input_shape)
        self.input_spec = keras.InputSpec(axes={-1: input_shape[-1]})

    def call(self, inputs, group_sizes=None, training=None):
        if group_sizes is not None:
            kernel = ops.convert_to_tensor(self.kernel)
            bias = None if self.bias is None else ops.convert_to_tensor(self.bias)
            return grouped_dense(inputs, kernel, bias, group_sizes)
        if inputs.shape[0] != 1:
            return super().call(inputs, training=training)
        outputs = ops.matmul(ops.squeeze(inputs, axis=0), self.kernel)
        if self.bias is not None:
            outputs = outputs + self.bias
        return ops.expand_dims(outputs, axis=0)

    def of_each_expert(self):
        """For each expert, a function from `[n, h]` to `[n, units]`."""
        kernels = ops.unstack(ops.convert_to_tensor(self.kernel))
        if self.bias is None:
            return [functools.partial(ops.matmul, x2=kernel) for kernel in kernels]
        biases = ops.unstack(ops.convert_to_tensor(self.bias))
        return [
            functools.partial(_dense, kernel=kernel, bias=bias)
            for kernel, bias in zip(kernels, biases, strict=True)
        ]


def _dense(x, kernel, bias):
    return ops.matmul(x, kernel) + bias
