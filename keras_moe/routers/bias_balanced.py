"""Token-choice routing, balanced by a bias instead of a loss."""

import keras
from keras import ops

from keras_moe.routers.router import Router
from keras_moe.routing.placement import assign_slots
from keras_moe.routing.selection import (
    nonfinite_to_zero,
    normalized,
    top_k,
    within_best_groups,
)
from keras_moe.routing.statistics import expert_load
from keras_moe.utils import checks


@keras.saving.register_keras_serializable(package="keras_moe")
class BiasBalancedMaskedRouter(Router):
    """Routes each token to `k` experts, and balances the load by a bias.

    Experts are selected by score plus bias. Each training step lowers the bias of the
    experts whose load is above the mean, and raises that of the others, by
    `bias_update_rate`. The bias affects the selection only: the combine weights are the
    scores, divided by their sum. With `k = 1` the combine weight is the score itself,
    since a weight divided by itself has no gradient.

    The bias is saved with the layer. It is constant in inference, and while the router
    is frozen.

    Args:
        num_experts: int, the number of experts `e`.
        num_selected_experts: int, the number `k` of experts per token. Defaults to 1.
        routed_scaling_factor: float above 0, by which the combine weights are
            multiplied. Defaults to 1.
        bias_update_rate: float, the change of the bias in a training step. Defaults to
            0.001.
        num_expert_groups: int that divides `e`, the number of groups of experts.
            Defaults to 1.
        num_selected_groups: int, the number of groups that a token may use, those with
            the best sum of their two best experts. Defaults to 1.
        hidden_layers: int or list of ints, the sizes of ReLU layers in the gate.
            Defaults to `None`, no hidden layers.
        mechanism: string, `"sigmoid"` or `"softmax"`, see `Gate`. Defaults to
            `"sigmoid"`.
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
    router = keras_moe.BiasBalancedMaskedRouter(
        64, num_selected_experts=4, num_expert_groups=8, num_selected_groups=4
    )
    ```

    Reference:
        [DeepSeek-AI, 2024](https://arxiv.org/abs/2412.19437), section 2.1.2, equations
        12-16.
    """

    supports_dropless = True

    def __init__(
        self,
        num_experts,
        *,
        num_selected_experts=1,
        routed_scaling_factor=1.0,
        bias_update_rate=0.001,
        num_expert_groups=1,
        num_selected_groups=1,
        hidden_layers=None,
        mechanism="sigmoid",
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
        mechanism = checks.one_of("mechanism", mechanism, ("sigmoid", "softmax"))
        super().__init__(
            num_experts,
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
        group_size = self.num_experts // self.num_expert_groups
        self.num_selected_experts = checks.whole_number(
            "num_selected_experts",
            num_selected_experts,
            maximum=self.num_selected_groups * group_size,
        )
        self.routed_scaling_factor = checks.number(
            "routed_scaling_factor", routed_scaling_factor, above=True
        )
        self.bias_update_rate = checks.number("bias_update_rate", bias_update_rate)

    @property
    def experts_per_token(self):
        return self.num_selected_experts

    def build(self, input_shape):
        super().build(input_shape)
        self.expert_bias = self.add_weight(
            name="expert_bias",
            shape=(self.num_experts,),
            initializer="zeros",
            trainable=False,
            dtype="float32",
            autocast=False,
        )

    def compute_routing(self, probs, expert_capacity, training=None):
        scores = nonfinite_to_zero(probs) + ops.convert_to_tensor(self.expert_bias)
        if self.num_selected_groups < self.num_expert_groups:
            scores = within_best_groups(
                scores, self.num_expert_groups, self.num_selected_groups
            )
        k = self.num_selected_experts
        selection = top_k(probs, k, normalize=k > 1, scores=scores)
        weight = self.routed_scaling_factor * selection.weight
        selection = selection._replace(weight=weight)
        return assign_slots(selection, normalized(probs), expert_capacity)

    def call(self, inputs, *, expert_capacity, mask=None, training=None):
        routing = super().call(
            inputs, expert_capacity=expert_capacity, mask=mask, training=training
        )
        if training and self.trainable and self.bias_update_rate:
            self._update_bias(routing)
        return routing

    def _update_bias(self, routing):
        load = expert_load(routing)
        error = ops.mean(load) - load
        # At a perfect balance the error is a rounding error.
        error = ops.where(ops.abs(error) < 1e-3, 0.0, error)
        step = self.bias_update_rate * ops.sign(error)
        self.expert_bias.assign_add(ops.stop_gradient(step))

    def get_config(self):
        return {
            **super().get_config(),
            "num_selected_experts": self.num_selected_experts,
            "routed_scaling_factor": self.routed_scaling_factor,
            "bias_update_rate": self.bias_update_rate,
            "num_expert_groups": self.num_expert_groups,
            "num_selected_groups": self.num_selected_groups,
        }
