"""The kernels for JAX."""

import functools
import math

import jax
import jax.numpy as jnp
import keras
from jax import lax
from jax.sharding import PartitionSpec
from keras import ops  # noqa: F401

from keras_moe.kernels.plain import (  # noqa: F401
    ForwardPasses,
    FrozenMatrices,
    argsort,
    as_size,
    assign_part,
    assign_parts,
    current_scope,
    matmul,
    split_rows,
    sum_over_replicas,
    take_elements,
    top_k,  # TensorFlow cannot read `lax.top_k` in a SavedModel.
)
from keras_moe.utils.layouts import inner_axes

if hasattr(jax, "shard_map"):

    def shard_map(f, mesh, axis_names, **specs):
        f = jax.shard_map(f, mesh=mesh, axis_names=axis_names, check_vma=False, **specs)
        # Where a compiler splits over the other axes, it needs a compiled function.
        return f if axis_names == set(mesh.axis_names) else jax.jit(f)

else:  # Before JAX 0.6.1, which gathers what is split over the other axes.
    from jax.experimental import shard_map as experimental

    def shard_map(f, mesh, axis_names, **specs):
        return experimental.shard_map(f, mesh, check_rep=False, **specs)


# Rows of a group that are multiplied at once on a CPU. Large blocks, which read the
# matrices less often, come first; those that the average group does not fill are not
# used.
BLOCKS = 1024, 512, 256, 128, 64


# In both, the group is a batching dimension, so that a compiler that partitions groups
# over devices knows that no row leaves its device.
def gather_rows(x, index):
    if 0 in x.shape[:2]:  # Old versions of JAX gather nothing from nothing.
        return jnp.zeros((*index.shape, *x.shape[2:]), x.dtype)
    dimensions = lax.GatherDimensionNumbers(
        offset_dims=tuple(range(index.ndim, index.ndim + x.ndim - 2)),
        collapsed_slice_dims=(1,),
        start_index_map=(1,),
        operand_batching_dims=(0,),
        start_indices_batching_dims=(index.ndim - 2,),
    )
    return lax.gather(
        x,
        jnp.expand_dims(index, -1),
        dimensions,
        slice_sizes=(1, 1, *x.shape[2:]),
        mode="fill",  # -1 is out of bounds.
        fill_value=0,
    )


def scatter_add_rows(rows, index, num_rows):
    dimensions = lax.ScatterDimensionNumbers(
        update_window_dims=tuple(range(index.ndim, rows.ndim)),
        inserted_window_dims=(1,),
        scatter_dims_to_operand_dims=(1,),
        operand_batching_dims=(0,),
        scatter_indices_batching_dims=(index.ndim - 2,),
    )
    shape = index.shape[-2], num_rows, *rows.shape[index.ndim :]
    return lax.scatter_add(
        jnp.zeros(shape, rows.dtype),
        jnp.expand_dims(index, -1),
        rows,
        dimensions,
        mode="drop",
    )


def weigh_rows(rows, weight):
    # The gradient of an elementwise product would sum over the rows' last axis, which
    # takes XLA a hundred times as long on a CPU.
    return jnp.einsum("...,...h->...h", weight, rows, precision="highest")


def combine_rows(rows, weight, index, num_rows):
    return scatter_add_rows(weigh_rows(rows, weight), index, num_rows)


def num_row_shards(groups, num_experts):
    if keras.distribution.distribution() is None or not isinstance(groups, int):
        return 1, 1
    mesh, batch, others = _mesh_axes(num_experts)
    if groups % mesh.shape[batch]:
        return 1, 1
    return mesh.shape[batch], math.prod(mesh.shape[axis] for axis in others)


def batched_dense(x, kernel):
    if keras.distribution.distribution() is not None:
        # A loop over experts that are split over devices would gather them.
        return x @ lax.stop_gradient(kernel.make(*kernel.arrays))

    @jax.checkpoint
    def multiply(arguments):
        x, *arrays = arguments
        return x @ kernel.make(*arrays)

    return lax.map(multiply, (x, *kernel.arrays))


def grouped_dense(rows, kernel, bias, group_sizes):
    make, arrays, num_experts = None, (kernel,), kernel.shape[0]
    if isinstance(kernel, FrozenMatrices):
        make, arrays = kernel.make, kernel.arrays
    if len(group_sizes) == num_experts:
        return _grouped_dense(make, rows, arrays, bias, group_sizes)
    # Rows are split over devices, each of which multiplies those of its own experts.
    mesh, batch, others = _mesh_axes(num_experts)

    def on_each_device(rows, arrays, bias, group_sizes):
        own = len(arrays[0])
        first = lax.axis_index(others) * own if others else 0
        sizes = lax.dynamic_slice_in_dim(group_sizes, first, own)
        return _grouped_dense(make, rows, arrays, bias, sizes)

    of_rows, of_experts = PartitionSpec((batch, *others)), PartitionSpec(others)
    return shard_map(
        on_each_device,
        mesh=mesh,
        axis_names={batch, *others},
        in_specs=(of_rows, of_experts, of_experts, of_rows),
        out_specs=of_rows,
    )(rows, arrays, bias, group_sizes)


def _mesh_axes(num_experts):
    """Returns the mesh, the axis of the batch, and the axes that split the experts."""
    distribution = keras.distribution.distribution()
    mesh, batch = distribution.device_mesh.backend_mesh, distribution.batch_dim_name
    not_of_experts = {batch, *inner_axes()}
    names = distribution.device_mesh.axis_names
    others = [axis for axis in names if axis not in not_of_experts]
    if num_experts % math.prod(mesh.shape[axis] for axis in others):
        others = []  # The experts are replicated.
    return mesh, batch, tuple(others)


def _grouped_dense(make, rows, arrays, bias, group_sizes):
    """`grouped_dense` by matrices `make(*arrays)`; without `make`, by `arrays[0]`."""
    if jax.default_backend() != "cpu" and make is None:
        return by_ragged_dot(rows, *arrays, bias, group_sizes)
    num_rows = rows.shape[0]
    if isinstance(num_rows, int) and num_rows:
        return _by_blocks(make, rows, arrays, bias, group_sizes)
    # For an unknown number of rows, or none: one block more.
    rows = jnp.concatenate([rows, jnp.zeros((BLOCKS[-1], rows.shape[1]), rows.dtype)])
    return _by_blocks(make, rows, arrays, bias, group_sizes)[:num_rows]


def by_ragged_dot(rows, kernel, bias, group_sizes):
    """`grouped_dense` for GPUs and TPUs; on a CPU it multiplies every matrix."""
    ends = jnp.cumsum(group_sizes)
    index = jnp.arange(rows.shape[0])
    result = lax.ragged_dot(rows, kernel, group_sizes)
    if bias is not None:
        group = jnp.searchsorted(ends, index, side="right")
        result = result + bias.at[group, 0].get(mode="fill", fill_value=0)
    return jnp.where(jnp.expand_dims(index < ends[-1], -1), result, 0)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _by_blocks(make, rows, arrays, bias, group_sizes):
    return _multiply(make, rows, arrays, bias, group_sizes)


def _forward(make, *arguments):
    return _by_blocks(make, *arguments), arguments


def _backward(make, arguments, upstream):
    rows, arrays, bias, group_sizes = arguments
    d_rows = _multiply(make, upstream, arrays, None, group_sizes, transposed=True)
    d_arrays = None if make else (_kernel_gradient(rows, upstream, group_sizes),)
    d_bias = None if bias is None else _bias_gradient(upstream, group_sizes)
    return d_rows, d_arrays, d_bias, None


_by_blocks.defvjp(_forward, _backward)


def _multiply(make, rows, arrays, bias, group_sizes, transposed=False):
    """`[a, f]`: each group's rows times its matrix."""

    def matrix(group):
        of_group = [lax.dynamic_index_in_dim(x, group, keepdims=False) for x in arrays]
        found = make(*of_group) if make else of_group[0]
        return found.T if transposed else found

    def update(result, group, own, block, start):
        y = block(rows) @ matrix(group)
        if bias is not None:
            y = y + lax.dynamic_index_in_dim(bias, group, keepdims=False)
        y = jnp.where(own, y, block(result))
        return lax.dynamic_update_slice_in_dim(result, y, start, axis=0)

    width = jax.eval_shape(matrix, 0).shape[1]
    result = jnp.zeros((rows.shape[0], width), rows.dtype)
    return _over_blocks(update, result, group_sizes, rows.shape[0])


# Each gradient has a loop of its own, so that compilers drop that of a frozen weight.
# Sums of many blocks need more than half precision.
def _kernel_gradient(rows, upstream, group_sizes):
    """`[e, h, f]`: the product of each group's rows and their upstream gradients."""
    wide = jnp.promote_types(rows.dtype, "float32")

    def update(kernel, group, own, block, start):
        # A row of the next group may be NaN, and 0 · NaN is NaN.
        x, y = (jnp.where(own, block(x), 0) for x in (rows, upstream))
        product = jnp.matmul(x.T, y, preferred_element_type=wide)
        return kernel.at[group].add(product)

    shape = (group_sizes.shape[0], rows.shape[1], upstream.shape[1])
    zeros = jnp.zeros(shape, wide)
    return _over_blocks(update, zeros, group_sizes, rows.shape[0]).astype(rows.dtype)


def _bias_gradient(upstream, group_sizes):
    """`[e, 1, f]`: the sum of each group's upstream gradients."""
    wide = jnp.promote_types(upstream.dtype, "float32")

    def update(bias, group, own, block, start):
        y = jnp.where(own, block(upstream), 0)
        return bias.at[group].add(jnp.sum(y, axis=0, keepdims=True, dtype=wide))

    zeros = jnp.zeros((group_sizes.shape[0], 1, upstream.shape[1]), wide)
    sums = _over_blocks(update, zeros, group_sizes, upstream.shape[0])
    return sums.astype(upstream.dtype)


def _over_blocks(update, result, group_sizes, num_rows):
    """Updates a result with the rows of all groups, block by block.

    The number of blocks follows the sizes of the groups in this batch.
    """
    group_sizes = jnp.asarray(group_sizes)
    ends = jnp.cumsum(group_sizes)
    firsts = ends - group_sizes
    sizes = BLOCKS[-1:]
    if isinstance(num_rows, int):
        average = num_rows // len(group_sizes)
        sizes = [x for x in BLOCKS if x <= average] or [min(*sizes, num_rows)]
    for size in sizes:
        # The last one may be nearly full; of the smallest size it may hold any rest.
        missing = size - 1 if size == sizes[-1] else size // 8
        blocks = (jnp.maximum(ends - firsts, 0) + missing) // size
        result = _over_equal_blocks(
            update, result, firsts, ends, blocks, size, num_rows
        )
        firsts = firsts + size * blocks
    return result


def _over_equal_blocks(update, result, firsts, ends, blocks, size, num_rows):
    """Updates a result with `blocks` blocks of one size per group, from row `firsts`.

    `update` receives the first row of a block, `start`, and the mask `own` of those of
    its rows that belong to the group.
    """
    last = jnp.cumsum(blocks)

    def body(i, result):
        group = jnp.searchsorted(last, i, side="right")
        first = firsts[group] + size * (i - last[group] + blocks[group])
        # A block that would reach beyond the last row begins earlier.
        start = jnp.minimum(first, num_rows - size)
        row = jnp.expand_dims(start + jnp.arange(size), -1)
        own = (first <= row) & (row < ends[group])

        def block(x):
            return lax.dynamic_slice_in_dim(x, start, size)

        return update(result, group, own, block, start)

    return lax.fori_loop(0, last[-1], body, result)


def can_assign(old, new):
    return _trace(old) is _trace(new)


def loss_is_reachable(loss):
    scope = current_scope()
    if scope is None:
        return True
    # The programs of the values that the step passes in: its own, and its gradient's.
    traces = [None, *(_trace(value) for value in scope.state_mapping.values())]
    own = _trace(loss), _trace(lax.stop_gradient(loss))
    return any(trace is x for trace in traces for x in own)


def _trace(value):
    """Returns the trace that a value belongs to; `None` for an array."""
    trace = getattr(value, "_trace", None)
    return getattr(trace, "main", None) or trace  # `main` in old versions of JAX.
