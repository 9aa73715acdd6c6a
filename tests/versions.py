"""What older versions of Keras and of the backends lack, for the tests that need it."""

import importlib

import keras
import pytest


def numbers(version):
    """Returns the first two numbers of a version."""
    return tuple(int(number) for number in version.split(".")[:2])


BACKEND = keras.backend.backend()
KERAS = numbers(keras.__version__)
# A backend has the name of its module.
OF_BACKEND = numbers(importlib.import_module(BACKEND).__version__)

# Quantizes experts.
WITH_QUANTIZATION = (3, 14)
# The errors where it does not, ours and Keras's.
NO_QUANTIZATION = "needs Keras 3.14", "Invalid quantization mode"
SKIPPED = "quantizes experts, for which this Keras is too old"


def needs_keras(version, what, backend=BACKEND):
    """Marks a test that needs a version `(3, minor)`, on a backend: it has `what`."""
    return pytest.mark.skipif(
        version > KERAS and backend == BACKEND,
        reason=f"Keras {version[0]}.{version[1]} {what}",
    )


def needs_newer(backend, version):
    """Marks a test that fails by a fault of a backend up to `(major, minor)`."""
    return pytest.mark.skipif(
        version >= OF_BACKEND and backend == BACKEND,
        reason=f"a fault of {backend} {version[0]}.{version[1]}",
    )


def logs_of_batch(method, *data):
    """Returns the logs of `train_on_batch` or `test_on_batch` for one batch alone.

    Before Keras 3.15 they are means over all batches since the last reset.
    """
    method.__self__.reset_metrics()
    return {k: float(v) for k, v in method(*data, return_dict=True).items()}
