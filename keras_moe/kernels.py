"""Moving rows, and multiplying groups of them: the only module that knows
which backend runs.

Every function stands in `keras.ops` first (`plain_*`), which runs everywhere
and is what the tests hold the rest against, and then as the backend does it
best. An index of -1 means no row.
"""

import itertools

import keras
from keras import ops

# Whether a training step is given a model's state and returns it, instead of
# changing it.
CARRIES_STATE = keras.backend.backend() == "jax"

# Whether ops run one after the other, each over all of its data, rather than
# compiled into one.
RUNS_OP_BY_OP = keras.backend.backend() in ("tensorflow", "torch")

# Whether XLA can compile `grouped_dense`: not where shapes follow from data.
XLA_COMPILES_ROWS = keras.backend.backend() != "tensorflow"


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


def plain_grouped_dense(rows, kernel, bias, group_sizes):
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


def plain_split_rows(rows, group_sizes):
    """Cuts rows into groups.

    Args:
        rows: `[a, h]`, those of the first group first.
        group_sizes: int32 `[e]`, at most `a` in sum.

    Returns:
        A list of `e + 1` tensors: the rows of each group, and those left over.
    """
    ends = [0, *(int(end) for end in ops.cumsum(group_sizes)), None]
    return [rows[start:end] for start, end in itertools.pairwise(ends)]


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

    def split_rows(rows, group_sizes):
        left_over = tf.shape(rows)[0] - tf.reduce_sum(group_sizes)
        sizes = tf.concat([group_sizes, [left_over]], axis=0)
        return tf.split(rows, sizes, num=group_sizes.shape[0] + 1)

    def grouped_dense(rows, kernel, bias, group_sizes):
        *groups, left_over = split_rows(rows, group_sizes)
        pairs = zip(groups, tf.unstack(kernel), strict=True)
        results = [tf.matmul(x, w) for x, w in pairs]
        if bias is not None:
            pairs = zip(results, tf.unstack(bias), strict=True)
            results = [y + b for y, b in pairs]
        zeros = tf.zeros([tf.shape(left_over)[0], kernel.shape[-1]], rows.dtype)
        return tf.concat([*results, zeros], axis=0)

    return gather_rows, scatter_add_rows, split_rows, grouped_dense


def _jax_kernels():
    import jax.numpy as jnp

    def gather_rows(x, index):
        index = jnp.where(index >= 0, index, x.shape[0])
        return x.at[index].get(mode="fill", fill_value=0)

    def scatter_add_rows(rows, index, num_rows):
        index = jnp.where(index >= 0, index, num_rows)
        result = jnp.zeros((num_rows, *rows.shape[1:]), rows.dtype)
        return result.at[index].add(rows, mode="drop")

    return gather_rows, scatter_add_rows, plain_split_rows, _jax_grouped_dense()


def _jax_grouped_dense():
    import jax
    import jax.numpy as jnp
    from jax import lax

    # Rows that are multiplied at once on a CPU.
    most = 128

    def over_blocks(update, result, group_sizes, num_rows):
        """Updates a result with the rows of all groups, block by block.

        As many blocks as the rows of this batch fill, so that a group costs
        what it holds. A block begins at row `start`; those of its `size` rows
        are the group's that `own` says.
        """
        group_sizes = jnp.asarray(group_sizes)
        size = min(num_rows, most) if isinstance(num_rows, int) else most
        ends = jnp.cumsum(group_sizes)
        blocks = -(-group_sizes // size)
        last = jnp.cumsum(blocks)

        def body(i, result):
            group = jnp.searchsorted(last, i, side="right")
            first = ends[group] - group_sizes[group]
            first += size * (i - last[group] + blocks[group])
            # A block that would reach beyond the last row begins earlier.
            start = jnp.minimum(first, num_rows - size)
            row = jnp.expand_dims(start + jnp.arange(size), -1)
            own = (first <= row) & (row < ends[group])
            return update(result, group, own, lambda x: block_of(x, start, size), start)

        return lax.fori_loop(0, last[-1], body, result)

    def block_of(x, start, size):
        return lax.dynamic_slice_in_dim(x, start, size)

    def multiply(rows, kernel, bias, group_sizes, transposed=False):
        """`[a, f]`: each group's rows times its matrix."""

        def update(result, group, own, block, start):
            matrix = lax.dynamic_index_in_dim(kernel, group, keepdims=False)
            y = block(rows) @ (matrix.T if transposed else matrix)
            if bias is not None:
                y = y + lax.dynamic_index_in_dim(bias, group, keepdims=False)
            y = jnp.where(own, y, block(result))
            return lax.dynamic_update_slice_in_dim(result, y, start, axis=0)

        width = kernel.shape[1 if transposed else 2]
        result = jnp.zeros((rows.shape[0], width), rows.dtype)
        return over_blocks(update, result, group_sizes, rows.shape[0])

    def multiply_rows(rows, upstream, bias, group_sizes):
        """`[e, h, f]` and `[e, 1, f]`: the gradients of kernel and bias."""
        # Half precision does not add up many blocks.
        wide = {"dtype": jnp.promote_types(rows.dtype, "float32")}

        def update(result, group, own, block, start):
            kernel, bias = result
            y = jnp.where(own, block(upstream), 0)
            # A row of a neighbour may be NaN, which 0 does not silence.
            x = jnp.where(own, block(rows), 0)
            product = jnp.matmul(x.T, y, preferred_element_type=wide["dtype"])
            kernel = kernel.at[group].add(product)
            if bias is not None:
                bias = bias.at[group].add(jnp.sum(y, axis=0, keepdims=True, **wide))
            return kernel, bias

        shape = (group_sizes.shape[0], rows.shape[1], upstream.shape[1])
        zeros = jnp.zeros(shape, **wide), None
        if bias is not None:
            zeros = zeros[0], jnp.zeros(bias.shape, **wide)
        sums = over_blocks(update, zeros, group_sizes, rows.shape[0])
        return jax.tree.map(lambda x: x.astype(rows.dtype), sums)

    @jax.custom_vjp
    def by_blocks(rows, kernel, bias, group_sizes):
        return multiply(rows, kernel, bias, group_sizes)

    def forward(*arguments):
        return by_blocks(*arguments), arguments

    def backward(arguments, upstream):
        rows, kernel, bias, group_sizes = arguments
        d_rows = multiply(upstream, kernel, None, group_sizes, transposed=True)
        return d_rows, *multiply_rows(rows, upstream, bias, group_sizes), None

    by_blocks.defvjp(forward, backward)

    def by_ragged_dot(rows, kernel, bias, group_sizes):
        ends = jnp.cumsum(group_sizes)
        index = jnp.arange(rows.shape[0])
        result = lax.ragged_dot(rows, kernel, group_sizes)
        if bias is not None:
            group = jnp.searchsorted(ends, index, side="right")
            result = result + bias.at[group, 0].get(mode="fill", fill_value=0)
        return jnp.where(jnp.expand_dims(index < ends[-1], -1), result, 0)

    def grouped_dense(rows, kernel, bias, group_sizes):
        if jax.default_backend() != "cpu":
            return by_ragged_dot(rows, kernel, bias, group_sizes)
        num_rows = rows.shape[0]
        if isinstance(num_rows, int) and num_rows:
            return by_blocks(rows, kernel, bias, group_sizes)
        # Of an unknown number of rows, or none: at least a block of them.
        rows = jnp.concatenate([rows, jnp.zeros((most, rows.shape[1]), rows.dtype)])
        return by_blocks(rows, kernel, bias, group_sizes)[:num_rows]

    return grouped_dense


def _torch_kernels():
    import torch

    def gather_rows(x, index):
        x = torch.cat([x.new_zeros((1, x.shape[1])), x])
        return x.index_select(0, index + 1)

    def scatter_add_rows(rows, index, num_rows):
        result = rows.new_zeros((num_rows + 1, *rows.shape[1:]))
        return result.index_add(0, index + 1, rows)[1:]

    def split_rows(rows, group_sizes):
        if rows.device.type == "meta":  # Only the shape is asked for.
            return [rows, *(rows[:0] for _ in group_sizes)]
        sizes = group_sizes.tolist()
        return rows.split([*sizes, rows.shape[0] - sum(sizes)])

    class GroupedDense(torch.autograd.Function):
        @staticmethod
        def forward(ctx, rows, kernel, bias, group_sizes):
            result = rows.new_empty((rows.shape[0], kernel.shape[2]))
            groups = slices(group_sizes)
            for i, group in groups:
                x, y = rows[group], result[group]
                if bias is None:
                    torch.mm(x, kernel[i], out=y)
                else:
                    torch.addmm(bias[i], x, kernel[i], out=y)
            clear_left_over(result, groups)
            ctx.save_for_backward(rows, kernel)
            ctx.groups, ctx.with_bias = groups, bias is not None
            return result

        @staticmethod
        @torch.autograd.function.once_differentiable
        def backward(ctx, upstream):
            rows, kernel = ctx.saved_tensors
            upstream = upstream.contiguous()
            d_rows, d_kernel = torch.empty_like(rows), torch.empty_like(kernel)
            d_bias = None
            if ctx.with_bias:
                d_bias = kernel.new_zeros((kernel.shape[0], 1, kernel.shape[2]))
            for i in set(range(kernel.shape[0])) - {i for i, _ in ctx.groups}:
                d_kernel[i] = 0
            for i, group in ctx.groups:
                x, y = rows[group], upstream[group]
                torch.mm(y, kernel[i].T, out=d_rows[group])
                torch.mm(x.T, y, out=d_kernel[i])
                if ctx.with_bias:
                    torch.sum(y, 0, keepdim=True, out=d_bias[i])
            clear_left_over(d_rows, ctx.groups)
            return d_rows, d_kernel, d_bias, None

    def slices(group_sizes):
        """The groups that are not empty, and their rows."""
        groups, start = [], 0
        for i, size in enumerate(group_sizes.tolist()):
            if size:
                groups.append((i, slice(start, start + size)))
            start += size
        return groups

    def clear_left_over(rows, groups):
        rows[groups[-1][1].stop if groups else 0 :] = 0

    def grouped_dense(rows, kernel, bias, group_sizes):
        if rows.device.type == "meta":
            return rows.new_empty((rows.shape[0], kernel.shape[2]))
        return GroupedDense.apply(rows, kernel, bias, group_sizes)

    return gather_rows, scatter_add_rows, split_rows, grouped_dense


PLAIN = (
    plain_gather_rows,
    plain_scatter_add_rows,
    plain_split_rows,
    plain_grouped_dense,
)

gather_rows, scatter_add_rows, split_rows, grouped_dense = {
    "tensorflow": _tensorflow_kernels,
    "jax": _jax_kernels,
    "torch": _torch_kernels,
}.get(keras.backend.backend(), lambda: PLAIN)()
