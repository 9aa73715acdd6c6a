"""Every kernel in `keras.ops`: on any backend, and what the tests hold the others
against.
"""

import itertools

from keras import ops


def as_size(n):
    """A size as a number, where it is known to the backend."""
    return n


def argsort(x):
    """The order of the last axis, of equals the earlier first."""
    return ops.argsort(x, axis=-1)


def take(x, index):
    """`x[index]`: `[n, ...]` and an int `[r]` to `[r, ...]`."""
    return ops.take(x, index, axis=0)


def gather_rows(x, index):
    """Rows of `x` by index, a row of zeros for -1.

    Args:
        x: `[n, h]`.
        index: int `[r]`.

    Returns:
        `[r, h]`.
    """
    rows = ops.take(x, ops.maximum(index, 0), axis=0)
    return ops.where(ops.expand_dims(index >= 0, -1), rows, 0)


def scatter_add_rows(rows, index, num_rows):
    """Adds rows where their index says; -1 adds nowhere.

    Args:
        rows: `[r, ...]`, float.
        index: int `[r]`.
        num_rows: `n`, an int or a scalar tensor.

    Returns:
        `[n, ...]`.
    """
    target = ops.where(index >= 0, index, num_rows)
    return ops.segment_sum(rows, target, num_segments=num_rows + 1)[:num_rows]


def grouped_dense(rows, kernel, bias, group_sizes):
    """A dense layer for each group of rows.

    Args:
        rows: `[a, h]`, those of the first group first.
        kernel: `[e, h, f]`.
        bias: `[e, 1, f]`, or `None`.
        group_sizes: int32 `[e]`, at most `a` in sum.

    Returns:
        `[a, f]`: `rows · kernel[i] + bias[i]` for the rows of group `i`, 0 for
        those of none.
    """
    ends = ops.expand_dims(ops.cumsum(group_sizes), -1)
    starts = ends - ops.expand_dims(group_sizes, -1)
    index = ops.arange(ops.shape(rows)[0], dtype="int32")
    of_group = ops.logical_and(starts <= index, index < ends)  # e a
    results = 0.0
    for i in range(kernel.shape[0]):
        result = ops.matmul(rows, kernel[i])
        if bias is not None:
            result = result + bias[i]
        results = results + ops.where(ops.expand_dims(of_group[i], -1), result, 0)
    return results


def split_rows(rows, group_sizes):
    """Cuts rows into groups.

    Args:
        rows: `[a, h]`, those of the first group first.
        group_sizes: int32 `[e]`, at most `a` in sum.

    Returns:
        A list of `e + 1` tensors: the rows of each group, and those left over.
    """
    ends = [0, *(int(end) for end in ops.cumsum(group_sizes)), None]
    return [rows[start:end] for start, end in itertools.pairwise(ends)]
