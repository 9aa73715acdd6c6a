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


def gather_rows(x, index):
    """Rows of each group by index, zero for -1.

    Args:
        x: `[g, n, ...]`.
        index: int `[..., g, r]`, which row of the group.

    Returns:
        `[..., g, r, ...]`.
    """
    groups, n, *width = ops.shape(x)
    rows = ops.reshape(x, (groups * n, *width))
    rows = ops.take(rows, ops.maximum(flat_index(index, n), 0), axis=0)
    filled = ops.reshape(index >= 0, (*ops.shape(index), *[1] * len(width)))
    return ops.where(filled, rows, ops.zeros_like(rows))


def scatter_add_rows(rows, index, num_rows):
    """Adds rows up in each group where their index says; -1 adds nowhere.

    Args:
        rows: `[..., g, r, ...]`, float.
        index: int `[..., g, r]`.
        num_rows: `n`, an int or a scalar tensor.

    Returns:
        `[g, n, ...]`.
    """
    groups, width = ops.shape(index)[-2], ops.shape(rows)[len(index.shape) :]
    flat = ops.reshape(flat_index(index, num_rows), (-1,))
    flat = ops.where(flat >= 0, flat, groups * num_rows)
    rows = ops.reshape(rows, (-1, *width))
    sums = ops.segment_sum(rows, flat, num_segments=groups * num_rows + 1)
    return ops.reshape(sums[: groups * num_rows], (groups, num_rows, *width))


def flat_index(index, num_rows):
    """Which row of all groups' `num_rows` an index `[..., g, r]` means; -1 for -1."""
    index = ops.cast(index, "int32")
    first = ops.arange(ops.shape(index)[-2], dtype="int32") * num_rows
    return ops.where(index >= 0, index + ops.expand_dims(first, -1), -1)


def row_parts(groups, num_experts):
    """Into how many parts, by groups and by experts, the rows are cut.

    Args:
        groups: `g`.
        num_experts: `e`.

    Returns:
        A pair: as many parts of the groups as devices share the batch, and of the
        experts as devices share a part of it.
    """
    return 1, 1


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
