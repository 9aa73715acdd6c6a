"""Mixture-of-Experts layers for Keras 3.

The same letters denote the same axes everywhere, in docstrings, comments and einsums:

    g  groups             t  tokens per group     h  hidden size
    e  experts            c  capacity: slots per expert and group
    k  experts per token  f  size of an expert's inner layer
    a  assignments: rows, one per selected expert of a token
"""

import sys

from keras_moe import (
    activations,
    callbacks,
    convert,
    distribution,
    losses,
    presets,
    routing,
    visualization,
)
from keras_moe.convert.keras_hub import accelerate
from keras_moe.experts import FeedForward, FeedForwardExperts, HeterogeneousExperts
from keras_moe.inspection import route, summary
from keras_moe.layers import (
    HierarchicalMoeLayer,
    MoeLayer,
    MoeLayerWithBackbone,
    MultiGateMoeLayer,
    SoftMoeLayer,
)
from keras_moe.metrics import LayerMetrics
from keras_moe.quantization import quantize_experts
from keras_moe.routers import (
    BiasBalancedMaskedRouter,
    ExpertsChooseMaskedRouter,
    Gate,
    MaskedRouter,
    RoundRobinRouter,
    Router,
    SparseMixerRouter,
    TokensChooseRouter,
    Top2MaskedRouter,
    TopPMaskedRouter,
)
from keras_moe.routing import RouterMask, Rows, Slots
from keras_moe.upcycling import (
    replace_layers,
    select_experts,
    upcycle,
    upcycle_model,
)
from keras_moe.utils.memory import keep_freed_memory

__version__ = "0.2.0"

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
    "MultiGateMoeLayer",
    "RoundRobinRouter",
    "Router",
    "RouterMask",
    "Rows",
    "Slots",
    "SoftMoeLayer",
    "SparseMixerRouter",
    "TokensChooseRouter",
    "Top2MaskedRouter",
    "TopPMaskedRouter",
    "accelerate",
    "activations",
    "callbacks",
    "convert",
    "distribution",
    "keep_freed_memory",
    "losses",
    "presets",
    "quantize_experts",
    "replace_layers",
    "route",
    "routing",
    "select_experts",
    "summary",
    "upcycle",
    "upcycle_model",
    "visualization",
]

# The modules of custom routers had these names before `keras_moe.routing`.
for _name in ("selection", "placement"):
    sys.modules[f"{__name__}.{_name}"] = getattr(routing, _name)


def __dir__():
    return [*__all__, "__version__"]
