"""Quantization of the kernel of one expert, and back.

A quantized kernel is one to three arrays, of which an `ExpertDense` stacks those of its
experts: `kernel`, integers `[h, f]`, 4-bit ones as pairs in bytes `[h, f / 2]`;
`kernel_scale` `[1, f]`; and, for int4 in blocks of rows, `kernel_scale` and
`kernel_zero`, both `[blocks, f]`.
"""

import keras
import numpy as np
from keras import ops

NAMES = ("kernel", "kernel_scale", "kernel_zero")


def block_size(config):
    """Returns the number of rows of a block of int4, or `None` for no blocks."""
    size = getattr(config, "block_size", None)
    return None if size in (None, -1) else size


def quantize(kernel, config):
    """Quantizes the kernel of one expert as `keras.layers.Dense` does.

    Args:
        kernel: `[h, f]`.
        config: `keras.quantizers.QuantizationConfig` for int8 or int4.

    Returns:
        A dict of names to arrays.
    """
    size = block_size(config)
    if size is not None:
        parts = keras.quantizers.abs_max_quantize_grouped_with_zero_point(
            kernel, block_size=size, to_numpy=True
        )
    else:
        parts = _weight_quantizer(config)(kernel, to_numpy=True)
    found = dict(zip(NAMES, parts, strict=False))
    if config.mode == "int4":
        found["kernel"], _, _ = keras.quantizers.pack_int4(found["kernel"], axis=-1)
    return {name: ops.convert_to_numpy(x) for name, x in found.items()}


def check_weight_quantizer(config):
    """Raises an error if a config does not give each column of a kernel its scale."""
    if block_size(config) is None:
        _, scale = _weight_quantizer(config)(np.ones((2, 3), "float32"), to_numpy=True)
        if tuple(scale.shape) != (1, 3):
            raise ValueError(
                "`weight_quantizer` must have `axis=0`: each expert's kernel is "
                "quantized alone, as [inputs, outputs]. Received: scales of shape "
                f"{tuple(scale.shape)} for a kernel of shape (2, 3)."
            )


def dequantize(kernel, kernel_scale, kernel_zero=None, *, units, size, dtype):
    """Returns the kernel of one expert, or of a stack of them, as floats.

    Args:
        kernel: int8 `[..., h, f]`, or 4-bit integers `[..., h, f / 2]`.
        kernel_scale: see `quantize`.
        kernel_zero: see `quantize`.
        units: int, `f` if the integers have 4 bits, otherwise `None`.
        size: int, the number of rows of a block.
        dtype: string.

    Returns:
        `[..., h, f]`.
    """
    if units is not None:
        kernel = unpack(kernel, units)
    values, scale = ops.cast(kernel, dtype), ops.cast(kernel_scale, dtype)
    if kernel_zero is None:
        return values / scale
    block = np.arange(values.shape[-2]) // size
    zero = ops.take(ops.cast(kernel_zero, dtype), block, axis=-2)
    return (values - zero) * ops.take(scale, block, axis=-2)


def unpack(pairs, units):
    """Unpacks 4-bit integers along the last axis: int8 `[..., f / 2]` to `[..., f]`."""
    low = ops.bitwise_xor(ops.bitwise_and(pairs, 15), 8) - 8
    both = ops.stack([low, ops.right_shift(pairs, 4)], axis=-1)
    return ops.reshape(both, (*pairs.shape[:-1], -1))[..., :units]


def separate_scales(store, shape, config):
    """Returns the weights of 4-bit experts from a file in which experts share scales.

    Version 0.1.0 wrote such files: the kernels of all experts as one matrix `[h, e·f]`
    of the same numbers in the same order, so that the experts took turns in each
    column. Each expert's kernel is quantized again.

    Args:
        store: dict of arrays `kernel`, `kernel_scale` and `kernel_zero`.
        shape: `(e, h, f)`.
        config: `keras.quantizers.Int4QuantizationConfig`.

    Returns:
        A dict of names to arrays that begin with the expert axis.
    """
    experts, hidden, units = shape
    arrays = {name: ops.convert_to_tensor(x) for name, x in store.items()}
    arrays["kernel_scale"] = ops.reshape(arrays["kernel_scale"], (-1, experts * units))
    whole = dequantize(
        **arrays, units=experts * units, size=block_size(config), dtype="float32"
    )
    kernels = ops.reshape(whole, (experts, hidden, units))
    return stack([quantize(kernel, config) for kernel in kernels])


def stack(parts):
    """Stacks the arrays of experts: a list of dicts to a dict."""
    return {name: np.stack([part[name] for part in parts]) for name in parts[0]}


def _weight_quantizer(config):
    if config.weight_quantizer is not None:
        return config.weight_quantizer
    if config.mode == "int8":
        return keras.quantizers.AbsMaxQuantizer(axis=0)
    return keras.quantizers.AbsMaxQuantizer(
        axis=0, value_range=(-8, 7), output_dtype="int8"
    )
