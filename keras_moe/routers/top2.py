"""Tokens choose two experts, the second one on conditions."""

import keras
from keras import ops

from keras_moe import checks
from keras_moe.placement import place, wanted_load
from keras_moe.routers.masked import TokensChooseRouter
from keras_moe.selection import Selection, top_k

POLICIES = ("all", "none", "threshold", "random")


@keras.saving.register_keras_serializable(package="keras_moe")
class Top2MaskedRouter(TokensChooseRouter):
    """Tokens choose the best expert, and the second best if a policy agrees.

    The two weights are divided by their sum; after that a policy may take the
    second choice away, which leaves the first weight as it is, below 1:

    - `"all"`: it stays;
    - `"none"`: it goes;
    - `"threshold"`: it stays where its weight is above the threshold;
    - `"random"`: it stays with probability `weight / threshold`, at most 1.

    The balance loss counts first choices only.

    Args:
        num_experts: int, the number of experts `e`, at least 2.
        second_policy_train: string, the policy in training.
        second_policy_eval: string, the policy otherwise.
        second_threshold_train: float, the threshold in training.
        second_threshold_eval: float, the threshold otherwise.
        **kwargs: see `MaskedRouter`'s `load_balancing_loss_weight` and `Router`.

    Raises:
        ValueError: for arguments out of range.
        TypeError: for arguments of another type.

    Reference:
        [Lepikhin et al., 2020](https://arxiv.org/abs/2006.16668), algorithm 1.
    """

    supports_dropless = True
    experts_per_token = 2

    def __init__(
        self,
        num_experts,
        *,
        second_policy_train="random",
        second_policy_eval="threshold",
        second_threshold_train=0.2,
        second_threshold_eval=0.2,
        name="router",
        **kwargs,
    ):
        checks.whole_number("num_experts", num_experts, minimum=2)
        super().__init__(num_experts, name=name, **kwargs)
        if self.mechanism != "softmax":
            raise ValueError(
                '`mechanism` must be "softmax". '
                f"Received: mechanism={self.mechanism!r}."
            )
        self.second_policy_train = checks.one_of(
            "second_policy_train", second_policy_train, POLICIES
        )
        self.second_policy_eval = checks.one_of(
            "second_policy_eval", second_policy_eval, POLICIES
        )
        self.second_threshold_train = checks.number(
            "second_threshold_train", second_threshold_train
        )
        self.second_threshold_eval = checks.number(
            "second_threshold_eval", second_threshold_eval
        )
        if "random" in (second_policy_train, second_policy_eval):
            self.policy_seed_generator = keras.random.SeedGenerator()

    def compute_routing(self, probs, expert_capacity, training=None):
        first, both = self.choose(probs, training)
        routing = place(both, probs, expert_capacity)
        return routing._replace(load=wanted_load(first, self.num_experts))

    def choose(self, probs, training, important=None):
        """The first choices, and both, after the policy.

        Args:
            probs: float32 `[g, t, e]`, all zero for a masked token.
            training: bool.
            important: bool `[g, t]`, false for a token whose best expert counts
                as its second choice; `None` if there is none.

        Returns:
            A pair of `Selection`s, `[g, t, 1]` and `[g, t, 2]`.
        """
        index, weight = top_k(probs, 2, normalize=True)
        first, second = (
            Selection(index[..., i : i + 1], weight[..., i : i + 1]) for i in (0, 1)
        )
        if important is not None:
            important = ops.expand_dims(important, -1)
            demoted = ops.cast(first.expert_index >= 0, "float32")
            second = Selection(
                ops.where(important, second.expert_index, first.expert_index),
                ops.where(important, second.weight, demoted),
            )
            first = _only(important, first)
        second = _only(self._keeps_second(second.weight, training), second)
        both = (
            ops.concatenate(pair, axis=-1) for pair in zip(first, second, strict=True)
        )
        return first, Selection(*both)

    def _keeps_second(self, weight, training):
        """bool, of the shape of the second choices' weights."""
        policy = self.second_policy_train if training else self.second_policy_eval
        threshold = (
            self.second_threshold_train if training else self.second_threshold_eval
        )
        if policy == "threshold":
            return weight > threshold
        if policy == "random":
            uniform = keras.random.uniform(
                ops.shape(weight), dtype="float32", seed=self.policy_seed_generator
            )
            return uniform < weight / max(threshold, keras.config.epsilon())
        return ops.full_like(weight, policy == "all", dtype="bool")

    def get_config(self):
        return {
            **super().get_config(),
            "second_policy_train": self.second_policy_train,
            "second_policy_eval": self.second_policy_eval,
            "second_threshold_train": self.second_threshold_train,
            "second_threshold_eval": self.second_threshold_eval,
        }


def _only(kept, selection):
    """The choices for which `kept` is true."""
    return Selection(
        ops.where(kept, selection.expert_index, -1),
        ops.where(kept, selection.weight, 0.0),
    )
