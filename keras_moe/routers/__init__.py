"""Routers: layers that turn tokens into a routing, and add its losses and metrics.

May import: routing, metrics, losses, kernels, utils.

A `Router` owns a `Gate`, which computes router probabilities. A subclass turns these
into a routing in `compute_routing`.
"""

from keras_moe.routers.bias_balanced import BiasBalancedMaskedRouter
from keras_moe.routers.experts_choose import ExpertsChooseMaskedRouter
from keras_moe.routers.gate import Gate
from keras_moe.routers.masked import MaskedRouter
from keras_moe.routers.round_robin import RoundRobinRouter
from keras_moe.routers.router import Router
from keras_moe.routers.sparse_mixer import SparseMixerRouter
from keras_moe.routers.tokens_choose import TokensChooseRouter
from keras_moe.routers.top2 import Top2MaskedRouter
from keras_moe.routers.top_p import TopPMaskedRouter

__all__ = [
    "BiasBalancedMaskedRouter",
    "ExpertsChooseMaskedRouter",
    "Gate",
    "MaskedRouter",
    "RoundRobinRouter",
    "Router",
    "SparseMixerRouter",
    "TokensChooseRouter",
    "Top2MaskedRouter",
    "TopPMaskedRouter",
]
