"""The dense layer of a `FeedForward`."""

import keras

from keras_moe.experts.adaptation import AdaptableDense


# The name of the class is in files, as that of every layer that a list holds.
class Dense(AdaptableDense, keras.layers.Dense):
    """A `keras.layers.Dense` whose adapters are kept in files."""
