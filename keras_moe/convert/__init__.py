"""Conversion of checkpoints of other packages, and acceleration of keras-hub's models.

May import: layers, experts, routers, routing, losses, kernels, utils.
"""

from keras_moe.convert.conversion import load_weights, to_tensors
from keras_moe.convert.formats import FORMATS

__all__ = ["FORMATS", "load_weights", "to_tensors"]
