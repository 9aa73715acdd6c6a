"""Mixture-of-Experts layers for Keras 3.

The same letters stand for the same axes everywhere, in docstrings, comments
and einsums:

    g  groups             t  tokens per group     h  hidden size
    e  experts            c  capacity: slots per expert and group
    k  experts per token  f  size of an expert's inner layer
    a  assignments: rows, one for each choice of a token
"""

from keras_moe import callbacks, convert, distribution, losses, presets
from keras_moe.acceleration import accelerate
from keras_moe.backbone import MoeLayerWithBackbone
from keras_moe.experts import FeedForward, FeedForwardExperts, HeterogeneousExperts
from keras_moe.gate import Gate
from keras_moe.hierarchical_moe_layer import HierarchicalMoeLayer
from keras_moe.inspection import summary
from keras_moe.metrics import LayerMetrics
from keras_moe.moe_layer import MoeLayer
from keras_moe.routers import (
    BiasBalancedMaskedRouter,
    ExpertsChooseMaskedRouter,
    MaskedRouter,
    Router,
    TokensChooseRouter,
    Top2MaskedRouter,
)
from keras_moe.routing import RouterMask, Rows, Slots
from keras_moe.soft_moe_layer import SoftMoeLayer
from keras_moe.upcycling import select_experts, upcycle

__version__ = "0.1.0"

__all__ = [
    "BiasBalancedMaskedRouter",
    "ExpertsChooseMaskedRouter",
    "FeedForward",
    "FeedForwardExperts",
    "Gate",
    "HeterogeneousExperts",
    "HierarchicalMoeLayer",
    "LayerMetrics",
    "MaskedRouter",
    "MoeLayer",
    "MoeLayerWithBackbone",
    "Router",
    "RouterMask",
    "Rows",
    "Slots",
    "SoftMoeLayer",
    "TokensChooseRouter",
    "Top2MaskedRouter",
    "accelerate",
    "callbacks",
    "convert",
    "distribution",
    "losses",
    "presets",
    "select_experts",
    "summary",
    "upcycle",
]
