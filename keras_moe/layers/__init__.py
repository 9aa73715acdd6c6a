"""Mixture-of-Experts layers: the steps from tokens to experts and back.

May import: routers, experts, routing, losses, kernels, utils.

Their `call` names the steps: group, route, dispatch, compute, combine, ungroup.
"""

from keras_moe.layers.hierarchical_moe_layer import HierarchicalMoeLayer
from keras_moe.layers.moe_layer import MoeLayer
from keras_moe.layers.moe_layer_with_backbone import MoeLayerWithBackbone
from keras_moe.layers.multi_gate_moe_layer import MultiGateMoeLayer
from keras_moe.layers.soft_moe_layer import SoftMoeLayer

__all__ = [
    "HierarchicalMoeLayer",
    "MoeLayer",
    "MoeLayerWithBackbone",
    "MultiGateMoeLayer",
    "SoftMoeLayer",
]
