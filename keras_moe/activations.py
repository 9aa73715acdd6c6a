"""Activations that Keras does not have, for feed-forward layers and experts.

May import: utils.
"""

import keras
from keras import ops

from keras_moe.utils import checks


@keras.saving.register_keras_serializable(package="keras_moe")
def squared_relu(x):
    """Computes `relu(x) ** 2`.

    Args:
        x: float tensor.

    Returns:
        A tensor of the same shape.

    Example:

    ```python
    layer = keras_moe.FeedForward(64, activation=keras_moe.activations.squared_relu)
    ```

    Reference:
        [So et al., 2021](https://arxiv.org/abs/2109.08668), section 4.
    """
    return ops.square(ops.relu(x))


@keras.saving.register_keras_serializable(package="keras_moe")
def gelu_tanh(x):
    """Computes GELU by its approximation with tanh.

    Args:
        x: float tensor.

    Returns:
        A tensor of the same shape.

    Example:

    ```python
    layer = keras_moe.FeedForward(64, activation=keras_moe.activations.gelu_tanh)
    ```

    Reference:
        [Hendrycks and Gimpel, 2016](https://arxiv.org/abs/1606.08415), section 2.
    """
    return ops.gelu(x, approximate=True)


@keras.saving.register_keras_serializable(package="keras_moe")
def clamped_swiglu(gate, inner, limit=7.0, alpha=1.702, offset=1.0):
    """Computes the gated activation of GPT-OSS.

    `(clip(inner, -limit, limit) + offset) * g * sigmoid(alpha * g)`, where `g` is
    `min(gate, limit)`. It is the activation of gated layers: a function of the gate and
    of the inner layer.

    Args:
        gate: float tensor `[..., f]`.
        inner: `[..., f]`.
        limit: float above 0. Defaults to 7.
        alpha: float. Defaults to 1.702.
        offset: float. Defaults to 1.

    Returns:
        A tensor of the same shape.

    Example:

    ```python
    clamped_swiglu = keras_moe.activations.clamped_swiglu
    experts = keras_moe.FeedForwardExperts(8, 64, activation=clamped_swiglu, gated=True)
    ```

    Reference:
        [OpenAI, 2025](https://arxiv.org/abs/2508.10925), section 2.2.
    """
    gate = ops.minimum(gate, ops.cast(limit, gate.dtype))
    inner = ops.clip(inner, -limit, limit)
    return (inner + offset) * (gate * ops.sigmoid(alpha * gate))


@keras.saving.register_keras_serializable(package="keras_moe")
class ClampedSwiGLU:
    """The activation `clamped_swiglu` with other constants, which are in files.

    Args:
        limit: float above 0. Defaults to 7.
        alpha: float. Defaults to 1.702.
        offset: float. Defaults to 1.

    Example:

    ```python
    activation = keras_moe.activations.ClampedSwiGLU(limit=10.0, alpha=1.0, offset=0.0)
    experts = keras_moe.FeedForwardExperts(8, 64, activation=activation, gated=True)
    ```
    """

    def __init__(self, limit=7.0, alpha=1.702, offset=1.0):
        self.limit = checks.number("limit", limit, above=True)
        self.alpha = checks.number("alpha", alpha)
        self.offset = checks.number("offset", offset)

    def __call__(self, gate, inner):
        return clamped_swiglu(gate, inner, self.limit, self.alpha, self.offset)

    def __repr__(self):
        values = ", ".join(f"{k}={v}" for k, v in self.get_config().items())
        return f"{type(self).__name__}({values})"

    def __eq__(self, other):
        return type(other) is type(self) and other.get_config() == self.get_config()

    def __hash__(self):
        return hash((self.limit, self.alpha, self.offset))

    def get_config(self):
        return {"limit": self.limit, "alpha": self.alpha, "offset": self.offset}

    @classmethod
    def from_config(cls, config):
        return cls(**config)
