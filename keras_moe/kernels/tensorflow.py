"""The kernels for TensorFlow."""

import collections
import itertools
import re
import weakref

import tensorflow as tf
from keras import ops

from keras_moe.kernels import plain
from keras_moe.kernels.plain import (  # noqa: F401
    FrozenMatrices,
    argsort,
    as_size,
    can_assign,
    flat_index,
    matmul,
    num_row_shards,
    take_elements,
    weigh_rows,
)

# Keys of the collectives of this package; those of TensorFlow itself begin at 1.
_collective_keys = itertools.count(1_700_000_000)
# The collectives of each traced step: their key, and how many each replica has.
_collectives = weakref.WeakKeyDictionary()

# The graphs of loops and branches inside a layer, whose name scope precedes this.
INNER_GRAPH = re.compile(r".+_(while_body|cond_true|cond_false)_\d+$")


def assign_parts(variable, parts):
    if not _can_assign_slices(variable):
        return plain.assign_parts(variable, parts)
    for i, part in enumerate(parts):
        variable.value[i].assign(part)


def assign_part(variable, i, part):
    if not _can_assign_slices(variable):
        return plain.assign_part(variable, i, part)
    # A quarter of the time of an assignment to a slice.
    variable.value.scatter_update(tf.IndexedSlices(part, i))


def _can_assign_slices(variable):
    """Returns whether it is one `tf.Variable`, not one for each replica or a tensor."""
    value = variable.value
    is_split = isinstance(value, tf.distribute.DistributedValues)
    return isinstance(value, tf.Variable) and not is_split


def top_k(x, k):
    return tf.math.top_k(x, k)  # It defines the order of equal values.


def gather_rows(x, index):
    groups, n, *width = ops.shape(x)
    rows = ops.reshape(x, (groups * n, *width))
    return _gather(rows, flat_index(index, n))


def scatter_add_rows(rows, index, num_rows):
    groups, width = ops.shape(index)[-2], ops.shape(rows)[len(index.shape) :]
    sums = _scatter_add(rows, flat_index(index, num_rows), groups * num_rows)
    return ops.reshape(sums, (groups, num_rows, *width))


def combine_rows(rows, weight, index, num_rows):
    return scatter_add_rows(weigh_rows(rows, weight), index, num_rows)


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


def sum_over_replicas(x):
    x = tf.stop_gradient(x)
    context = tf.distribute.get_replica_context()
    if context is None or context.num_replicas_in_sync == 1:
        return x
    if tf.executing_eagerly():
        raise ValueError(
            "Sums over the replicas of a strategy need a compiled step. "
            "Received: `run_eagerly=True`."
        )
    # `ReplicaContext.all_reduce` lets the other replicas begin their step, and Keras
    # then discards the losses that layers of this one have added.
    replica = int(tf.get_static_value(context.replica_id_in_sync_group))
    step = _graphs()[-1]
    if step not in _collectives:
        counts = collections.defaultdict(itertools.count)
        _collectives[step] = next(_collective_keys), counts
    key, counts = _collectives[step]
    # `CollectiveReduceV2` waits forever on CPUs (TensorFlow 2.21).
    return tf.raw_ops.CollectiveReduce(
        input=x,
        group_size=context.num_replicas_in_sync,
        group_key=key,
        instance_key=next(counts[replica]),
        merge_op="Add",
        final_op="Id",
        subdiv_offsets=[0],
    )


def split_rows(rows, group_sizes):
    remaining = tf.shape(rows)[0] - tf.reduce_sum(group_sizes)
    sizes = tf.concat([group_sizes, [remaining]], axis=0)
    return tf.split(rows, sizes, num=group_sizes.shape[0] + 1)


def batched_dense(x, kernel):
    def multiply(x, kernel):
        return tf.map_fn(
            lambda arguments: tf.matmul(arguments[0], kernel.make(*arguments[1:])),
            (x, *kernel.arrays),
            fn_output_signature=x.dtype,
            parallel_iterations=1,
        )

    @tf.custom_gradient
    def dense(x):
        return multiply(x, kernel), lambda dy: multiply(dy, kernel.transpose())

    return dense(x)


def grouped_dense(rows, kernel, bias, group_sizes):
    if isinstance(kernel, FrozenMatrices):
        return _by_frozen_matrices(rows, kernel, bias, group_sizes)
    *groups, remaining = split_rows(rows, group_sizes)
    pairs = zip(groups, tf.unstack(kernel), strict=True)
    results = [tf.matmul(x, w) for x, w in pairs]
    if bias is not None:
        pairs = zip(results, tf.unstack(bias), strict=True)
        results = [y + b for y, b in pairs]
    zeros = tf.zeros([tf.shape(remaining)[0], kernel.shape[-1]], rows.dtype)
    return tf.concat([*results, zeros], axis=0)


def _by_frozen_matrices(rows, kernel, bias, group_sizes):
    @tf.custom_gradient
    def dense(rows):
        def gradient(upstream):
            return _one_by_one(upstream, kernel.transpose(), group_sizes)

        return _one_by_one(rows, kernel, group_sizes), gradient

    result = dense(rows)
    if bias is None:
        return result
    *groups, remaining = split_rows(result, group_sizes)
    pairs = zip(groups, tf.unstack(bias), strict=True)
    return tf.concat([*(y + b for y, b in pairs), remaining], axis=0)


def _one_by_one(rows, kernel, group_sizes):
    """`grouped_dense` without a bias, in a loop over the groups that have rows."""
    ends = tf.cumsum(group_sizes)
    groups = tf.cast(tf.where(group_sizes > 0)[:, 0], "int32")
    number, width = tf.size(groups), kernel.shape[2]

    def body(i, results):
        group = groups[i]
        x = rows[ends[group] - group_sizes[group] : ends[group]]
        return i + 1, results.write(i, tf.matmul(x, kernel[group]))

    results = tf.TensorArray(
        rows.dtype, number + 1, infer_shape=False, element_shape=[None, width]
    )
    _, results = tf.while_loop(
        lambda i, _: i < number, body, (0, results), parallel_iterations=1
    )
    remaining = tf.shape(rows)[0] - ends[-1]
    zeros = tf.zeros(tf.stack([remaining, width]), rows.dtype)
    return tf.reshape(results.write(number, zeros).concat(), [-1, width])


def loss_is_reachable(loss):
    return not any(INNER_GRAPH.match(graph.name) for graph in _graphs())


def _graphs():
    """Returns the graphs that are being traced, those of inner functions first."""
    graphs, graph = [], tf.compat.v1.get_default_graph()
    while hasattr(graph, "outer_graph"):  # Without the one of eager execution.
        graphs.append(graph)
        graph = graph.outer_graph
    return graphs


class ForwardPasses:
    first_has_gradient = False

    def __init__(self):
        # The values of first passes whose second ones are still to come.
        self._values = weakref.WeakKeyDictionary()

    def next(self, value=None):
        graph = tf.compat.v1.get_default_graph()
        values = self._values.setdefault(graph, collections.deque(maxlen=64))
        if _recording_is_stopped():  # As `tf.recompute_grad` does for the first pass.
            values.append(value)
            return False, value
        return (True, values.pop()) if values else (False, value)


def _recording_is_stopped():
    x = tf.ones(())
    with tf.GradientTape() as tape:
        tape.watch(x)
        y = tf.identity(x)
    return tape.gradient(y, x) is None
