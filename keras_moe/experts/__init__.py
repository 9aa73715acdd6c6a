"""Experts: layers that process the tokens dispatched to each expert.

May import: kernels, utils.

Experts map `[g, e, c, h]` to the same shape and have an attribute `num_experts`; those
that also accept rows sorted by expert (`group_sizes`) work without a capacity.
"""

from keras_moe.experts.feed_forward import FeedForward
from keras_moe.experts.feed_forward_experts import FeedForwardExperts
from keras_moe.experts.heterogeneous import HeterogeneousExperts

__all__ = ["FeedForward", "FeedForwardExperts", "HeterogeneousExperts"]
