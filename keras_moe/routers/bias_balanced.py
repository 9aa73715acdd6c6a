"""Tokens choose; a bias that moves with the load keeps the balance."""

import keras
from keras import ops

from keras_moe import checks
from keras_moe.placement import place
from keras_moe.routers.router import Router
from keras_moe.routing import expert_load
from keras_moe.selection import finite, normalized, top_k, within_best_groups


@keras.saving.register_keras_serializable(package="keras_moe")
class BiasBalancedMaskedRouter(Router):
    """Tokens choose, and are balanced without a loss.

    Each token goes to the `k` experts with the best score plus bias. A
    training step lowers the bias of each expert that was wanted more than the
    mean, and raises that of the others, by `bias_update_rate`. The bias acts
    on the choice alone: the weights are the scores, divided by their sum. With
    `k = 1` the weight is the score itself: divided by its sum it would be 1,
    whatever the gate says, and the gate would not learn.

    The bias is saved with the layer. It stands still outside training, and
    when the router is frozen.

    Args:
        num_experts: int, the number of experts `e`.
        num_selected_experts: int, the number `k` of experts of a token.
        routed_scaling_factor: float above 0, by which the weights are
            multiplied after they were divided by their sum.
        bias_update_rate: float, how far the bias moves in a step.
        num_expert_groups: int that divides `e`.
        num_selected_groups: int: a token chooses among the experts of so many
            groups, those with the best sum of their two best experts.
        mechanism: see `Gate`; `"sigmoid"` or `"softmax"`.
        **kwargs: see `Router`.

    Raises:
        ValueError: for arguments out of range or that do not go together.
        TypeError: for arguments of another type.

    Reference:
        [DeepSeek-AI, 2024](https://arxiv.org/abs/2412.19437), section 2.1.2,
        equations 12-16.
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
        mechanism="sigmoid",
        name="router",
        **kwargs,
    ):
        mechanism = checks.one_of("mechanism", mechanism, ("sigmoid", "softmax"))
        super().__init__(num_experts, mechanism=mechanism, name=name, **kwargs)
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
        in_groups = self.num_experts // self.num_expert_groups
        self.num_selected_experts = checks.whole_number(
            "num_selected_experts",
            num_selected_experts,
            maximum=self.num_selected_groups * in_groups,
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
        scores = finite(probs) + ops.convert_to_tensor(self.expert_bias)
        if self.num_selected_groups < self.num_expert_groups:
            scores = within_best_groups(
                scores, self.num_expert_groups, self.num_selected_groups
            )
        k = self.num_selected_experts
        selection = top_k(probs, k, normalize=k > 1, scores=scores)
        weight = self.routed_scaling_factor * selection.weight
        selection = selection._replace(weight=weight)
        return place(selection, normalized(probs), expert_capacity)

    def call(self, inputs, *, expert_capacity, mask=None, training=None):
        routing = super().call(
            inputs, expert_capacity=expert_capacity, mask=mask, training=training
        )
        if training and self.trainable and self.bias_update_rate:
            self._move_bias(routing)
        return routing

    def _move_bias(self, routing):
        load = expert_load(routing)
        # Not by what rounding leaves of a perfect balance.
        error = ops.mean(load) - load
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
