"""Moving rows: the only module that knows which backend runs.

Every function stands in `keras.ops` first (`plain_*`), which runs everywhere
and is what the tests hold the rest against, and then as the backend does it
best. An index of -1 means no row.
"""

import keras
from keras import ops

# Whether a training step is given a model's state and returns it, instead of
# changing it.
CARRIES_STATE = keras.backend.backend() == "jax"


def plain_gather_rows(x, index):
    """Rows of `x` by index, a row of zeros for -1.

    Args:
        x: `[n, h]`.
        index: int `[r]`.

    Returns:
        `[r, h]`.
    """
    rows = ops.take(x, ops.maximum(index, 0), axis=0)
    return ops.where(ops.expand_dims(index >= 0, -1), rows, 0)


def plain_scatter_add_rows(rows, index, num_rows):
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


def clip_size(size, low, high):
    """A symbolic dimension of JAX between two others."""
    import jax

    return jax.core.min_dim(jax.core.max_dim(size, low), high)


def _tensorflow_kernels():
    import tensorflow as tf

    def gather_rows(x, index):
        # A copy of the tokens with a zero row costs less than a pass over the
        # buffers, which are larger.
        x = tf.concat([tf.zeros_like(x[:1]), x], axis=0)
        return tf.gather(x, index + 1)

    def scatter_add_rows(rows, index, num_rows):
        # Negative indices are dropped.
        return tf.math.unsorted_segment_sum(rows, index, num_rows)

    return gather_rows, scatter_add_rows


def _jax_kernels():
    import jax.numpy as jnp

    def gather_rows(x, index):
        index = jnp.where(index >= 0, index, x.shape[0])
        return x.at[index].get(mode="fill", fill_value=0)

    def scatter_add_rows(rows, index, num_rows):
        index = jnp.where(index >= 0, index, num_rows)
        result = jnp.zeros((num_rows, *rows.shape[1:]), rows.dtype)
        return result.at[index].add(rows, mode="drop")

    return gather_rows, scatter_add_rows


def _torch_kernels():
    import torch

    def gather_rows(x, index):
        x = torch.cat([x.new_zeros((1, x.shape[1])), x])
        return x.index_select(0, index + 1)

    def scatter_add_rows(rows, index, num_rows):
        result = rows.new_zeros((num_rows + 1, *rows.shape[1:]))
        return result.index_add(0, index + 1, rows)[1:]

    return gather_rows, scatter_add_rows


gather_rows, scatter_add_rows = {
    "tensorflow": _tensorflow_kernels,
    "jax": _jax_kernels,
    "torch": _torch_kernels,
}.get(keras.backend.backend(), lambda: (plain_gather_rows, plain_scatter_add_rows))()
