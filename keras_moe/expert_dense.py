"""A dense layer for each expert."""

import functools

import keras
from keras import ops

from keras_moe.kernels import grouped_dense


class ExpertDense(keras.layers.EinsumDense):
    """A dense layer for each expert: `[g, e, c, h]` to `[g, e, c, units]`.

    It is an `EinsumDense`, with its `kernel`, LoRA and quantisation, but takes
    the matrix product of one group, the usual case, as it lies in memory; and
    with `group_sizes` it takes rows sorted by expert: `[a, h]` to `[a, units]`.
    """

    def __init__(self, num_experts, units, use_bias=True, **kwargs):
        super().__init__(
            "gech,ehf->gecf",
            output_shape=(num_experts, None, units),
            bias_axes="ef" if use_bias else None,
            **kwargs,
        )
        self.units = units

    def build(self, input_shape):
        super().build(input_shape)
        self.input_spec = keras.InputSpec(axes={-1: input_shape[-1]})

    def call(self, inputs, group_sizes=None, training=None):
        if group_sizes is not None:
            return self._of_rows(inputs, group_sizes)
        if inputs.shape[0] != 1:
            return super().call(inputs, training=training)
        outputs = ops.matmul(ops.squeeze(inputs, axis=0), self.kernel)
        if self.bias is not None:
            outputs = outputs + self.bias
        return ops.expand_dims(outputs, axis=0)

    def quantized_call(self, inputs, group_sizes=None, training=None):
        if group_sizes is not None:
            return self._of_rows(inputs, group_sizes)
        return super().quantized_call(inputs, training=training)

    def quantize(self, mode=None, type_check=True, config=None):
        # The check is for subclasses that the quantised calls do not know.
        super().quantize(mode, type_check=False, config=config)

    def _of_rows(self, rows, group_sizes):
        bias = None if self.bias is None else ops.convert_to_tensor(self.bias)
        return grouped_dense(rows, self._float_kernel(), bias, group_sizes)

    def _float_kernel(self):
        """`[e, h, units]`, of a quantised kernel what it stands for."""
        if self.quantization_mode is None:
            return ops.convert_to_tensor(self.kernel)
        if self.quantization_mode != "int8":
            raise ValueError(
                "Without a capacity, experts can be quantised to int8 only. "
                f"Received: {self.quantization_mode}."
            )
        # With LoRA, `kernel` adds to the int8 numbers as if these had no scale.
        kernel = next(w for w in self.weights if w.name == "kernel")
        experts, _, units = kernel.shape
        kernel = ops.cast(ops.convert_to_tensor(kernel), self.compute_dtype)
        scale = ops.reshape(self.kernel_scale, (experts, 1, units))
        kernel = kernel / ops.cast(scale, self.compute_dtype)
        if self.lora_enabled:
            change = ops.matmul(self.lora_kernel_a, self.lora_kernel_b)
            change = self.lora_alpha / self.lora_rank * change
            kernel = kernel + ops.cast(change, self.compute_dtype)
        return kernel

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
