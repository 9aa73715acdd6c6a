import numpy as np
import pytest
from gradients import gradients
from keras import ops

from keras_moe import kernels

INDEX = np.array([3, -1, 0, 3, -1], "int32")


def test_gather_rows_a_table():
    x = ops.convert_to_tensor(np.array([[1.0], [2.0], [3.0], [4.0]], "float32"))
    for gather in (kernels.gather_rows, kernels.plain_gather_rows):
        rows = ops.convert_to_numpy(gather(x, ops.convert_to_tensor(INDEX)))
        np.testing.assert_array_equal(rows, [[4], [0], [1], [4], [0]])


def test_scatter_add_rows_a_table():
    rows = ops.convert_to_tensor(np.array([[1], [2], [4], [8], [16]], "float32"))
    for scatter in (kernels.scatter_add_rows, kernels.plain_scatter_add_rows):
        result = ops.convert_to_numpy(scatter(rows, ops.convert_to_tensor(INDEX), 5))
        np.testing.assert_array_equal(result, [[4], [0], [0], [9], [0]])


@pytest.mark.parametrize("rows", [0, 1, 50])
def test_the_backend_s_kernels_equal_the_plain_ones(rows, rng):
    n, h = 20, 3
    index = ops.convert_to_tensor(rng.integers(-1, n, size=rows).astype("int32"))
    x = rng.normal(size=(n, h)).astype("float32")
    y = rng.normal(size=(rows, h)).astype("float32")

    def gathered(gather):
        return lambda x, y: ops.sum(ops.square(gather(x, index) + y))

    def scattered(scatter):
        return lambda x, y: ops.sum(ops.square(scatter(y, index, n) + x))

    for make, kernel in ((gathered, "gather_rows"), (scattered, "scatter_add_rows")):
        ours = make(getattr(kernels, kernel))
        plain = make(getattr(kernels, f"plain_{kernel}"))
        tensors = ops.convert_to_tensor(x), ops.convert_to_tensor(y)
        np.testing.assert_allclose(
            float(ours(*tensors)), float(plain(*tensors)), rtol=1e-5
        )
        for a, b in zip(gradients(ours, x, y), gradients(plain, x, y), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_nan_rows_stay_where_they_are():
    x = ops.convert_to_tensor(np.array([[np.nan], [1.0]], "float32"))
    index = ops.convert_to_tensor(np.array([-1, 1], "int32"))
    rows = ops.convert_to_numpy(kernels.gather_rows(x, index))
    np.testing.assert_array_equal(rows, [[0], [1]])
    result = ops.convert_to_numpy(kernels.scatter_add_rows(x, index, 2))
    np.testing.assert_array_equal(result, [[0], [1]])
