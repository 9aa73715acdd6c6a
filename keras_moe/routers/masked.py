"""Top-k token-choice routing."""

import keras

from keras_moe.kernels import ops
from keras_moe.losses import importance_loss
from keras_moe.routers.tokens_choose import TokensChooseRouter
from keras_moe.routing.placement import PRIORITIES, assign_slots, selection_load
from keras_moe.routing.selection import (
    next_best,
    nonfinite_to_zero,
    normalized,
    select_given,
    top_k,
    within_best_groups,
)
from keras_moe.routing.values import check_has_probs
from keras_moe.utils import checks


@keras.saving.register_keras_serializable(package="keras_moe")
class MaskedRouter(TokensChooseRouter):
    """Routes each token to its `k` best experts (top-k token choice).

    With a capacity, `priority` decides which tokens a full expert keeps, and `overflow`
    what happens to the others. For inputs of a fixed length, the routing of a token is
    causal (independent of later tokens) with `priority="token"`, and with
    `priority="choice"` if `k = 1`.

    Args:
        num_experts: int, the number of experts `e`.
        num_selected_experts: int, the number `k` of experts per token. The capacity is
            not multiplied by it: to drop nothing at a balanced load, the capacity
            factor must be at least `k`. Defaults to 1.
        normalize_weights: bool, whether to divide a token's combine weights by their
            sum. Defaults to `False`.
        normalization_epsilon: float, added to that sum. Defaults to 0.
        routed_scaling_factor: float above 0, by which the combine weights are
            multiplied. Defaults to 1.
        use_expert_scale: bool, whether to multiply the combine weights of each expert
            by a weight of its own, which is 1 at first. Defaults to `False`.
        num_expert_groups: int that divides `e`, the number of groups of consecutive
            experts. Defaults to 1.
        num_selected_groups: int, the number of groups that a token may use, those with
            the best scores. Defaults to 1.
        group_score_experts: int, the number of best experts of a group whose scores
            are summed to the score of the group. Defaults to 2.
        priority: string. `"choice"`, all first choices before all second choices;
            `"token"`, earlier tokens, with all their choices, before later ones;
            `"probability"`, as `"choice"`, with tokens in the order of their best
            probability; or `"random"`, as `"choice"`, in training with tokens in random
            order. Defaults to `"choice"`.
        overflow: string. `"drop"`, over-capacity assignments are dropped; or
            `"next_best"`, they go to the token's next best expert with room, which
            needs `priority="token"`. Defaults to `"drop"`.
        load_balancing_loss_weight: float, the weight of
            `keras_moe.losses.load_balancing_loss`, which is added in training and
            evaluation. Defaults to 0.01.
        balance_scope: string, the tokens over which the balance loss is computed:
            `"group"`, those of each group; `"batch"`, those of all groups, in training
            including those of other replicas and processes. Defaults to `"group"`.
        importance_loss_weight: float, the weight of `keras_moe.losses.importance_loss`,
            which is added in training and evaluation. Defaults to 0.
        load_loss_weight: float, the weight of `keras_moe.losses.load_loss`, which is
            added in training. It needs `noise_std`. Defaults to 0.
        hidden_layers: int or list of ints, the sizes of ReLU layers in the gate.
            Defaults to `None`, no hidden layers.
        mechanism: string, see `Gate`. Defaults to `"softmax"`.
        noise_std: float, the standard deviation of Gaussian noise added to the logits
            in training; or `"learned"`, see `Gate`. Defaults to 0.
        jitter_noise: float in [0, 1), the range of the noise by which the gate's inputs
            are multiplied in training. Defaults to 0.
        input_norm_epsilon: float; the gate's inputs are RMS-normalized with this
            epsilon, see `Gate`. Defaults to `None`, no normalization.
        use_bias: bool, whether the gate has a bias. Defaults to `True`.
        kernel_initializer: initializer of the gate's kernel. Defaults to `None`,
            `TruncatedNormal(stddev=0.02)`.
        bias_initializer: initializer of the gate's bias. Defaults to `"zeros"`.
        router_z_loss_weight: float, the weight of the z-loss, which is added in
            training and evaluation. Defaults to 0.
        export_metrics: `True`; `False`; or a tuple of metric names, see `Router`.
            Defaults to `True`.
        name: string. Defaults to `"router"`.
        **kwargs: forwarded to `keras.layers.Layer`.

    Call arguments:
        See `Router`.

    Raises:
        ValueError: if an argument is out of range or incompatible with another.
        TypeError: if an argument has another type.

    Example:

    ```python
    router = keras_moe.MaskedRouter(8, num_selected_experts=2, normalize_weights=True)
    layer = keras_moe.MoeLayer(
        keras_moe.FeedForwardExperts(8, 64),
        router,
        train_capacity_factor=None,
        eval_capacity_factor=None,
    )
    ```

    Reference:
        [Fedus et al., 2021](https://arxiv.org/abs/2101.03961) for `k = 1`;
        [Lepikhin et al., 2020](https://arxiv.org/abs/2006.16668) for `k = 2`;
        [Riquelme et al., 2021](https://arxiv.org/abs/2106.05974) for
        `priority="probability"`;
        [DeepSeek-AI, 2024](https://arxiv.org/abs/2405.04434), section 2.2.2, for groups
        of experts; [Shazeer et al., 2017](https://arxiv.org/abs/1701.06538), section 4,
        for the importance loss, appendix A for the load loss.
    """

    supports_dropless = True

    def __init__(
        self,
        num_experts,
        *,
        num_selected_experts=1,
        normalize_weights=False,
        normalization_epsilon=0.0,
        routed_scaling_factor=1.0,
        use_expert_scale=False,
        num_expert_groups=1,
        num_selected_groups=1,
        group_score_experts=2,
        priority="choice",
        overflow="drop",
        load_balancing_loss_weight=0.01,
        balance_scope="group",
        importance_loss_weight=0.0,
        load_loss_weight=0.0,
        hidden_layers=None,
        mechanism="softmax",
        noise_std=0.0,
        jitter_noise=0.0,
        input_norm_epsilon=None,
        use_bias=True,
        kernel_initializer=None,
        bias_initializer="zeros",
        router_z_loss_weight=0.0,
        export_metrics=True,
        name="router",
        **kwargs,
    ):
        super().__init__(
            num_experts,
            load_balancing_loss_weight=load_balancing_loss_weight,
            balance_scope=balance_scope,
            hidden_layers=hidden_layers,
            mechanism=mechanism,
            noise_std=noise_std,
            jitter_noise=jitter_noise,
            input_norm_epsilon=input_norm_epsilon,
            use_bias=use_bias,
            kernel_initializer=kernel_initializer,
            bias_initializer=bias_initializer,
            router_z_loss_weight=router_z_loss_weight,
            export_metrics=export_metrics,
            name=name,
            **kwargs,
        )
        self.importance_loss_weight = checks.number(
            "importance_loss_weight", importance_loss_weight
        )
        self.load_loss_weight = checks.number("load_loss_weight", load_loss_weight)
        self.num_expert_groups = checks.whole_number(
            "num_expert_groups", num_expert_groups
        )
        if self.num_experts % self.num_expert_groups:
            raise ValueError(
                "`num_expert_groups` must divide the number of experts, "
                f"{self.num_experts}. Received: num_expert_groups={num_expert_groups}."
            )
        self.num_selected_groups = checks.whole_number(
            "num_selected_groups", num_selected_groups, maximum=self.num_expert_groups
        )
        self.group_score_experts = checks.whole_number(
            "group_score_experts", group_score_experts
        )
        group_size = self.num_experts // self.num_expert_groups
        self.num_selected_experts = checks.whole_number(
            "num_selected_experts",
            num_selected_experts,
            maximum=self.num_selected_groups * group_size,
        )
        self.normalize_weights = checks.boolean("normalize_weights", normalize_weights)
        self.normalization_epsilon = checks.number(
            "normalization_epsilon", normalization_epsilon
        )
        self.routed_scaling_factor = checks.number(
            "routed_scaling_factor", routed_scaling_factor, above=True
        )
        self.use_expert_scale = checks.boolean("use_expert_scale", use_expert_scale)
        self.priority = checks.one_of("priority", priority, PRIORITIES)
        self.priority_seed_generator = None
        if self.priority == "random":
            self.priority_seed_generator = keras.random.SeedGenerator()
        self.overflow = checks.one_of("overflow", overflow, ("drop", "next_best"))
        if self.overflow == "next_best" and self.priority != "token":
            raise ValueError(
                '`overflow="next_best"` needs `priority="token"`. '
                f"Received: priority={priority!r}."
            )
        if self.mechanism == "gumbel" and self.num_selected_experts != 1:
            raise ValueError(
                '`mechanism="gumbel"` selects one expert per token. '
                f"Received: num_selected_experts={num_selected_experts}."
            )
        if self.load_loss_weight and not (
            self.noise_std and self.num_selected_experts < self.num_experts
        ):
            raise ValueError(
                "`load_loss_weight` needs `noise_std`, and `num_selected_experts` "
                f"below the number of experts. Received: noise_std={noise_std!r}, "
                f"num_selected_experts={num_selected_experts}."
            )

    @property
    def experts_per_token(self):
        return self.num_selected_experts

    @property
    def weights_sum_to_at_most_1(self):
        """Whether the combine weights of a token sum to 1 or less."""
        sums_to_1 = self.mechanism in ("softmax", "gumbel") or self.normalize_weights
        is_scaled = self.routed_scaling_factor > 1 or self.use_expert_scale
        return sums_to_1 and not is_scaled

    def build(self, input_shape):
        super().build(input_shape)
        if self.use_expert_scale:
            self.expert_scale = self.add_weight(
                name="expert_scale",
                shape=(self.num_experts,),
                initializer="ones",
                dtype="float32",
                autocast=False,
            )

    def compute_routing(self, probs, expert_capacity, training=None):
        k, scores = self.num_selected_experts, self._scores(probs)
        selection, load = top_k(probs, k, scores=scores), None
        if self.overflow == "next_best" and expert_capacity is not None:
            # The load is that of the best experts, before any is full.
            load = selection_load(selection, self.num_experts)
            selection = next_best(probs, k, expert_capacity, scores=scores)
        return self._assign(selection, probs, expert_capacity, training, load)

    def replay_routing(self, probs, expert_index, expert_capacity, training=None):
        selection = select_given(probs, expert_index)
        return self._assign(selection, probs, expert_capacity, training)

    def _assign(self, selection, probs, expert_capacity, training, load=None):
        """Returns the routing of a selection whose weights are probabilities."""
        selection = selection._replace(weight=self._combine_weights(selection))
        if self.mechanism in ("sigmoid", "sqrt_softplus"):
            probs = normalized(probs)
        priority = self.priority
        if priority == "random" and not training:
            priority = "choice"
        return assign_slots(
            selection,
            probs,
            expert_capacity,
            priority,
            load,
            seed=self.priority_seed_generator,
        )

    def _scores(self, probs):
        """Returns the scores by which experts are selected, `-inf` to exclude one."""
        scores = self._biased(nonfinite_to_zero(probs))
        if self.num_selected_groups == self.num_expert_groups:
            return scores
        return within_best_groups(
            scores,
            self.num_expert_groups,
            self.num_selected_groups,
            self.group_score_experts,
        )

    def _biased(self, scores):
        """Returns scores with what a subclass adds to them for the selection."""
        return scores

    def _combine_weights(self, selection):
        """Returns the combine weights of a selection of probabilities, `[g, t, k]`."""
        weight = selection.weight
        if self.normalize_weights:
            weight = normalized(weight, self.normalization_epsilon)
        if self.routed_scaling_factor != 1:
            weight = self.routed_scaling_factor * weight
        if self.use_expert_scale:
            scale = ops.convert_to_tensor(self.expert_scale)
            weight = weight * ops.take(scale, ops.maximum(selection.expert_index, 0))
        return weight

    def add_losses_and_metrics(self, routing, **kwargs):
        super().add_losses_and_metrics(routing, **kwargs)
        if self.importance_loss_weight:
            check_has_probs(routing)
            self._add_weighted_loss(
                importance_loss(routing.probs), self.importance_loss_weight
            )

    def get_config(self):
        return {
            **super().get_config(),
            "importance_loss_weight": self.importance_loss_weight,
            "load_loss_weight": self.load_loss_weight,
            "num_selected_experts": self.num_selected_experts,
            "normalize_weights": self.normalize_weights,
            "normalization_epsilon": self.normalization_epsilon,
            "routed_scaling_factor": self.routed_scaling_factor,
            "use_expert_scale": self.use_expert_scale,
            "num_expert_groups": self.num_expert_groups,
            "num_selected_groups": self.num_selected_groups,
            "group_score_experts": self.group_score_experts,
            "priority": self.priority,
            "overflow": self.overflow,
        }
