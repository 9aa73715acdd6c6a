"""Moving rows, and multiplying groups of them: the only package that knows which
backend runs.

Every kernel stands in `keras.ops` first (`plain`), which runs everywhere, and
then as the backend does it best. An index of -1 means no row.
"""

import importlib

import keras

BACKEND = keras.backend.backend()

# Whether a training step is given a model's state and returns it, instead of
# changing it.
CARRIES_STATE = BACKEND == "jax"

# Whether ops run one after the other, each over all of its data, rather than
# compiled into one.
RUNS_OP_BY_OP = BACKEND in ("tensorflow", "torch")

# Whether XLA can compile `grouped_dense`: not where shapes follow from data.
XLA_COMPILES_ROWS = BACKEND != "tensorflow"

_known = BACKEND if BACKEND in ("tensorflow", "jax", "torch") else "plain"
_kernels = importlib.import_module(f"{__name__}.{_known}")

argsort = _kernels.argsort
as_size = _kernels.as_size
gather_rows = _kernels.gather_rows
row_parts = _kernels.row_parts
scatter_add_rows = _kernels.scatter_add_rows
split_rows = _kernels.split_rows
grouped_dense = _kernels.grouped_dense


def clip_size(size, low, high):
    """A symbolic dimension of JAX between two others."""
    import jax

    return jax.core.min_dim(jax.core.max_dim(size, low), high)
