"""A dense layer per expert."""

import functools
import warnings

import keras
import numpy as np

from keras_moe.experts import quantization
from keras_moe.experts.adaptation import AdaptableDense
from keras_moe.kernels import FrozenMatrices, batched_dense, grouped_dense, ops
from keras_moe.utils import initializers
from keras_moe.utils.layouts import lay_out_expert_weight

# The modes in which this module quantizes; Keras does the others.
INTEGERS = ("int8", "int4")


# The name of the class is in files, as that of every layer that a list holds.
class ExpertDense(AdaptableDense, keras.layers.EinsumDense):
    """A dense layer per expert: `[g, e, c, h]` to `[g, e, c, units]`.

    A `keras.layers.EinsumDense` whose experts have adapters (LoRA) and scales of their
    own. For one group, the usual case, it computes a batched matrix product without a
    transpose. With `group_sizes` it takes rows sorted by expert: `[a, h]` to
    `[a, units]`.

    Args:
        num_experts: int, the number of experts `e`.
        units: int, the size of the outputs.
        use_bias: bool.
        kernel_initializer: initializer of each expert's kernel `[h, units]`.
        bias_initializer: initializer of each expert's bias `[units]`.
        **kwargs: forwarded to `keras.layers.EinsumDense`.
    """

    # Whether rows are sorted by expert, which float8 does not support.
    takes_rows = False
    # Whether its inputs are the inner layer of an expert, instead of its outputs.
    inner_is_input = False

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
            rank,
            lora_alpha,
            a_initializer=initializers.Stacked(a),
            b_initializer=initializers.Stacked(b),
        )

    def add_weight(self, shape=None, *args, name=None, **kwargs):
        if name == "lora_kernel_b":  # Keras has one for all experts.
            shape = (self.num_experts, *shape)
        if shape and shape[0] == self.num_experts:
            lay_out_expert_weight(f"{self.path}/{name}", shape, self._inner_of(name))
        return super().add_weight(shape, *args, name=name, **kwargs)

    def _inner_of(self, name):
        """Returns which axis of a weight belongs to the inner layer of an expert."""
        if self.inner_is_input:
            return None if name == "lora_kernel_b" else 1
        return None if name == "lora_kernel_a" else 2

    def build(self, input_shape):
        super().build(input_shape)
        self.input_spec = keras.InputSpec(axes={-1: input_shape[-1]})

    def call(self, inputs, group_sizes=None, training=None):
        if group_sizes is not None:
            return self._call_on_rows(inputs, group_sizes)
        if inputs.shape[0] == 1:
            outputs = self._call_on_slots(ops.squeeze(inputs, axis=0), ops.matmul)
            return ops.expand_dims(outputs, axis=0)
        if self._is_integer:
            groups, experts, _, hidden = ops.shape(inputs)
            x = ops.reshape(ops.swapaxes(inputs, 0, 1), (experts, -1, hidden))
            outputs = self._call_on_slots(x, ops.matmul)
            outputs = ops.reshape(outputs, (experts, groups, -1, self.units))
            return ops.swapaxes(outputs, 0, 1)
        return self._call_on_slots(inputs, functools.partial(ops.einsum, self.equation))

    def quantized_call(self, inputs, group_sizes=None, training=None):
        if self._is_integer:
            return self.call(inputs, group_sizes, training)
        return super().quantized_call(inputs, training=training)

    def _call_on_slots(self, x, multiply):
        """Returns the outputs for `x`, whose layout `multiply` knows."""
        if self._is_integer:
            inputs = x if self.inputs_quantizer is None else self._rounded(x)
            outputs = batched_dense(inputs, self._frozen_kernel())
        else:
            outputs = multiply(x, self._kernel)
        outputs = self._with_adapters(outputs, x, multiply)
        return outputs if self.bias is None else outputs + self.bias

    def _call_on_rows(self, rows, group_sizes):
        def multiply(x, kernel, bias=None):
            return grouped_dense(x, kernel, bias, group_sizes)

        bias = None if self.bias is None else ops.convert_to_tensor(self.bias)
        if self._is_integer:
            kernel = self._frozen_kernel()
        else:
            kernel = ops.convert_to_tensor(self._kernel)
        return self._with_adapters(multiply(rows, kernel, bias), rows, multiply)

    def _with_adapters(self, outputs, x, multiply):
        """Adds what the adapters compute for `x`."""
        if not self.lora_enabled:
            return outputs
        a, b = self.lora_kernel_a, self._lora_scale * self.lora_kernel_b
        a, b = (ops.cast(w, self.compute_dtype) for w in (a, b))
        return outputs + multiply(multiply(x, a), b)

    @property
    def _lora_scale(self):
        return self.lora_alpha / self.lora_rank

    def _rounded(self, x):
        """Returns inputs as a quantizer rounds them; the gradient is that of `x`.

        They are multiplied as floats: products of integers are slow on a CPU.
        """
        integers, scale = self.inputs_quantizer(x, axis=-1)
        rounded = ops.cast(ops.cast(integers, scale.dtype) / scale, x.dtype)
        return x + ops.stop_gradient(rounded - x)

    def per_expert_functions(self):
        """Returns a function from `[n, h]` to `[n, units]` for each expert."""
        weights = {"kernel": self._kernel, "bias": self.bias}
        if self.lora_enabled:
            b = self._lora_scale * self.lora_kernel_b
            weights |= {"a": self.lora_kernel_a, "b": b}
        weights = {
            name: ops.unstack(ops.convert_to_tensor(weight))
            for name, weight in weights.items()
            if weight is not None
        }
        return [
            functools.partial(_dense, **dict(zip(weights, values, strict=True)))
            for values in zip(*weights.values(), strict=True)
        ]

    @property
    def kernel(self):
        """The kernel `[e, h, units]`, with adapters; integers if quantized to some."""
        if not (self.built and self._is_integer):
            return super().kernel
        if self.quantization_mode == "int8":
            return self._kernel
        kernel = ops.convert_to_tensor(self._kernel)
        return quantization.unpack(kernel, self.original_kernel_shape[1])

    @property
    def _is_integer(self):
        return self.quantization_mode in INTEGERS

    def _frozen_kernel(self, dtype=None):
        """The quantized kernels, each of which is made when it is needed."""
        weights = [self._kernel, self.kernel_scale, getattr(self, "kernel_zero", None)]
        arrays = (ops.convert_to_tensor(w) for w in weights if w is not None)
        make = functools.partial(
            quantization.dequantize,
            mode=self.quantization_mode,
            rows=self.original_kernel_shape[1],
            size=quantization.block_size(self.quantization_config),
            dtype=dtype or self.compute_dtype,
        )
        return FrozenMatrices(make, tuple(arrays), self.original_kernel_shape)

    def kernel_of_expert(self, i):
        """Returns the kernel `[h, units]` of an expert with its adapter, as numpy."""
        if self._is_integer:
            kernel = self._frozen_kernel("float32")[i]
        else:
            kernel = self._kernel[i]
        kernel = ops.convert_to_numpy(kernel)
        if not self.lora_enabled:
            return kernel
        a, b = (
            ops.convert_to_numpy(w[i]) for w in (self.lora_kernel_a, self.lora_kernel_b)
        )
        return kernel + (self._lora_scale * (a @ b)).astype(kernel.dtype)

    def _merged_variables(self):
        if not self._is_integer:
            return super()._merged_variables()
        kernels = map(self.kernel_of_expert, range(self.num_experts))
        config = self.quantization_config
        found = quantization.stack([quantization.quantize(k, config) for k in kernels])
        kernel = found.pop("kernel")
        bias = [] if self.bias is None else [ops.convert_to_numpy(self.bias)]
        in_order = [kernel, *bias, *found.values()]
        return {str(i): value for i, value in enumerate(in_order)}

    def check_quantization(self, mode, config=None):
        super().check_quantization(mode, config)
        mode = mode or config.mode
        if mode in ("gptq", "awq"):
            raise ValueError(
                f"Experts cannot be quantized with {mode!r}, which is for kernels of "
                "two axes and of attention. Use 'int8' or 'int4'. "
                f"{self.path!r} has not been changed."
            )
        if mode not in (*INTEGERS, "float8"):
            raise ValueError(
                "Experts are quantized with 'int8', 'int4' or 'float8'. Received: "
                f"mode={mode!r}. {self.path!r} has not been changed."
            )
        if self.takes_rows and mode == "float8":
            raise ValueError(
                "Experts without a capacity cannot be quantized with 'float8', which "
                "scales all rows alike. Use 'int8' or 'int4'. "
                f"{self.path!r} has not been changed."
            )
        if mode in INTEGERS and config is not None:
            quantization.check_weight_quantizer(config)

    def quantize(self, mode=None, type_check=True, config=None):
        self.check_quantization(mode, config)
        if mode not in INTEGERS:
            return super().quantize(mode, config=config)
        shape, policy = tuple(self._kernel.shape), self.dtype_policy.name
        parts = [
            quantization.quantize(self._kernel[i], config)
            for i in range(self.num_experts)
        ]
        del self._kernel
        self.quantized_build(shape, mode, config)
        for name, value in quantization.stack(parts).items():
            weight = self._kernel if name == "kernel" else getattr(self, name)
            weight.assign(value)
        if mode == "int4":
            mode = f"int4/{quantization.block_size(config) or -1}"
        self.dtype_policy = keras.dtype_policies.get(f"{mode}_from_{policy}")

    def quantized_build(self, kernel_shape, mode, config=None):
        if mode not in INTEGERS:
            return super().quantized_build(kernel_shape, mode, config)
        if config is None:  # Of a dtype policy.
            size = getattr(self.dtype_policy, "block_size", None)
            config = {
                "int8": keras.quantizers.Int8QuantizationConfig,
                "int4": functools.partial(
                    keras.quantizers.Int4QuantizationConfig, block_size=size
                ),
            }[mode]()
        self.quantization_config = config
        self.inputs_quantizer = config.activation_quantizer
        experts, hidden, units = self.original_kernel_shape = tuple(kernel_shape)
        size = quantization.block_size(config)
        scale_shape = (experts, 1 if size is None else -(-hidden // size), units)
        constant = {"trainable": False, "initializer": "zeros"}
        if mode == "int8":
            of_kernel = {"shape": kernel_shape, "dtype": "int8"}
        else:
            of_kernel = {"shape": (experts, -(-hidden // 2), units), "dtype": "uint8"}
        self._kernel = self.add_weight(name="kernel", **of_kernel, **constant)
        self.kernel_scale = self.add_weight(
            scale_shape, name="kernel_scale", trainable=False, initializer="ones"
        )
        if size is not None:
            self.kernel_zero = self.add_weight(
                scale_shape, name="kernel_zero", dtype="int8", **constant
            )
        self._is_quantized = True

    def _load(self, found):
        if self.built and self._is_integer and "0" in found:
            found = self._of_this_version(found)
        super()._load(found)

    def _of_this_version(self, found):
        """Returns the variables of a file, also if it is of version 0.1.0."""
        first = 1 if self.bias is None else 2
        names = {
            "0": "kernel",
            str(first): "kernel_scale",
            str(first + 1): "kernel_zero",
        }
        stored = {names[key]: x[...] for key, x in found.items() if key in names}
        if self.quantization_mode == "int8" and "kernel_scale" in stored:
            scale = np.reshape(stored["kernel_scale"], self.kernel_scale.shape)
            return {**found, str(first): scale}
        if self.quantization_mode == "int4" and len(stored["kernel"].shape) == 2:
            warnings.warn(
                f"The 4-bit experts of {self.path!r} share scales in this file of an "
                "earlier version. They are quantized again, each alone, which changes "
                "outputs slightly. Save the model once more.",
                stacklevel=2,
            )
            stored = quantization.separate_scales(
                stored, self.original_kernel_shape, self.quantization_config
            )
            found.pop(str(first + 2), None)  # The block of each row.
            return {**found, **{k: stored[n] for k, n in names.items() if n in stored}}
        return found


def _dense(x, kernel, bias=None, a=None, b=None):
    outputs = ops.matmul(x, kernel)
    if a is not None:
        outputs = outputs + ops.matmul(ops.matmul(x, a), b)
    return outputs if bias is None else outputs + bias
