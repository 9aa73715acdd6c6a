import keras
import ml_dtypes
import numpy as np
import pytest
from gradients import gradients
from hypothesis import example, given, settings
from hypothesis import strategies as st
from keras import ops

from keras_moe import kernels
from keras_moe.kernels import plain

# Two groups.
INDEX = np.array([[2, -1, 0], [2, 2, -1]], "int32")


def test_gather_rows_table():
    x = np.array([[[1], [2], [3]], [[4], [5], [6]]], "float32")
    for gather in (kernels.gather_rows, plain.gather_rows):
        rows = gather(ops.convert_to_tensor(x), ops.convert_to_tensor(INDEX))
        rows = ops.convert_to_numpy(rows)
        np.testing.assert_array_equal(rows, [[[3], [0], [1]], [[6], [6], [0]]])


def test_scatter_add_rows_table():
    rows = np.array([[[1], [2], [4]], [[8], [16], [32]]], "float32")
    for scatter in (kernels.scatter_add_rows, plain.scatter_add_rows):
        sums = scatter(ops.convert_to_tensor(rows), ops.convert_to_tensor(INDEX), 4)
        sums = ops.convert_to_numpy(sums)
        np.testing.assert_array_equal(
            sums, [[[4], [0], [1], [0]], [[0], [0], [24], [0]]]
        )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_assign_parts(dtype):
    for assign in (kernels.assign_parts, plain.assign_parts):
        variable = keras.Variable(np.zeros((2, 3)), dtype=dtype)
        parts = np.arange(6).reshape(2, 3).astype(getattr(ml_dtypes, dtype, dtype))
        assign(variable, iter(parts))
        found = ops.convert_to_numpy(ops.cast(variable, "float32"))
        np.testing.assert_array_equal(found, [[0, 1, 2], [3, 4, 5]])


def test_assign_part():
    for assign in (kernels.assign_part, plain.assign_part):
        variable = keras.Variable(np.ones((3, 2)))
        assign(variable, 1, np.array([2.0, 3.0], "float32"))
        found = ops.convert_to_numpy(variable)
        np.testing.assert_array_equal(found, [[1, 1], [2, 3], [1, 1]])


@pytest.mark.parametrize("k", [1, 2, 3, 4])
def test_top_k_table(k):
    """Of equal values, the first one is the larger one; `-inf` is the least."""
    x = ops.convert_to_tensor([[1.0, 3.0, 3.0, 2.0], [-np.inf, 0.0, -np.inf, 0.0]])
    order = np.array([[1, 2, 3, 0], [1, 3, 0, 2]])[:, :k]
    for top_k in (kernels.top_k, plain.top_k):
        values, index = map(ops.convert_to_numpy, top_k(x, k))
        assert index.dtype == "int32"
        best = values > -np.inf
        np.testing.assert_array_equal(index[best], order[best])
        expected = np.take_along_axis(ops.convert_to_numpy(x), order, axis=-1)
        np.testing.assert_array_equal(values, expected)


def test_top_k_of_many_ties(rng):
    x = rng.integers(0, 9, size=(5, 20, 64)).astype("float32")
    found, expected = (
        ops.convert_to_numpy(module.top_k(ops.convert_to_tensor(x), 10)[1])
        for module in (kernels, plain)
    )
    np.testing.assert_array_equal(found, expected)


def test_take_elements():
    x, index = (
        np.array([[1.0, 2.0, 4.0], [8.0, 16.0, 32.0]]),
        np.array([[2, 0], [1, 1]]),
    )
    for take in (kernels.take_elements, plain.take_elements):
        found = take(*map(ops.convert_to_tensor, (x, index.astype("int32"))))
        np.testing.assert_array_equal(ops.convert_to_numpy(found), [[4, 1], [16, 16]])


def test_weigh_rows(rng):
    rows, weight = (rng.normal(size=s).astype("float32") for s in ((2, 5, 3), (2, 5)))
    expected = rows * weight[..., None]
    for weigh in (kernels.weigh_rows, plain.weigh_rows):
        found = weigh(*map(ops.convert_to_tensor, (rows, weight)))
        np.testing.assert_allclose(ops.convert_to_numpy(found), expected, rtol=1e-6)

        def loss(rows, weight, weigh=weigh):
            return ops.sum(ops.square(weigh(rows, weight)))

        of_rows, of_weight = gradients(loss, rows, weight)
        np.testing.assert_allclose(of_rows, 2 * expected * weight[..., None], rtol=1e-5)
        slopes = 2 * np.sum(expected * rows, axis=-1)
        np.testing.assert_allclose(of_weight, slopes, rtol=1e-5, atol=1e-6)


def test_combine_rows_table():
    rows = np.array([[[1], [np.nan], [4]], [[8], [16], [np.nan]]], "float32")
    weight = np.array([[0.5, 1.0, 1.0], [1.0, 0.25, 0.0]], "float32")
    for combine in (kernels.combine_rows, plain.combine_rows):
        sums = combine(*map(ops.convert_to_tensor, (rows, weight, INDEX)), 4)
        sums = ops.convert_to_numpy(sums)
        np.testing.assert_array_equal(
            sums, [[[4], [0], [0.5], [0]], [[0], [0], [12], [0]]]
        )


@pytest.mark.parametrize("shape", [(1, 0), (1, 1), (3, 50), (4, 3, 5)])
def test_combine_rows_matches_the_plain_kernel(shape, rng):
    for found, expected in gradients_of_combine(shape, 3, rng, rng.normal):
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


def test_combine_rows_that_do_not_fit_in_a_cache_together(rng):
    def whole_numbers(size):  # Whose sums have no rounding errors.
        return rng.integers(-2, 3, size=size)

    for found, expected in gradients_of_combine((2, 9), 2**17, rng, whole_numbers):
        np.testing.assert_array_equal(found, expected)


def gradients_of_combine(shape, width, rng, draw):
    """Compares values; returns pairs of gradients: of the kernel, the plain kernel."""
    n = 20
    index = ops.convert_to_tensor(rng.integers(-1, n, size=shape).astype("int32"))
    rows = draw(size=(*shape, width)).astype("float32")
    weight = draw(size=shape).astype("float32")
    fast, reference = (
        lambda rows, weight, module=module: ops.sum(
            ops.square(1 + module.combine_rows(rows, weight, index, n))
        )
        for module in (kernels, plain)
    )
    tensors = ops.convert_to_tensor(rows), ops.convert_to_tensor(weight)
    np.testing.assert_allclose(
        float(fast(*tensors)), float(reference(*tensors)), rtol=1e-5
    )
    found, expected = (gradients(f, rows, weight) for f in (fast, reference))
    return zip(found, expected, strict=True)


@pytest.mark.parametrize("width", [(), (3,)])
@pytest.mark.parametrize("shape", [(1, 0), (1, 1), (3, 50), (4, 3, 5)])
def test_kernels_match_the_plain_kernels(shape, width, rng):
    n, groups = 20, shape[-2]
    index = ops.convert_to_tensor(rng.integers(-1, n, size=shape).astype("int32"))
    x = rng.normal(size=(groups, n, *width)).astype("float32")
    y = rng.normal(size=(*shape, *width)).astype("float32")

    def gathered(gather):
        return lambda x, y: ops.sum(ops.square(gather(x, index) + y))

    def scattered(scatter):
        return lambda x, y: ops.sum(ops.square(scatter(y, index, n) + x))

    for make, kernel in ((gathered, "gather_rows"), (scattered, "scatter_add_rows")):
        fast = make(getattr(kernels, kernel))
        reference = make(getattr(plain, kernel))
        tensors = ops.convert_to_tensor(x), ops.convert_to_tensor(y)
        np.testing.assert_allclose(
            float(fast(*tensors)), float(reference(*tensors)), rtol=1e-5
        )
        found, expected = gradients(fast, x, y), gradients(reference, x, y)
        for a, b in zip(found, expected, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_nan_rows_do_not_affect_others():
    x = ops.convert_to_tensor(np.array([[[np.nan], [1.0]]], "float32"))
    index = ops.convert_to_tensor(np.array([[-1, 1]], "int32"))
    rows = ops.convert_to_numpy(kernels.gather_rows(x, index))
    np.testing.assert_array_equal(rows, [[[0], [1]]])
    result = ops.convert_to_numpy(kernels.scatter_add_rows(x, index, 2))
    np.testing.assert_array_equal(result, [[[0], [1]]])


def test_grouped_dense_table():
    for dense in (kernels.grouped_dense, plain.grouped_dense):
        check_grouped_dense_table(dense)


def check_grouped_dense_table(dense):
    rows = ops.convert_to_tensor(np.array([[1], [2], [3], [4]], "float32"))
    kernel = ops.convert_to_tensor(np.array([[[1]], [[10]], [[100]]], "float32"))
    bias = ops.convert_to_tensor(np.array([[[0.5]], [[0.25]], [[0]]], "float32"))
    sizes = ops.convert_to_tensor(np.array([2, 0, 1], "int32"))
    found = ops.convert_to_numpy(dense(rows, kernel, bias, sizes))
    np.testing.assert_array_equal(found, [[1.5], [2.5], [300], [0]])


@st.composite
def groups_of_rows(draw):
    """Group sizes, the number of leftover rows, two widths, use of a bias, a seed."""
    sizes = draw(st.lists(st.sampled_from([0, 0, 1, 2, 7, 40]), min_size=1, max_size=9))
    leftover = draw(st.sampled_from([0, 0, 1, 30]))
    hidden, width = draw(st.integers(1, 9)), draw(st.integers(1, 9))
    return sizes, leftover, hidden, width, draw(st.booleans()), draw(st.integers(0, 9))


@settings(max_examples=12, deadline=None, derandomize=True)
@given(groups_of_rows())
@example(([0, 0], 0, 3, 2, True, 0))  # no rows
@example(([0, 0], 4, 3, 2, True, 0))  # only leftover rows
@example(([1], 0, 1, 1, False, 0))
@example(([0, 500, 0, 0], 3, 8, 5, True, 0))  # all rows in one group, several blocks
@example(([1300, 0, 511], 9, 3, 2, True, 0))  # blocks of several sizes
@example(([2600, 601], 9, 3, 2, True, 0))  # blocks of all sizes
@example(([129, 128, 127, 1, 0, 64], 9, 2, 3, True, 0))  # around the block size
def test_grouped_dense_matches_the_plain_kernel(case):
    check_against_plain(kernels.grouped_dense, case)


def check_against_plain(dense, case):
    sizes, leftover, hidden, width, with_bias, seed = case
    rng = np.random.default_rng(seed)
    rows = rng.normal(size=(sum(sizes) + leftover, hidden)).astype("float32")
    kernel = rng.normal(size=(len(sizes), hidden, width)).astype("float32")
    bias = rng.normal(size=(len(sizes), 1, width)).astype("float32")
    target = rng.normal(size=(len(rows), width)).astype("float32")
    group_sizes = np.array(sizes, "int32")

    def error(dense):
        def function(rows, kernel, bias):
            bias = bias if with_bias else None
            sizes, goal = map(ops.convert_to_tensor, (group_sizes, target))
            return ops.sum(ops.square(dense(rows, kernel, bias, sizes) - goal))

        return function

    fast, reference = error(dense), error(plain.grouped_dense)
    arrays = rows, kernel, bias
    tensors = [ops.convert_to_tensor(a) for a in arrays]
    np.testing.assert_allclose(
        float(fast(*tensors)), float(reference(*tensors)), rtol=1e-5
    )
    found, expected = gradients(fast, *arrays), gradients(reference, *arrays)
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5 * max(1, np.abs(b).max(initial=0)))


@pytest.mark.parametrize(("dtype", "rtol"), [("float16", 4e-3), ("bfloat16", 3e-2)])
def test_grouped_dense_in_half_precision(dtype, rtol, rng):
    shapes = (50, 8), (3, 8, 5), (3, 1, 5)
    arrays = [ops.cast(rng.normal(size=s).astype("float32"), dtype) for s in shapes]
    sizes = ops.convert_to_tensor(np.array([20, 0, 27], "int32"))
    found = kernels.grouped_dense(*arrays, sizes)
    assert keras.backend.standardize_dtype(found.dtype) == dtype
    single = [ops.cast(a, "float32") for a in arrays]
    expected = ops.convert_to_numpy(plain.grouped_dense(*single, sizes))
    found = ops.convert_to_numpy(ops.cast(found, "float32"))
    np.testing.assert_allclose(found, expected, rtol=rtol, atol=rtol * 4)


def test_gradients_are_summed_in_float32(rng):
    """The sum over 4000 equal rows is correct; a sum in bfloat16 would stop at 256."""
    rows, kernel = np.ones((4000, 2), "float32"), np.ones((2, 2, 2), "float32")
    bias, sizes = np.ones((2, 1, 2), "float32"), np.array([4000, 0], "int32")

    def function(rows, kernel, bias):
        arrays = (ops.cast(a, "bfloat16") for a in (rows, kernel, bias))
        results = kernels.grouped_dense(*arrays, ops.convert_to_tensor(sizes))
        return ops.sum(ops.cast(results, "float32"))

    _, d_kernel, d_bias = gradients(function, rows, kernel, bias)
    expected = np.array([[[4000] * 2] * 2, [[0] * 2] * 2])
    np.testing.assert_allclose(d_kernel, expected, rtol=0.01)
    np.testing.assert_allclose(d_bias, [[[4000, 4000]], [[0, 0]]], rtol=0.01)


@pytest.mark.skipif(keras.backend.backend() != "jax", reason="JAX only")
def test_ragged_dot_for_gpus_and_tpus():
    from keras_moe.kernels.jax import by_ragged_dot

    check_grouped_dense_table(by_ragged_dot)
    for case in (([3, 0, 40, 1], 2, 5, 4, True, 0), ([0, 0], 4, 3, 2, False, 0)):
        check_against_plain(by_ragged_dot, case)


@pytest.mark.skipif(keras.backend.backend() != "torch", reason="PyTorch only")
def test_grouped_mm_for_gpus():
    from keras_moe.kernels.torch import HAS_GROUPED_MM, by_grouped_mm

    if not HAS_GROUPED_MM:
        pytest.skip("This version of PyTorch has no grouped matmul.")
    # Rows and columns must be multiples of 16 bytes.
    for case in (([3, 0, 40, 1], 2, 8, 4, True, 0), ([0, 0], 4, 4, 8, False, 0)):
        check_against_plain(by_grouped_mm, case)


def test_a_nan_row_does_not_affect_its_group(rng):
    rows = rng.normal(size=(6, 2)).astype("float32")
    rows[3], rows[5] = np.nan, np.inf
    kernel = ops.convert_to_tensor(rng.normal(size=(2, 2, 2)).astype("float32"))
    sizes = ops.convert_to_tensor(np.array([2, 3], "int32"))
    rows = ops.convert_to_tensor(rows)
    found = ops.convert_to_numpy(kernels.grouped_dense(rows, kernel, None, sizes))
    assert np.isfinite(found[[0, 1, 2, 4, 5]]).all()
    assert np.isnan(found[3]).all()


@pytest.mark.skipif(
    keras.backend.backend() == "tensorflow", reason="its tape knows what is trained"
)
def test_a_frozen_kernel_gets_no_gradient(monkeypatch):
    """Only that of a bias, which is small, is computed beside that of the rows."""
    rows, sizes = np.ones((8, 64), "float32"), np.array([3, 0, 5], "int32")
    kernel = np.ones((3, 64, 96), "float32")
    bias = np.ones((3, 1, 96), "float32")
    if keras.backend.backend() == "jax":
        import jax

        def function(rows, bias, kernel):
            return kernels.grouped_dense(rows, kernel, bias, sizes).sum()

        for trained, is_large in (((0, 1), False), ((0, 1, 2), True)):
            gradient = jax.jit(jax.grad(function, trained))
            memory = gradient.lower(rows, bias, kernel).compile().memory_analysis()
            used = memory.temp_size_in_bytes + memory.output_size_in_bytes
            assert (used > kernel.nbytes) == is_large
        return
    import torch

    from keras_moe.kernels import torch as ours

    shapes = []
    outer = ours._GroupedOuter.apply
    monkeypatch.setattr(
        ours._GroupedOuter,
        "apply",
        lambda x, y, *rest: (
            shapes.append((x.shape[1], y.shape[1])) or outer(x, y, *rest)
        ),
    )
    for trained, expected in ((False, [(1, 96)]), (True, [(64, 96), (1, 96)])):
        shapes.clear()
        tensors = [torch.tensor(x) for x in (rows, kernel, bias)]
        tensors[0].requires_grad = tensors[2].requires_grad = True
        tensors[1].requires_grad = trained
        ours.grouped_dense(*tensors, torch.tensor(sizes)).sum().backward()
        assert shapes == expected
        assert (tensors[1].grad is not None) == trained
