"""Decoding of compressed tensors: FP8 with a scale per block, and MXFP4."""

import math

import numpy as np

from keras_moe.convert.sources import as_numpy, dtype_name

FLOATS = ("float16", "bfloat16", "float32", "float64")
FLOAT8 = ("float8_e4m3fn", "float8_e5m2")
# The ends of names that only these formats have.
UNKNOWN_FORMATS = {
    "GPTQ or AWQ": (".qweight", ".qzeros", ".g_idx"),
    "compressed-tensors": (".weight_packed", ".weight_shape"),
    "bitsandbytes": (".absmax", ".quant_map", ".SCB"),
    "FP8 with one scale, or NVFP4": (".weight_scale", ".weight_scale_2"),
}
# The values of 4 bits: a sign, two bits of exponent, and one of mantissa.
FP4_VALUES = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)
FP4_VALUES = np.concatenate([FP4_VALUES, -FP4_VALUES])


def decode_fp8(weight, scale, block_shape=(128, 128)):
    """Decodes FP8 with a scale per block.

    `weight[i, j] * scale[i // m, j // n]` for blocks of `m` rows and `n` columns.

    Args:
        weight: float8 `[..., rows, columns]`.
        scale: float `[..., ceil(rows / m), ceil(columns / n)]`.
        block_shape: pair of ints. Defaults to `(128, 128)`.

    Returns:
        float32 array of the shape of `weight`.

    Example:

    ```python
    weight, scale = np.ones((256, 128)), np.array([[0.5], [2.0]])
    keras_moe.convert.decode_fp8(weight, scale)[[0, 128], 0]  # [0.5, 2.0]
    ```

    Reference:
        [DeepSeek-AI, 2024](https://arxiv.org/abs/2412.19437), section 3.3.2.
    """
    scale = np.asarray(scale).astype(np.float32)
    for axis, size in zip((-2, -1), block_shape, strict=True):
        scale = np.repeat(scale, size, axis=axis)
        scale = np.take(scale, np.arange(weight.shape[axis]), axis=axis)
    return np.asarray(weight).astype(np.float32) * scale


def decode_mxfp4(blocks, scales):
    """Decodes MXFP4: 4-bit floats with a power of 2 per 32 of them.

    A byte holds two values, the first in its low bits. The value of the 4 bits is
    multiplied by `2 ** (scale - 127)`.

    Args:
        blocks: uint8 `[..., n, 16]`.
        scales: uint8 `[..., n]`.

    Returns:
        float32 `[..., 32 * n]`.

    Example:

    ```python
    blocks, scales = np.full((1, 16), 0x72, "uint8"), np.array([128], "uint8")
    keras_moe.convert.decode_mxfp4(blocks, scales)[:2]  # [2.0, 12.0]
    ```

    Reference:
        [Open Compute Project, 2023](https://www.opencompute.org/documents/ocp-microscaling-formats-mx-v1-0-spec-final-pdf),
        sections 5.3.3 and 5.4.1.
    """
    values = FP4_VALUES[np.stack([blocks & 15, blocks >> 4], axis=-1)]
    values = values.reshape(*scales.shape, 32)
    values = np.ldexp(values, scales.astype(np.int32)[..., None] - 127)
    return values.reshape(*scales.shape[:-1], -1)


class Compressed:
    """A tensor that is decoded when it is used, as a whole or expert by expert."""

    dtype = np.dtype(np.float32)


class BlockScaled(Compressed):
    """A tensor of FP8 and its scales."""

    def __init__(self, weight, scale, block_shape):
        self.weight, self.scale, self.block_shape = weight, scale, block_shape
        self.shape = tuple(weight.shape)

    @property
    def problem(self):
        """What is wrong with the values or the scales, or `None`."""
        if dtype_name(self.weight) not in FLOAT8:
            return f"has a scale, but not float8 values: {dtype_name(self.weight)}"
        pairs = zip(self.shape[-2:], self.block_shape, strict=True)
        blocks = tuple(math.ceil(n / size) for n, size in pairs)
        expected = (*self.shape[:-2], *blocks)
        if tuple(self.scale.shape) != expected:
            return (
                f"has scales of shape {tuple(self.scale.shape)} instead of {expected}, "
                f"one for each block of {tuple(self.block_shape)}"
            )
        return None

    def __getitem__(self, i):
        one = as_numpy(self.weight)[i], as_numpy(self.scale)[i]
        return decode_fp8(*one, self.block_shape)

    def __array__(self, dtype=None, copy=None):
        arrays = as_numpy(self.weight), as_numpy(self.scale)
        return decode_fp8(*arrays, self.block_shape)


class MicroScaled(Compressed):
    """A tensor `[e, h, f]` in MXFP4, as the rows of its transpose."""

    def __init__(self, blocks, scales):
        self.blocks, self.scales = blocks, scales
        experts, columns, n = scales.shape
        self.shape = (experts, 32 * n, columns)

    @property
    def problem(self):
        """What is wrong with the blocks, or `None`."""
        names = {dtype_name(self.blocks), dtype_name(self.scales)}
        if names != {"uint8"}:
            return f"has blocks and scales of {sorted(names)} instead of uint8"
        expected = (*self.scales.shape, 16)
        if tuple(self.blocks.shape) != expected:
            return (
                f"has blocks of shape {tuple(self.blocks.shape)} instead of {expected}"
            )
        return None

    def __getitem__(self, i):
        decoded = decode_mxfp4(as_numpy(self.blocks)[i], as_numpy(self.scales)[i])
        return np.swapaxes(decoded, -1, -2)

    def __array__(self, dtype=None, copy=None):
        return self[:]


def decoded(tensors, block_shape=None):
    """Replaces compressed tensors by those that they stand for.

    Args:
        tensors: dict of names to tensors.
        block_shape: pair of ints, the blocks of FP8. Defaults to `None`, 128 x 128.

    Returns:
        A dict, in which each value has a `shape` and a `dtype`.

    Raises:
        ValueError: for compressed tensors of another format.
    """
    check_is_known(tensors)
    result = dict(tensors)
    for name in tensors:
        base = name.removesuffix("_scale_inv")
        if name.endswith(".scale"):  # The name in files of DeepSeek-V4.
            base = f"{name.removesuffix('.scale')}.weight"
        if base != name and base in tensors:
            scale = result.pop(name)
            result[base] = BlockScaled(tensors[base], scale, block_shape or (128, 128))
        base = name.removesuffix("_blocks")
        if base != name and f"{base}_scales" in tensors:
            scales = result.pop(f"{base}_scales")
            result[base] = MicroScaled(result.pop(name), scales)
    return result


def check_is_known(tensors):
    """Raises a ValueError for names of formats that cannot be decoded."""
    for format, ends in UNKNOWN_FORMATS.items():
        found = [name for name in tensors if name.endswith(ends)]
        if found:
            raise ValueError(
                f"The tensors are compressed by {format}, which cannot be decoded. "
                f"Received: {found[0]}."
            )


def problem_of(tensor):
    """Returns what keeps a tensor from being read, as a string, or `None`."""
    name = dtype_name(tensor)
    if name == "object":
        return f"must be an array or a tensor of floats, not {type(tensor).__name__}"
    if getattr(tensor, "is_meta", False):
        return "has no values, on the device 'meta'"
    if name in FLOAT8:
        return f"has no scale for its {name} values"
    if name not in FLOATS:
        return f"must have floats, not {name}"
    return getattr(tensor, "problem", None)
