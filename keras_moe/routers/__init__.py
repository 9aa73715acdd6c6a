"""Routers: layers that decide which tokens go to which experts."""

from keras_moe.routers.experts_choose import ExpertsChooseMaskedRouter
from keras_moe.routers.masked import MaskedRouter
from keras_moe.routers.router import Router

__all__ = ["ExpertsChooseMaskedRouter", "MaskedRouter", "Router"]
