"""Top-k token-choice routing."""

import keras

from keras_moe.routers.tokens_choose import TokensChooseRouter
from keras_moe.routing.placement import PRIORITIES, assign_slots, selection_load
from keras_moe.routing.selection import next_best, normalized, top_k
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
        priority: string. `"choice"`, all first choices before all second choices;
            `"token"`, earlier tokens, with all their choices, before later ones; or
            `"probability"`, as `"choice"`, with tokens in the order of their best
            probability. Defaults to `"choice"`.
        overflow: string. `"drop"`, over-capacity assignments are dropped; or
            `"next_best"`, they go to the token's next best expert with room, which
            needs `priority="token"`. Defaults to `"drop"`.
        load_balancing_loss_weight: float, the weight of
            `keras_moe.losses.load_balancing_loss`, which is added in training and
            evaluation. Defaults to 0.01.
        hidden_layers: int or list of ints, the sizes of ReLU layers in the gate.
            Defaults to `None`, no hidden layers.
        mechanism: string, see `Gate`. Defaults to `"softmax"`.
        noise_std: float, the standard deviation of Gaussian noise added to the logits
            in training. Defaults to 0.
        jitter_noise: float in [0, 1), the range of the noise by which the gate's inputs
            are multiplied in training. Defaults to 0.
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
        `priority="probability"`.
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
        load_balancing_loss_weight=0.01,
        hidden_layers=None,
        mechanism="softmax",
        noise_std=0.0,
        jitter_noise=0.0,
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
            hidden_layers=hidden_layers,
            mechanism=mechanism,
            noise_std=noise_std,
            jitter_noise=jitter_noise,
            use_bias=use_bias,
            kernel_initializer=kernel_initializer,
            bias_initializer=bias_initializer,
            router_z_loss_weight=router_z_loss_weight,
            export_metrics=export_metrics,
            name=name,
            **kwargs,
        )
        self.num_selected_experts = checks.whole_number(
            "num_selected_experts", num_selected_experts, maximum=self.num_experts
        )
        self.normalize_weights = checks.boolean("normalize_weights", normalize_weights)
        self.priority = checks.one_of("priority", priority, PRIORITIES)
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

    @property
    def experts_per_token(self):
        return self.num_selected_experts

    def compute_routing(self, probs, expert_capacity, training=None):
        k, normalize = self.num_selected_experts, self.normalize_weights
        selection, load = top_k(probs, k, normalize), None
        if self.overflow == "next_best" and expert_capacity is not None:
            # The load is that of the best experts, before any is full.
            load = selection_load(selection, self.num_experts)
            selection = next_best(probs, k, expert_capacity, normalize)
        if self.mechanism == "sigmoid":
            probs = normalized(probs)
        return assign_slots(selection, probs, expert_capacity, self.priority, load)

    def get_config(self):
        return {
            **super().get_config(),
            "num_selected_experts": self.num_selected_experts,
            "normalize_weights": self.normalize_weights,
            "priority": self.priority,
            "overflow": self.overflow,
        }
