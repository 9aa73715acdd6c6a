"""`keras.ops` for PyTorch, without the checks of each call where they find nothing.

Before an op of `keras.ops` runs, it looks for symbolic tensors in its arguments and
converts these, which takes longer than most of the small ops of a routing. Here the
most frequent ones run at once if their arguments are tensors on Keras's device; all
others, and other arguments, are those of `keras.ops`.
"""

import functools

import keras
import torch
from keras import ops


def __getattr__(name):
    return getattr(ops, name)


def _is_plain(x):
    return type(x) is torch.Tensor and x.device == (_device or _find_device())


# The device of Keras, once it is known.
_device = None


def _find_device():
    global _device
    device = ops.zeros(()).device
    if device.type != "meta":  # That of shape inference.
        _device = device
    return device


def _fit_together(x, y):
    """Returns whether two arguments, tensors or numbers, have the same dtype."""
    if not _is_plain(x):
        return _is_plain(y) and _is_number_for(x, y.dtype)
    return (_is_plain(y) and x.dtype == y.dtype) or _is_number_for(y, x.dtype)


def _is_number_for(number, dtype):
    if type(number) is float:
        return dtype.is_floating_point
    return type(number) is int and dtype != torch.bool


def _have_one_dtype(tensors):
    dtype = getattr(tensors[0], "dtype", None)
    return all(_is_plain(x) and x.dtype == dtype for x in tensors)


@functools.cache
def _torch_dtype(dtype):
    return getattr(torch, keras.backend.standardize_dtype(dtype))


def _for_tensors(function):
    """Replaces an op where its first argument is a tensor on Keras's device."""
    general = getattr(ops, function.__name__)

    @functools.wraps(general)
    def op(x, *args, **kwargs):
        return (function if _is_plain(x) else general)(x, *args, **kwargs)

    return op


@_for_tensors
def any(x, axis=None, keepdims=False):
    if type(axis) is int and x.dtype == torch.bool:
        return x.any(axis, keepdims)
    return ops.any(x, axis=axis, keepdims=keepdims)


@_for_tensors
def cast(x, dtype):
    return x.to(_torch_dtype(dtype))


@_for_tensors
def convert_to_tensor(x, *args, **kwargs):
    return ops.convert_to_tensor(x, *args, **kwargs) if args or kwargs else x


@_for_tensors
def exp(x):
    return x.exp() if x.is_floating_point() else ops.exp(x)


@_for_tensors
def expand_dims(x, axis):
    return x.unsqueeze(axis) if type(axis) is int else ops.expand_dims(x, axis)


@_for_tensors
def isfinite(x):
    return x.isfinite()


@_for_tensors
def log_softmax(x, axis=-1):
    is_single = x.dtype == torch.float32
    return x.log_softmax(axis) if is_single else ops.log_softmax(x, axis)


@_for_tensors
def logical_and(x, y):
    are_bools = x.dtype == torch.bool and _is_plain(y) and y.dtype == torch.bool
    return (torch if are_bools else ops).logical_and(x, y)


@_for_tensors
def ones_like(x, dtype=None):
    dtype = x.dtype if dtype is None else dtype
    return torch.ones_like(x, dtype=_torch_dtype(dtype))


@_for_tensors
def pad(x, pad_width, mode="constant", constant_values=None):
    if mode != "constant" or constant_values is not None:
        return ops.pad(x, pad_width, mode, constant_values)
    widths = [n for widths in reversed(pad_width) for n in widths]
    return torch.nn.functional.pad(x, widths)


@_for_tensors
def reshape(x, shape):
    return x.reshape(shape)


@_for_tensors
def shape(x):
    return tuple(x.shape)


@_for_tensors
def square(x):
    return x.square() if x.is_floating_point() else ops.square(x)


@_for_tensors
def stop_gradient(x):
    return x.detach()


@_for_tensors
def sum(x, axis=None, keepdims=False):
    if not x.is_floating_point() or (axis is None and keepdims):
        return ops.sum(x, axis=axis, keepdims=keepdims)
    return x.sum() if axis is None else x.sum(axis, keepdims)


@_for_tensors
def transpose(x, axes=None):
    return ops.transpose(x) if axes is None else x.permute(axes)


def concatenate(tensors, axis=0):
    return (torch.cat if _have_one_dtype(tensors) else ops.concatenate)(tensors, axis)


def maximum(x, y):
    if not _fit_together(x, y):
        return ops.maximum(x, y)
    x, y = _as_tensors(x, y)
    return torch.maximum(x, y)


def stack(tensors, axis=0):
    return (torch.stack if _have_one_dtype(tensors) else ops.stack)(tensors, axis)


def where(condition, x, y):
    is_mask = _is_plain(condition) and condition.dtype == torch.bool
    are_plain = is_mask and _fit_together(x, y)
    return (torch if are_plain else ops).where(condition, x, y)


def _as_tensors(x, y):
    """Returns two tensors, of which one may be a number."""
    if not isinstance(x, torch.Tensor):
        x = torch.full((), x, dtype=y.dtype, device=y.device)
    if not isinstance(y, torch.Tensor):
        y = torch.full((), y, dtype=x.dtype, device=x.device)
    return x, y
