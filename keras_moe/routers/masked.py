"""Tokens choose their experts."""

import keras

from keras_moe import checks, losses
from keras_moe.placement import PRIORITIES, place, wanted_load
from keras_moe.routers.router import Router
from keras_moe.routing import check_has_probs
from keras_moe.selection import next_best, normalized, top_k


class TokensChooseRouter(Router):
    """Abstract: tokens choose, so that the load needs balancing.

    Args:
        num_experts: int, the number of experts `e`.
        load_balancing_loss_weight: float, the weight of
            `keras_moe.losses.load_balancing_loss`, which is added in training
            and evaluation.
        **kwargs: see `Router`.
    """

    def __init__(self, num_experts, *, load_balancing_loss_weight=0.01, **kwargs):
        super().__init__(num_experts, **kwargs)
        self.load_balancing_loss_weight = checks.number(
            "load_balancing_loss_weight", load_balancing_loss_weight
        )

    def load_balancing_loss(self, routing):
        check_has_probs(routing)
        return losses.load_balancing_loss(routing.probs, routing.load)

    def get_config(self):
        return {
            **super().get_config(),
            "load_balancing_loss_weight": self.load_balancing_loss_weight,
        }


@keras.saving.register_keras_serializable(package="keras_moe")
class MaskedRouter(TokensChooseRouter):
    """Tokens choose: each goes to its `k` best experts.

    Who comes first where an expert is full is the `priority`; what happens to
    the others the `overflow`. At a fixed length, what happens to a token
    depends on no later token with `priority="token"`, and with `"choice"` if
    `k = 1`.

    Args:
        num_experts: int, the number of experts `e`.
        num_selected_experts: int, the number `k` of experts of a token. A
            capacity is not multiplied by it: for no drops at perfect balance
            the capacity factor must be at least `k`.
        normalize_weights: bool, whether the weights of a token's choices are
            divided by their sum.
        priority: `"choice"`, all first choices before all second choices;
            `"token"`, the earlier token with all its choices; `"probability"`,
            as `"choice"`, but the surer tokens before the earlier ones.
        overflow: `"drop"`, or `"next_best"`: a choice that finds its expert
            full goes to the token's next best expert with room; for
            `priority="token"`.
        load_balancing_loss_weight: float, the weight of
            `keras_moe.losses.load_balancing_loss`, which is added in training
            and evaluation.
        **kwargs: see `Router`.

    Raises:
        ValueError: for arguments out of range or that do not go together.
        TypeError: for arguments of another type.

    Reference:
        [Fedus et al., 2021](https://arxiv.org/abs/2101.03961) for `k = 1`;
        [Lepikhin et al., 2020](https://arxiv.org/abs/2006.16668) for `k = 2`;
        [Riquelme et al., 2021](https://arxiv.org/abs/2106.05974) for
        `"probability"`.
    """

    supports_dropless = True

    def __init__(
        self,
        num_experts,
        *,
        num_selected_experts=1,
        normalize_weights=False,
        priority="choice",
        overflow="drop",
        name="router",
        **kwargs,
    ):
        super().__init__(num_experts, name=name, **kwargs)
        self.num_selected_experts = checks.whole_number(
            "num_selected_experts", num_selected_experts, maximum=self.num_experts
        )
        self.normalize_weights = checks.boolean("normalize_weights", normalize_weights)
        self.priority = checks.one_of("priority", priority, PRIORITIES)
        self.overflow = checks.one_of("overflow", overflow, ("drop", "next_best"))
        if self.overflow == "next_best" and self.priority != "token":
            raise ValueError(
                '`overflow="next_best"` goes with `priority="token"`. '
                f"Received: priority={priority!r}."
            )
        if self.mechanism == "gumbel" and self.num_selected_experts != 1:
            raise ValueError(
                '`mechanism="gumbel"` chooses one expert for a token. '
                f"Received: num_selected_experts={num_selected_experts}."
            )

    @property
    def experts_per_token(self):
        return self.num_selected_experts

    def compute_routing(self, probs, expert_capacity, training=None):
        k, normalize = self.num_selected_experts, self.normalize_weights
        wanted = selection = top_k(probs, k, normalize)
        if self.overflow == "next_best" and expert_capacity is not None:
            selection = next_best(probs, k, expert_capacity, normalize)
        if self.mechanism == "sigmoid":
            probs = normalized(probs)
        routing = place(selection, probs, expert_capacity, self.priority)
        if selection is not wanted:
            routing = routing._replace(load=wanted_load(wanted, self.num_experts))
        return routing

    def get_config(self):
        return {
            **super().get_config(),
            "num_selected_experts": self.num_selected_experts,
            "normalize_weights": self.normalize_weights,
            "priority": self.priority,
            "overflow": self.overflow,
        }
