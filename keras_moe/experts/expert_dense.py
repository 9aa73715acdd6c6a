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

    A `keras.layers.EinsumDense`, with its `kernel` and quantization, and an adapter
    (LoRA) per expert. For one group, the usual case, it computes a batched matrix
    product without a transpose. With `group_sizes` it takes rows sorted by expert:
    `[a, h]` to `[a, units]`.

    Args:
        num_experts: int, the number of experts `e`.
        units: int, the size of the outputs.
        use_bias: bool.
        kernel_initializer: initializer of each expert's kernel `[h, units]`.
        bias_initializer: initializer of each expert's bias `[units]`.
        **kwargs: forwarded to `keras.layers.EinsumDense`.
    """

    # Whether rows are sorted by expert in inference, which int8 alone supports.
    takes_rows = False

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

    def enable_lora(
        self, rank, lora_alpha=None, a_initializer="he_uniform", b_initializer="zeros"
    ):
        """Adds an adapter to each expert, and freezes the kernels.

        Args:
            rank: int, the rank `r` of the adapters: `A` is `[e, h, r]`, and `B` is
                `[e, r, units]`.
            lora_alpha: float; an adapter adds `lora_alpha / rank · x · A · B`. Defaults
                to `rank`.
            a_initializer: initializer of each `A`.
            b_initializer: initializer of each `B`.

        Reference:
            [Hu et al., 2021](https://arxiv.org/abs/2106.09685), equation 3.
        """
        a, b = (keras.initializers.get(x) for x in (a_initializer, b_initializer))
        super().enable_lora(
            rank, lora_alpha, initializers.Stacked(a), initializers.Stacked(b)
        )

    def add_weight(self, shape=None, *args, name=None, **kwargs):
        if name == "lora_kernel_b":  # Keras has one for all experts.
            shape = (self.num_experts, *shape)
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
            multiply = functools.partial(ops.einsum, self.equation)
            return self._compute(inputs, multiply)
        outputs = self._compute(ops.squeeze(inputs, axis=0), ops.matmul)
        return ops.expand_dims(outputs, axis=0)

    def _compute(self, x, multiply):
        """Returns `x · kernel + bias`, where `multiply` knows the layout of `x`."""
        outputs = multiply(x, self._stored_kernel)
        outputs = self._with_adapters(outputs, x, multiply)
        return outputs if self.bias is None else outputs + self.bias

    def _with_adapters(self, outputs, x, multiply):
        """Adds what the adapters compute for `x`."""
        if not self.lora_enabled:
            return outputs
        change = multiply(multiply(x, self.lora_kernel_a), self.lora_kernel_b)
        return outputs + (self.lora_alpha / self.lora_rank) * change

    @property
    def _stored_kernel(self):
        """The kernel without adapters, which the property `kernel` adds."""
        if not self.lora_enabled:
            return self.kernel
        return next(w for w in self.weights if w.name == "kernel")

    def quantized_call(self, inputs, group_sizes=None, training=None):
        if group_sizes is not None:
            return self._call_on_rows(inputs, group_sizes)
        return super().quantized_call(inputs, training=training)

    def quantize(self, mode=None, type_check=True, config=None):
        self._check_quantization(mode or getattr(config, "mode", None))
        # The type check rejects subclasses of `EinsumDense`.
        super().quantize(mode, type_check=False, config=config)

    def _check_quantization(self, mode):
        """Raises an error for a mode that cannot work, before anything is changed."""
        if mode in ("gptq", "awq"):
            raise ValueError(
                f"Experts cannot be quantized with {mode!r}, which is for kernels of "
                "two axes and of attention. Use 'int8' or 'int4'. "
                f"{self.path!r} has not been changed."
            )
        if self.takes_rows and mode in ("int4", "float8"):
            raise ValueError(
                "Without a capacity in inference, experts support int8 quantization "
                f"only. Received: {mode!r}. {self.path!r} has not been changed."
            )

    def per_expert_functions(self):
        """Returns a function from `[n, h]` to `[n, units]` for each expert."""
        kernel = self._stored_kernel
        weights = {"kernel": kernel, "bias": self.bias}
        if self.lora_enabled:
            scale = self.lora_alpha / self.lora_rank
            weights |= {"a": self.lora_kernel_a, "b": scale * self.lora_kernel_b}
        weights = {
            name: ops.unstack(ops.convert_to_tensor(weight))
            for name, weight in weights.items()
            if weight is not None
        }
        return [
            functools.partial(_dense, **dict(zip(weights, values, strict=True)))
            for values in zip(*weights.values(), strict=True)
        ]

    def _call_on_rows(self, rows, group_sizes):
        def multiply(x, kernel, bias=None):
            return grouped_dense(x, ops.convert_to_tensor(kernel), bias, group_sizes)

        bias = None if self.bias is None else ops.convert_to_tensor(self.bias)
        outputs = multiply(rows, self._float_kernel(), bias)
        return self._with_adapters(outputs, rows, multiply)

    def _float_kernel(self):
        """Returns the kernel without adapters, dequantized if needed."""
        if self.quantization_mode is None:
            return self._stored_kernel
        if self.quantization_mode != "int8":
            raise ValueError(
                "Without a capacity, experts support int8 quantization only. "
                f"Received: {self.quantization_mode}."
            )
        kernel = self._stored_kernel
        experts, _, units = kernel.shape
        kernel = ops.cast(ops.convert_to_tensor(kernel), self.compute_dtype)
        scale = ops.reshape(self.kernel_scale, (experts, 1, units))
        return kernel / ops.cast(scale, self.compute_dtype)


def _dense(x, kernel, bias=None, a=None, b=None):
    outputs = ops.matmul(x, kernel)
    if a is not None:
        outputs = outputs + ops.matmul(ops.matmul(x, a), b)
    return outputs if bias is None else outputs + bias
