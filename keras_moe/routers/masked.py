"""Tokens choose their experts."""

import keras

from keras_moe import checks, losses
from keras_moe.placement import place
from keras_moe.routers.router import Router
from keras_moe.selection import top_k


@keras.saving.register_keras_serializable(package="keras_moe")
class MaskedRouter(Router):
    """Tokens choose: each goes to its `k` best experts.

    All first choices are given slots before any second choice, and earlier
    tokens before later ones; a choice that finds its expert full is dropped.
    With `k = 1` what happens to a token depends on no later token.

    Args:
        num_experts: int, the number of experts `e`.
        num_selected_experts: int, the number `k` of experts of a token. A
            capacity is not multiplied by it: for no drops at perfect balance
            the capacity factor must be at least `k`.
        normalize_weights: bool, whether the weights of a token's choices are
            divided by their sum.
        load_balancing_loss_weight: float, the weight of
            `keras_moe.losses.load_balancing_loss`, which is added in training
            and evaluation.
        **kwargs: see `Router`.

    Reference:
        [Fedus et al., 2021](https://arxiv.org/abs/2101.03961) for `k = 1`;
        [Lepikhin et al., 2020](https://arxiv.org/abs/2006.16668) for `k = 2`.
    """

    def __init__(
        self,
        num_experts,
        *,
        num_selected_experts=1,
        normalize_weights=False,
        load_balancing_loss_weight=0.01,
        name="router",
        **kwargs,
    ):
        super().__init__(num_experts, name=name, **kwargs)
        self.num_selected_experts = checks.whole_number(
            "num_selected_experts", num_selected_experts, maximum=self.num_experts
        )
        self.normalize_weights = checks.boolean("normalize_weights", normalize_weights)
        self.load_balancing_loss_weight = checks.number(
            "load_balancing_loss_weight", load_balancing_loss_weight
        )

    def compute_routing(self, probs, expert_capacity, training=None):
        selection = top_k(probs, self.num_selected_experts, self.normalize_weights)
        return place(selection, probs, expert_capacity)

    def load_balancing_loss(self, routing):
        return losses.load_balancing_loss(routing.probs, routing.load)

    def get_config(self):
        return {
            **super().get_config(),
            "num_selected_experts": self.num_selected_experts,
            "normalize_weights": self.normalize_weights,
            "load_balancing_loss_weight": self.load_balancing_loss_weight,
        }
