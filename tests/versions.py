"""What older versions of Keras and TensorFlow lack, for the tests that need it."""

import keras
import pytest

KERAS = tuple(int(number) for number in keras.__version__.split(".")[:2])

# Quantizes experts.
WITH_QUANTIZATION = (3, 14)
# The errors where it does not, ours and Keras's.
NO_QUANTIZATION = "needs Keras 3.14", "Invalid quantization mode"
SKIPPED = "quantizes experts, for which this Keras is too old"


# TensorFlow 2.16 computes wrong values in `vectorized_map`, also for `layers.Dense`.
VECTORIZES = True
if keras.backend.backend() == "tensorflow":
    import tensorflow as tf

    VECTORIZES = not tf.__version__.startswith("2.16.")


def needs_keras(version, what):
    """Marks a test that needs a version `(3, minor)`, which has `what`."""
    return pytest.mark.skipif(
        version > KERAS, reason=f"Keras {version[0]}.{version[1]} {what}"
    )


def logs_of_batch(method, *data):
    """Returns the logs of `train_on_batch` or `test_on_batch` for one batch alone.

    Before Keras 3.15 they are means over all batches since the last reset.
    """
    method.__self__.reset_metrics()
    return {k: float(v) for k, v in method(*data, return_dict=True).items()}
