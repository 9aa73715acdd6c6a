"""A dense layer per expert."""

import functools

import keras
from keras import ops

from keras_moe.kernels import grouped_dense
from keras_moe.utils import initializers
from keras_moe.utils.layouts import lay_out_expert_weight


# The name of the class is in files, as that of every layer that a list holds.
class ExpertDense(keras.layers.EinsumDense):
    """A dense layer per expert: `[g, e, c, h]` to `[g, e, c, units]`.

    A `keras.layers.EinsumDense`, with its `kernel`, LoRA and quantization. For one
    group, the usual case, it computes a batched matrix product without a transpose.
    With `group_sizes` it takes rows sorted by expert: `[a, h]` to `[a, units]`.

    Args:
        num_experts: int, the number of experts `e`.
        units: int, the size of the outputs.
        use_bias: bool.
        kernel_initializer: initializer of each expert's kernel `[h, units]`.
        bias_initializer: initializer of each expert's bias `[units]`.
        **kwargs: forwarded to `keras.layers.EinsumDense`.
    """

    def __init__(
        self,
        num_experts,
        units,
        use_bias=True,
        kernel_initializer="glorot_uniform",
        bias_initializer="zeros",
        **kwargs,
    ):
        kernel = keras.initializers.get(kernel_initializer)
        bias = keras.initializers.get(bias_initializer)
        super().__init__(
            "gech,ehf->gecf",
            output_shape=(num_experts, None, units),
            bias_axes="ef" if use_bias else None,
            kernel_initializer=initializers.Stacked(kernel),
            bias_initializer=initializers.Stacked(bias, bias=True),
            **kwargs,
        )
        self.num_experts, self.units = num_experts, units

    def add_weight(self, shape=None, *args, name=None, **kwargs):
        if shape and shape[0] == self.num_experts:
            lay_out_expert_weight(f"{self.path}/{name}", shape)
        return super().add_weight(shape, *args, name=name, **kwargs)

    def build(self, input_shape):
        super().build(input_shape)
        self.input_spec = keras.InputSpec(axes={-1: input_shape[-1]})

    def call(self, inputs, group_sizes=None, training=None):
        if group_sizes is not None:
            return self._call_on_rows(inputs, group_sizes)
        if inputs.shape[0] != 1:
            return super().call(inputs, training=training)
        outputs = ops.matmul(ops.squeeze(inputs, axis=0), self.kernel)
        if self.bias is not None:
            outputs = outputs + self.bias
        return ops.expand_dims(outputs, axis=0)

    def quantized_call(self, inputs, group_sizes=None, training=None):
        if group_sizes is not None:
            return self._call_on_rows(inputs, group_sizes)
        return super().quantized_call(inputs, training=training)

    def quantize(self, mode=None, type_check=True, config=None):
        # The type check rejects subclasses of `EinsumDense`.
        super().quantize(mode, type_check=False, config=config)

    def per_expert_functions(self):
        """Returns a function from `[n, h]` to `[n, units]` for each expert."""
        kernels = ops.unstack(ops.convert_to_tensor(self.kernel))
        if self.bias is None:
            return [functools.partial(ops.matmul, x2=kernel) for kernel in kernels]
        biases = ops.unstack(ops.convert_to_tensor(self.bias))
        return [
            functools.partial(_dense, kernel=kernel, bias=bias)
            for kernel, bias in zip(kernels, biases, strict=True)
        ]

    def _call_on_rows(self, rows, group_sizes):
        bias = None if self.bias is None else ops.convert_to_tensor(self.bias)
        return grouped_dense(rows, self._float_kernel(), bias, group_sizes)

    def _float_kernel(self):
        """Returns the kernel `[e, h, units]`, dequantized if needed."""
        if self.quantization_mode is None:
            return ops.convert_to_tensor(self.kernel)
        if self.quantization_mode != "int8":
            raise ValueError(
                "Without a capacity, experts support int8 quantization only. "
                f"Received: {self.quantization_mode}."
            )
        # With LoRA, the property `kernel` adds float values to unscaled int8 values.
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


def _dense(x, kernel, bias):
    return ops.matmul(x, kernel) + bias
