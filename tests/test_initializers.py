import keras
import numpy as np

from keras_moe import initializers


def test_the_default():
    initializer = initializers.get("kernel_initializer", None)
    assert isinstance(initializer, keras.initializers.TruncatedNormal)
    assert initializer.stddev == 0.02
    assert isinstance(initializers.get("b", "zeros"), keras.initializers.Zeros)


def test_copies_draw_other_values():
    initializer = initializers.get("kernel_initializer", None)
    a = keras.ops.convert_to_numpy(initializers.clone(initializer)((3, 3)))
    b = keras.ops.convert_to_numpy(initializers.clone(initializer)((3, 3)))
    assert (a != b).all()


def test_a_function_is_its_own_copy():
    def ones(shape, dtype=None):
        return np.ones(shape)

    assert initializers.clone(ones) is ones
