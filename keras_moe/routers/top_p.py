"""Token-choice routing with a variable number of experts per token."""

import keras

from keras_moe import losses
from keras_moe.kernels import ops
from keras_moe.routers.router import Router
from keras_moe.routers.tokens_choose import TokensChooseRouter
from keras_moe.routing.placement import assign_slots
from keras_moe.routing.selection import (
    Selection,
    normalized,
    select_given,
    top_k,
)
from keras_moe.routing.statistics import num_selected
from keras_moe.utils import checks


@keras.saving.register_keras_serializable(package="keras_moe")
class TopPMaskedRouter(TokensChooseRouter):
    """Each token selects the fewest experts that reach a total probability.

    Experts are selected in the order of their probabilities until these sum to
    `threshold` or more. So a token for which the router is certain has one expert, and
    others have several. The combine weights are the probabilities.

    Its further metric `experts_per_token` is the mean number of experts that a token
    selects, before any is dropped. A gate reaches a lower loss with more experts, so
    without `entropy_loss_weight` this number tends to increase.

    Args:
        num_experts: int, the number of experts `e`.
        threshold: float above 0 and below 1, the probability to reach. Defaults to 0.4.
        max_selected_experts: int, the largest number `k` of experts per token. Defaults
            to `None`, all.
        normalize_weights: bool, whether to divide a token's combine weights by their
            sum. Defaults to `False`.
        entropy_loss_weight: float, the weight of
            `keras_moe.losses.router_entropy_loss`, which is added in training and
            evaluation. Defaults to 0.
        load_balancing_loss_weight: float, the weight of
            `keras_moe.losses.load_balancing_loss`, which is added in training and
            evaluation. Defaults to 0.01.
        balance_scope: string, the tokens over which the balance loss is computed:
            `"group"`, those of each group; `"batch"`, those of all groups, in training
            including those of other replicas and processes. Defaults to `"group"`.
        hidden_layers: int or list of ints, the sizes of ReLU layers in the gate.
            Defaults to `None`, no hidden layers.
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
        ValueError: if an argument is out of range.
        TypeError: if an argument has another type.

    Example:

    ```python
    layer = keras_moe.MoeLayer(
        keras_moe.FeedForwardExperts(16, 64),
        keras_moe.TopPMaskedRouter(16, threshold=0.4, max_selected_experts=8),
        train_capacity_factor=None,
        eval_capacity_factor=None,
    )
    ```

    Reference:
        [Huang et al., 2024](https://arxiv.org/abs/2403.07652), section 3.
    """

    metric_names = (*Router.metric_names, "experts_per_token")
    min_experts_per_token = 1
    supports_dropless = True

    def __init__(
        self,
        num_experts,
        *,
        threshold=0.4,
        max_selected_experts=None,
        normalize_weights=False,
        entropy_loss_weight=0.0,
        load_balancing_loss_weight=0.01,
        balance_scope="group",
        hidden_layers=None,
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
        self.threshold = checks.number("threshold", threshold, above=True, below=1)
        self.max_selected_experts = None
        if max_selected_experts is not None:
            self.max_selected_experts = checks.whole_number(
                "max_selected_experts", max_selected_experts, maximum=self.num_experts
            )
        self.normalize_weights = checks.boolean("normalize_weights", normalize_weights)
        self.entropy_loss_weight = checks.number(
            "entropy_loss_weight", entropy_loss_weight
        )

    @property
    def experts_per_token(self):
        return self.max_selected_experts or self.num_experts

    def compute_routing(self, probs, expert_capacity, training=None):
        index, weight = top_k(probs, self.experts_per_token)
        # The total of the better experts; 0 for the best.
        total = ops.cumsum(ops.stop_gradient(weight), axis=-1) - weight
        # All choices of a NaN token, whose output is then NaN, too.
        is_needed = ops.logical_not(total >= self.threshold)
        selection = Selection(
            ops.where(is_needed, index, -1), ops.where(is_needed, weight, 0.0)
        )
        return self._assign(selection, probs, expert_capacity)

    def replay_routing(self, probs, expert_index, expert_capacity, training=None):
        return self._assign(select_given(probs, expert_index), probs, expert_capacity)

    def _assign(self, selection, probs, expert_capacity):
        if self.normalize_weights:
            selection = selection._replace(weight=normalized(selection.weight))
        return assign_slots(selection, probs, expert_capacity)

    def add_losses_and_metrics(self, routing, *, valid, **kwargs):
        super().add_losses_and_metrics(routing, valid=valid, **kwargs)
        if self.entropy_loss_weight:
            entropy = losses.router_entropy_loss(routing.probs)
            self._add_weighted_loss(entropy, self.entropy_loss_weight)
        self.add_metrics(
            {"experts_per_token": num_selected(routing) / ops.maximum(valid, 1.0)},
            weight=ops.cast(valid > 0, "float32"),
        )

    def get_config(self):
        config = super().get_config()
        del config["mechanism"]
        return {
            **config,
            "threshold": self.threshold,
            "max_selected_experts": self.max_selected_experts,
            "normalize_weights": self.normalize_weights,
            "entropy_loss_weight": self.entropy_loss_weight,
        }
