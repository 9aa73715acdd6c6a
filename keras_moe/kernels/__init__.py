"""What depends on the backend: operations on rows, and the state of layers.

May import: utils.

No other room imports or names a backend. Each operation has a form in `keras.ops`
(`plain`) that runs everywhere, and one that is fast on its backend. `state` decides
when variables that are not weights may change, and how losses leave a layer.
"""

import importlib

import keras

BACKEND = keras.backend.backend()

# Whether a training step receives the model's state and returns it, instead of
# updating variables in place.
STATE_IS_PASSED = BACKEND == "jax"

# Whether ops run one after the other over all of their data, instead of being
# compiled into one program.
RUNS_OP_BY_OP = BACKEND in ("tensorflow", "torch")

# Whether large tensors get new pages of memory, unless the process keeps freed ones.
GETS_NEW_PAGES = BACKEND == "torch"

# Whether XLA can compile `grouped_dense`: not where shapes depend on data.
XLA_COMPILES_ROWS = BACKEND != "tensorflow"

_known = BACKEND if BACKEND in ("tensorflow", "jax", "torch") else "plain"
_kernels = importlib.import_module(f"{__name__}.{_known}")

ForwardPasses = _kernels.ForwardPasses
FrozenMatrices = _kernels.FrozenMatrices
argsort = _kernels.argsort
as_size = _kernels.as_size
assign_part = _kernels.assign_part
assign_parts = _kernels.assign_parts
batched_dense = _kernels.batched_dense
can_assign = _kernels.can_assign
combine_rows = _kernels.combine_rows
gather_rows = _kernels.gather_rows
grouped_dense = _kernels.grouped_dense
loss_is_reachable = _kernels.loss_is_reachable
matmul = _kernels.matmul
num_row_shards = _kernels.num_row_shards
ops = _kernels.ops
scatter_add_rows = _kernels.scatter_add_rows
split_rows = _kernels.split_rows
sum_over_replicas = _kernels.sum_over_replicas
take_elements = _kernels.take_elements
top_k = _kernels.top_k
weigh_rows = _kernels.weigh_rows


def clip_size(size, low, high):
    """Limits a symbolic dimension of JAX to a range."""
    import jax

    return jax.core.min_dim(jax.core.max_dim(size, low), high)
