"""Routers: layers that decide which tokens go to which experts."""

from keras_moe.routers.bias_balanced import BiasBalancedMaskedRouter
from keras_moe.routers.experts_choose import ExpertsChooseMaskedRouter
from keras_moe.routers.masked import MaskedRouter, TokensChooseRouter
from keras_moe.routers.router import Router
from keras_moe.routers.top2 import Top2MaskedRouter

__all__ = [
    "BiasBalancedMaskedRouter",
    "ExpertsChooseMaskedRouter",
    "MaskedRouter",
    "Router",
    "TokensChooseRouter",
    "Top2MaskedRouter",
]
