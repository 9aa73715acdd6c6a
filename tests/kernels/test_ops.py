"""The ops of the kernels are those of Keras, for arguments of any kind."""

import keras
import numpy as np
import pytest
from keras import ops

from keras_moe import kernels

DTYPES = "float32", "bfloat16", "int32", "bool"

# Functions of ops and of two arrays `[2, 3]` of equal dtype.
CALLS = {
    "any": lambda ops, x, y: ops.any(x),
    "any of an axis": lambda ops, x, y: ops.any(x, axis=-1),
    "any, kept": lambda ops, x, y: ops.any(x, axis=0, keepdims=True),
    "cast": lambda ops, x, y: ops.cast(x, "float32"),
    "cast to another's": lambda ops, x, y: ops.cast(ops.cast(x, "int32"), y.dtype),
    "concatenate": lambda ops, x, y: ops.concatenate([x, y]),
    "concatenate columns": lambda ops, x, y: ops.concatenate([x, y], axis=1),
    "convert_to_tensor": lambda ops, x, y: ops.convert_to_tensor(x),
    "convert to a dtype": lambda ops, x, y: ops.convert_to_tensor(x, "float32"),
    "exp": lambda ops, x, y: ops.exp(x),
    "expand_dims": lambda ops, x, y: ops.expand_dims(x, -1),
    "expand two": lambda ops, x, y: ops.expand_dims(x, (0, 1)),
    "isfinite": lambda ops, x, y: ops.isfinite(x),
    "log_softmax": lambda ops, x, y: ops.log_softmax(ops.cast(x, "float32"), axis=-1),
    "logical_and": lambda ops, x, y: ops.logical_and(x, y),
    "maximum": lambda ops, x, y: ops.maximum(x, y),
    "maximum and a number": lambda ops, x, y: ops.maximum(x, 1),
    "maximum and a float": lambda ops, x, y: ops.maximum(x, 0.5),
    "maximum of a number": lambda ops, x, y: ops.maximum(0, x),
    "ones_like": lambda ops, x, y: ops.ones_like(x),
    "ones_like of a dtype": lambda ops, x, y: ops.ones_like(x, dtype="int32"),
    "pad": lambda ops, x, y: ops.pad(x, ((0, 1), (2, 0))),
    "pad with a number": lambda ops, x, y: ops.pad(
        x, ((0, 1), (0, 0)), constant_values=0
    ),
    "reshape": lambda ops, x, y: ops.reshape(x, (3, -1)),
    "shape": lambda ops, x, y: ops.ones(ops.shape(x)),
    "square": lambda ops, x, y: ops.square(x),
    "stack": lambda ops, x, y: ops.stack([x, y]),
    "stack last": lambda ops, x, y: ops.stack([x, y], axis=-1),
    "stop_gradient": lambda ops, x, y: ops.stop_gradient(x),
    "sum": lambda ops, x, y: ops.sum(x),
    "sum of axes": lambda ops, x, y: ops.sum(x, axis=(0, 1)),
    "sum, kept": lambda ops, x, y: ops.sum(x, axis=-1, keepdims=True),
    "transpose": lambda ops, x, y: ops.transpose(x),
    "transpose axes": lambda ops, x, y: ops.transpose(x, (1, 0)),
    "where": lambda ops, x, y: ops.where(y != 0, x, y),
    "where or a number": lambda ops, x, y: ops.where(x != 0, y, -1),
    "where a float": lambda ops, x, y: ops.where(x != 0, 0.5, y),
    "where numbers": lambda ops, x, y: ops.where(x != 0, 1.0, 1e-18),
    "without a form of its own": lambda ops, x, y: ops.swapaxes(x, 0, 1),
}


def outcome(call):
    """Returns the dtype and the values of a result, or the type of the error."""
    try:
        value = call()
    except Exception as error:
        return type(error)
    array = ops.convert_to_numpy(ops.cast(value, "float32"))
    return keras.backend.standardize_dtype(value.dtype), array.tolist()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", CALLS)
def test_values_and_dtypes(name, dtype):
    x, y = (
        ops.cast(ops.convert_to_tensor(values), dtype)
        for values in ([[1, 0, 2], [0, 0, -3]], [[0, 0, 1], [2, 0, 0]])
    )
    call = CALLS[name]
    expected = outcome(lambda: call(ops, x, y))
    assert outcome(lambda: call(kernels.ops, x, y)) == expected


@pytest.mark.parametrize("kind", ["arrays", "variables", "another dtype"])
@pytest.mark.parametrize("name", CALLS)
def test_other_arguments(name, kind):
    x = np.array([[1, 0, 2], [0, 0, -3]], "float32")
    y = np.array([[0, 0, 1], [2, 0, 0]], "float32")
    if kind == "variables":
        x, y = keras.Variable(x), keras.Variable(y)
    if kind == "another dtype":
        x, y = ops.convert_to_tensor(x), ops.convert_to_tensor(y.astype("int32"))
    call = CALLS[name]
    expected = outcome(lambda: call(ops, x, y))
    assert outcome(lambda: call(kernels.ops, x, y)) == expected


@pytest.mark.parametrize("name", ["sum", "where", "maximum", "stack", "reshape"])
def test_symbolic_arguments(name):
    x, y = (keras.Input((3,), batch_size=2) for _ in range(2))
    assert CALLS[name](kernels.ops, x, y).shape == CALLS[name](ops, x, y).shape
