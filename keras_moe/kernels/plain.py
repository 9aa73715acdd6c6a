"""The kernels in `keras.ops`: for any backend, and the reference in tests.

An index of -1 means no row.
"""

import dataclasses
import itertools
import math
from collections.abc import Callable

import keras
import numpy as np
from keras import ops


def as_size(n):
    """Returns a size as an int where the backend knows it."""
    return n


def assign_parts(variable, parts):
    """Assigns a value whose parts are read one after the other.

    Where it can be, each is assigned before the next one is read.

    Args:
        variable: `keras.Variable` `[n, ...]`.
        parts: iterable of `n` numpy arrays in the dtype of the variable.
    """
    array = None
    for i, part in enumerate(parts):
        if array is None:
            array = aligned_array(tuple(variable.shape), part.dtype)
        array[i] = part
    variable.assign(array)


def assign_part(variable, i, part):
    """Assigns `part` to `variable[i]`.

    Args:
        variable: `keras.Variable` `[n, ...]`.
        i: int.
        part: number, or tensor `[...]`.
    """
    value = ops.convert_to_tensor(variable)
    is_part = ops.arange(value.shape[0]) == i
    is_part = ops.reshape(is_part, (-1, *[1] * (len(value.shape) - 1)))
    variable.assign(ops.where(is_part, part, value))


def aligned_array(shape, dtype):
    """Returns an array without values that JAX uses as it is on a CPU, uncopied."""
    size, alignment = math.prod(shape) * dtype.itemsize, 64
    memory = np.empty(size + alignment, "uint8")
    start = -memory.ctypes.data % alignment
    return memory[start : start + size].view(dtype).reshape(shape)


def argsort(x):
    """Sorts the last axis, stably: indices, those of equal values in their order."""
    return ops.argsort(x, axis=-1)


def top_k(x, k):
    """Returns the `k` largest values of the last axis, largest first.

    Of equal values, the one with the lower index comes first, which `keras.ops.top_k`
    does not define.

    Args:
        x: `[..., e]`, without NaN.
        k: int, at most `e`.

    Returns:
        A pair `[..., k]`: the values, and their indices, int32.
    """
    values, indices = [], []
    for i in range(k):
        index = ops.cast(ops.argmax(x, axis=-1), "int32")
        values.append(ops.max(x, axis=-1))
        indices.append(index)
        if i < k - 1:
            found = ops.expand_dims(index, -1) == ops.arange(x.shape[-1], dtype="int32")
            x = ops.where(found, float("-inf"), x)
    return ops.stack(values, axis=-1), ops.stack(indices, axis=-1)


def take_elements(x, index):
    """Takes elements of the last axis: of `[..., e]` by an int index `[..., k]`."""
    return ops.take_along_axis(x, index, axis=-1)


def matmul(x, matrix):
    """Multiplies `[..., h]` by a matrix `[h, f]`, of which `f` may be small."""
    return ops.matmul(x, matrix)


def gather_rows(x, index):
    """Gathers rows of each group by index; zeros for -1.

    Args:
        x: `[g, n, ...]`.
        index: int `[..., g, r]`, the row of the group.

    Returns:
        `[..., g, r, ...]`.
    """
    groups, n, *width = ops.shape(x)
    rows = ops.reshape(x, (groups * n, *width))
    rows = ops.take(rows, ops.maximum(flat_index(index, n), 0), axis=0)
    filled = ops.reshape(index >= 0, (*ops.shape(index), *[1] * len(width)))
    return ops.where(filled, rows, ops.zeros_like(rows))


def scatter_add_rows(rows, index, num_rows):
    """Sums rows by their index in each group; -1 adds to none.

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


def combine_rows(rows, weight, index, num_rows):
    """Sums rows, multiplied by weights, by their index in each group.

    Args:
        rows: `[..., g, r, h]`, float.
        weight: `[..., g, r]`, of the same dtype.
        index: int `[..., g, r]`; a row of -1 is added to no sum.
        num_rows: `n`, an int or a scalar tensor.

    Returns:
        `[g, n, h]`.
    """
    return scatter_add_rows(weigh_rows(rows, weight), index, num_rows)


def weigh_rows(rows, weight):
    """Multiplies rows `[..., h]` by weights `[...]`, of the same dtype."""
    return rows * ops.expand_dims(weight, -1)


def flat_index(index, num_rows):
    """Turns an index `[..., g, r]` within groups into one over all groups; -1 stays."""
    index = ops.cast(index, "int32")
    if index.shape[-2] == 1:
        return index
    first = ops.arange(ops.shape(index)[-2], dtype="int32") * num_rows
    return ops.where(index >= 0, index + ops.expand_dims(first, -1), -1)


def num_row_shards(groups, num_experts):
    """Returns into how many shards sorted rows are split, by groups and by experts.

    Args:
        groups: `g`.
        num_experts: `e`.

    Returns:
        A pair of ints: over how many devices the batch is split, and over how many
        devices the experts of one such part are split. `(1, 1)` without a
        `keras.distribution`.
    """
    return 1, 1


@dataclasses.dataclass(frozen=True)
class FrozenMatrices:
    """A stack of matrices, each of which is made when it is needed, and not kept.

    They are constants: they have no gradient, and are made again for that of the other
    factor.

    Attributes:
        make: function of the arrays of one matrix, or of a stack, that returns
            `[..., h, f]`.
        arrays: tuple of tensors `[e, ...]`.
        shape: `(e, h, f)`.
    """

    make: Callable
    arrays: tuple
    shape: tuple

    def __getitem__(self, i):
        return self.make(*(array[i] for array in self.arrays))

    def transpose(self):
        """Returns the same matrices, transposed."""
        experts, rows, columns = self.shape
        return FrozenMatrices(
            lambda *arrays: ops.swapaxes(self.make(*arrays), -1, -2),
            self.arrays,
            (experts, columns, rows),
        )


def batched_dense(x, kernel):
    """Multiplies each group of rows by its matrix, one group after the other.

    Args:
        x: `[e, n, h]`.
        kernel: `FrozenMatrices` of shape `(e, h, f)`.

    Returns:
        `[e, n, f]`.
    """
    return ops.stack([ops.matmul(x[i], kernel[i]) for i in range(kernel.shape[0])])


def grouped_dense(rows, kernel, bias, group_sizes):
    """Applies a dense layer to each group of rows.

    Args:
        rows: `[a, h]`, sorted by group.
        kernel: `[e, h, f]`, or `FrozenMatrices` of this shape.
        bias: `[e, 1, f]`, or `None`.
        group_sizes: int32 `[e]`, the number of rows of each group, at most `a` in
            sum.

    Returns:
        `[a, f]`: `rows · kernel[i] + bias[i]` for the rows of group `i`, 0 for the
        remaining rows.
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
    """Splits rows into groups.

    Args:
        rows: `[a, h]`, sorted by group.
        group_sizes: int32 `[e]`, at most `a` in sum.

    Returns:
        A list of `e + 1` tensors: the rows of each group, and the remaining rows.
    """
    ends = [0, *(int(end) for end in ops.cumsum(group_sizes)), None]
    return [rows[start:end] for start, end in itertools.pairwise(ends)]


def sum_over_replicas(x):
    """Sums a tensor over the replicas of a training step, without a gradient.

    Replicas are those of `tf.distribute`, and the processes of `torch.distributed`. A
    step on JAX has the data of all devices at once.

    Args:
        x: float tensor. Every replica must sum tensors in the same order.
    """
    return ops.stop_gradient(x)


def current_scope():
    """Returns the `keras.StatelessScope` of the running step, or `None`."""
    with keras.StatelessScope(initialize_variables=False) as probe:
        return probe.original_scope


def can_assign(old, new):
    """Returns whether a variable may be assigned in the running program.

    A value that belongs to an inner program, such as the body of a loop, must not
    leave it.

    Args:
        old: tensor, the value of the variable.
        new: tensor, the value to assign, without a gradient.
    """
    return True


def loss_is_reachable(loss):
    """Returns whether the training step can use a loss that is added here.

    A loss in an inner program, such as the body of a loop, is out of its reach.

    Args:
        loss: scalar tensor.
    """
    return True


class ForwardPasses:
    """Tells the second forward pass of a rematerialized function from the first.

    A rematerialized function (`keras.remat`) runs again in the backward pass.
    """

    # Whether a loss of the first pass has a gradient; otherwise that of the second has.
    first_has_gradient = True

    def next(self, value=None):
        """Begins a pass.

        Args:
            value: tensor that may change after the pass, or `None`.

        Returns:
            A pair: whether it is a second pass, and the value; in a second pass the
            value of the first.
        """
        return False, value
