"""Operations on rows, for each backend: gather, scatter-add, sort, grouped matmul.

May import: nothing of this package.

No other room imports or names a backend. Each
operation has a form in `keras.ops` (`plain`) that runs everywhere, and one that is
fast on its backend. An index of -1 means no row.
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

# Whether XLA can compile `grouped_dense`: not where shapes depend on data.
XLA_COMPILES_ROWS = BACKEND != "tensorflow"

_known = BACKEND if BACKEND in ("tensorflow", "jax", "torch") else "plain"
_kernels = importlib.import_module(f"{__name__}.{_known}")

argsort = _kernels.argsort
as_size = _kernels.as_size
gather_rows = _kernels.gather_rows
grouped_dense = _kernels.grouped_dense
num_row_shards = _kernels.num_row_shards
scatter_add_rows = _kernels.scatter_add_rows
split_rows = _kernels.split_rows


def clip_size(size, low, high):
    """Limits a symbolic dimension of JAX to a range."""
    import jax

    return jax.core.min_dim(jax.core.max_dim(size, low), high)
