"""Conversion of models of other packages, and acceleration of keras-hub's models.

May import: layers, routers, experts, losses, routing, kernels, activations, utils.
"""

from keras_moe.convert.configs import layer_from_config
from keras_moe.convert.conversion import (
    FORMATS,
    from_pretrained,
    load_weights,
    to_tensors,
)
from keras_moe.convert.decoding import decode_fp8, decode_mxfp4

__all__ = [
    "FORMATS",
    "decode_fp8",
    "decode_mxfp4",
    "from_pretrained",
    "layer_from_config",
    "load_weights",
    "to_tensors",
]
