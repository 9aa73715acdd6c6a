"""Initializers: the default, copies, and stacks of independent weights."""

import random

import keras
from keras import ops

from keras_moe.utils import checks

serialize = keras.initializers.serialize

# Their values do not depend on the shape of the weight.
ELEMENTWISE = (
    keras.initializers.Zeros,
    keras.initializers.Ones,
    keras.initializers.RandomNormal,
    keras.initializers.RandomUniform,
    keras.initializers.TruncatedNormal,
)


def get(name, initializer):
    """Returns an initializer; `TruncatedNormal(stddev=0.02)` for `None`."""
    if initializer is None:
        return keras.initializers.TruncatedNormal(stddev=0.02)
    return checks.from_keras(name, initializer, keras.initializers.get)


def clone(initializer):
    """Returns a copy for another weight: one object draws equal values each time."""
    if isinstance(initializer, keras.initializers.Initializer):
        return initializer.clone()
    return initializer


class Stacked(keras.initializers.Initializer):
    """Initializes a stack of weights, each as if it were a weight of its own.

    Called with the shape of the whole, an initializer such as `"glorot_uniform"`
    or `"orthogonal"` counts the inputs and outputs of all experts as one's.

    Args:
        initializer: initializer, or function of a shape and a dtype.
        bias: bool, whether the weights are biases `[n, 1, f]`, each of which the
            initializer sees as `[f]`.
    """

    def __init__(self, initializer, bias=False):
        self.initializer = initializer
        self.bias = bias

    def __call__(self, shape, dtype=None):
        number, *one = shape
        one = one[1:] if self.bias else one
        initializer = self.initializer
        if type(initializer) in ELEMENTWISE:
            return initializer(shape, dtype=dtype)
        if _scales_by_fans(initializer):
            # One draw for all: a loop over hundreds of experts is slow to compile.
            joined = (number * one[0], *one[1:])
            weights = _with_fans_of(initializer, one, joined)(joined, dtype=dtype)
        else:
            parts = _independent(initializer, number)
            weights = ops.stack([part(tuple(one), dtype=dtype) for part in parts])
        return ops.reshape(weights, shape)

    def get_config(self):
        return {"initializer": serialize(self.initializer), "bias": self.bias}


def _scales_by_fans(initializer):
    scaling = keras.initializers.VarianceScaling
    return isinstance(initializer, scaling) and (
        type(initializer).__call__ is scaling.__call__
    )


def _with_fans_of(initializer, one, joined):
    """Returns an initializer for the shape `joined` with the variance for `one`."""

    def fan(shape):
        fan_in, fan_out = shape[0], shape[-1]
        mean = (fan_in + fan_out) / 2
        return {"fan_in": fan_in, "fan_out": fan_out, "fan_avg": mean}[initializer.mode]

    return keras.initializers.VarianceScaling(
        scale=initializer.scale * fan(joined) / fan(one),
        mode=initializer.mode,
        distribution=initializer.distribution,
        seed=initializer.seed,
    )


def _independent(initializer, number):
    """Returns initializers that draw different values."""
    seed = getattr(initializer, "seed", None)
    if not isinstance(seed, int):
        # No seed, or a generator, which changes from draw to draw.
        return [initializer] * number
    seeds = random.Random(seed)
    config = initializer.get_config()
    return [
        type(initializer).from_config({**config, "seed": seeds.randrange(2**31)})
        for _ in range(number)
    ]
