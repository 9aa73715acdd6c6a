"""Quantization of the kernel of one expert, and back.

A quantized kernel is one to three arrays, of which an `ExpertDense` stacks those of its
experts: `kernel`, int8 `[h, f]`, or pairs of 4-bit integers in bytes `[h / 2, f]`;
`kernel_scale` `[1, f]`; and, for int4 in blocks of rows, `kernel_scale` and
`kernel_zero`, both `[blocks, f]`.
"""

import keras
import numpy as np

from keras_moe.kernels import ops

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
    parts = map(ops.convert_to_numpy, parts)
    found = dict(zip(NAMES, parts, strict=False))
    if config.mode == "int4":
        found["kernel"] = pack(found["kernel"])
    return found


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


def dequantize(kernel, kernel_scale, kernel_zero=None, *, mode, rows, size, dtype):
    """Returns the kernel of one expert, or of a stack of them, as floats.

    Args:
        kernel: see `quantize`.
        kernel_scale: see `quantize`.
        kernel_zero: see `quantize`.
        mode: string, `"int8"` or `"int4"`.
        rows: int, `h`.
        size: int, the number of rows of a block, or `None`.
        dtype: string.

    Returns:
        `[..., h, f]`.
    """
    values = unpack(kernel, rows) if mode == "int4" else kernel
    scale = ops.cast(kernel_scale, dtype)
    if kernel_zero is None:
        return ops.cast(values, dtype) / scale
    shape, size = values.shape, min(size, rows)
    if rows % size:
        block = np.arange(rows) // size
        scale, zero = (ops.take(x, block, axis=-2) for x in (scale, kernel_zero))
    else:
        values = ops.reshape(values, (*shape[:-2], -1, size, shape[-1]))
        scale, zero = (ops.expand_dims(x, axis=-2) for x in (scale, kernel_zero))
    # The difference of integers is exact, and small.
    return ops.reshape(ops.cast(values - zero, dtype) * scale, shape)


def pack(values):
    """Packs 4-bit integers in pairs: int8 `[h, f]` to uint8 `[h / 2, f]`.

    The first half of the rows is in the lower bits.
    """
    nibbles = (np.asarray(values) + 8).astype("uint8")
    nibbles = np.pad(nibbles, ((0, len(nibbles) % 2), (0, 0)))
    low, high = np.split(nibbles, 2)
    return low | (high << 4)


def unpack(pairs, rows):
    """Reverses `pack`: uint8 `[..., h / 2, f]` to int8 `[..., h, f]`."""
    *stack, half, columns = pairs.shape
    shifts = ops.convert_to_tensor(np.array([[[0]], [[4]]], "uint8"))
    nibbles = ops.right_shift(ops.expand_dims(pairs, axis=-3), shifts)
    nibbles = ops.cast(ops.bitwise_and(nibbles, 15), "int8") - ops.cast(8, "int8")
    return ops.reshape(nibbles, (*stack, 2 * half, columns))[..., :rows, :]


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
    values = keras.quantizers.unpack_int4(
        ops.convert_to_tensor(store["kernel"]), experts * units, axis=-1
    )
    values = ops.convert_to_numpy(values).astype("float32")
    if "kernel_zero" in store:
        block = np.arange(hidden) // block_size(config)
        whole = (values - store["kernel_zero"][block]) * store["kernel_scale"][block]
    else:
        whole = values / store["kernel_scale"]
    kernels = whole.reshape(experts, hidden, units)
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
