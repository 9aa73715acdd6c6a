"""The kernels for TensorFlow."""

import tensorflow as tf
from keras import ops

from keras_moe.kernels.plain import argsort, as_size, flat_index, num_row_shards  # noqa: F401


def gather_rows(x, index):
    groups, n, *width = ops.shape(x)
    rows = ops.reshape(x, (groups * n, *width))
    return _gather(rows, flat_index(index, n))


def scatter_add_rows(rows, index, num_rows):
    groups, width = ops.shape(index)[-2], ops.shape(rows)[len(index.shape) :]
    sums = _scatter_add(rows, flat_index(index, num_rows), groups * num_rows)
    return ops.reshape(sums, (groups, num_rows, *width))


@tf.custom_gradient
def _gather(x, index):
    def gradient(upstream):
        return _scatter_add(upstream, index, tf.shape(x)[0]), None

    # Copying the tokens with a zero row in front costs less than masking the
    # buffers, which are larger.
    padded = tf.concat([tf.zeros_like(x[:1]), x], axis=0)
    return tf.gather(padded, index + 1), gradient


@tf.custom_gradient
def _scatter_add(rows, index, num_rows):
    def gradient(upstream):
        return _gather(upstream, index), None, None

    # Negative indices are dropped.
    return tf.math.unsorted_segment_sum(rows, index, num_rows), gradient


def split_rows(rows, group_sizes):
    remaining = tf.shape(rows)[0] - tf.reduce_sum(group_sizes)
    sizes = tf.concat([group_sizes, [remaining]], axis=0)
    return tf.split(rows, sizes, num=group_sizes.shape[0] + 1)


def grouped_dense(rows, kernel, bias, group_sizes):
    *groups, remaining = split_rows(rows, group_sizes)
    pairs = zip(groups, tf.unstack(kernel), strict=True)
    results = [tf.matmul(x, w) for x, w in pairs]
    if bias is not None:
        pairs = zip(results, tf.unstack(bias), strict=True)
        results = [y + b for y, b in pairs]
    zeros = tf.zeros([tf.shape(remaining)[0], kernel.shape[-1]], rows.dtype)
    return tf.concat([*results, zeros], axis=0)
