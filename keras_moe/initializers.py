"""Initializers: the default, and copies for several weights."""

import keras

from keras_moe import checks

serialize = keras.initializers.serialize


def get(name, initializer):
    """The initializer; `TruncatedNormal(stddev=0.02)` for `None`."""
    if initializer is None:
        return keras.initializers.TruncatedNormal(stddev=0.02)
    return checks.known(name, initializer, keras.initializers.get)


def clone(initializer):
    """A copy for another weight: one object draws the same values again."""
    if isinstance(initializer, keras.initializers.Initializer):
        return initializer.clone()
    return initializer
