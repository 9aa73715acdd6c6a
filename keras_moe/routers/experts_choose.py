"""Experts choose their tokens."""

import keras

from keras_moe.placement import experts_choose
from keras_moe.routers.router import Router
from keras_moe.selection import normalized


@keras.saving.register_keras_serializable(package="keras_moe")
class ExpertsChooseMaskedRouter(Router):
    """Experts choose: each takes the `c` tokens of the group it likes best.

    A token may be taken by several experts, or by none, and then gets 0. The
    load is balanced by itself: there is no balance loss, and its metric is 0.

    Not for decoders: whether a token is taken depends on later tokens.

    Args:
        num_experts: int, the number of experts `e`.
        **kwargs: see `Router`.

    Reference:
        [Zhou et al., 2022](https://arxiv.org/abs/2202.09368).
    """

    def __init__(self, num_experts, *, name="router", **kwargs):
        super().__init__(num_experts, name=name, **kwargs)
        if self.mechanism == "gumbel":
            raise ValueError(
                '`mechanism="gumbel"` chooses one expert for a token; here experts '
                f"choose. Received: mechanism={self.mechanism!r}."
            )

    def compute_routing(self, probs, expert_capacity, training=None):
        routing = experts_choose(probs, expert_capacity)
        if self.mechanism == "sigmoid":
            routing = routing._replace(probs=normalized(probs))
        return routing
