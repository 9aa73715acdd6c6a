"""Top-k token-choice routing, balanced by a bias instead of a loss."""

import functools

import keras
from keras import ops

from keras_moe.kernels import ForwardPasses
from keras_moe.kernels.state import OwnedVariable, add_to
from keras_moe.routers.masked import MaskedRouter
from keras_moe.routing.statistics import expert_load
from keras_moe.utils import checks

SCORES = ("sigmoid", "softmax", "sqrt_softplus")


@keras.saving.register_keras_serializable(package="keras_moe")
class BiasBalancedMaskedRouter(MaskedRouter):
    """A `MaskedRouter` that balances the load by a bias instead of a loss.

    Experts are selected by score plus bias. Each training step lowers the bias of the
    experts whose load is above the mean, and raises that of the others, by
    `bias_update_rate`; then the mean of the bias is subtracted. The bias affects the
    selection only, not the combine weights.

    The bias is saved with the layer. It is constant in inference, and while the router
    is frozen.

    Args:
        num_experts: int, the number of experts `e`.
        num_selected_experts: int, the number `k` of experts per token. Defaults to 1.
        bias_update_rate: float, the change of the bias in an update. Defaults to 0.001.
        bias_update_steps: int, the number of training batches whose loads are added up
            for an update, as `gradient_accumulation_steps` of an optimizer. Defaults to
            1.
        normalize_weights: bool, whether to divide a token's combine weights by their
            sum. Defaults to `None`, whether `k` is above 1: a single weight divided by
            itself has no gradient.
        normalization_epsilon: float, added to that sum. Defaults to 0.
        routed_scaling_factor: float above 0, by which the combine weights are
            multiplied. Defaults to 1.
        use_expert_scale: bool, see `MaskedRouter`. Defaults to `False`.
        num_expert_groups: int that divides `e`, the number of groups of consecutive
            experts. Defaults to 1.
        num_selected_groups: int, the number of groups that a token may use, those with
            the best scores. Defaults to 1.
        group_score_experts: int, the number of best experts of a group whose scores
            are summed to the score of the group. Defaults to 2.
        priority: string, see `MaskedRouter`. Defaults to `"choice"`.
        overflow: string, see `MaskedRouter`. Defaults to `"drop"`.
        load_balancing_loss_weight: float, the weight of
            `keras_moe.losses.load_balancing_loss`, which is added in training and
            evaluation. Defaults to 0.
        hidden_layers: int or list of ints, the sizes of ReLU layers in the gate.
            Defaults to `None`, no hidden layers.
        mechanism: string, `"sigmoid"`, `"softmax"` or `"sqrt_softplus"`, see `Gate`.
            Defaults to `"sigmoid"`.
        noise_std: float, the standard deviation of Gaussian noise added to the logits
            in training. Defaults to 0.
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
    router = keras_moe.BiasBalancedMaskedRouter(
        64, num_selected_experts=4, num_expert_groups=8, num_selected_groups=4
    )
    ```

    Reference:
        [DeepSeek-AI, 2024](https://arxiv.org/abs/2412.19437), section 2.1.2, equations
        12-16.
    """

    def __init__(
        self,
        num_experts,
        *,
        num_selected_experts=1,
        bias_update_rate=0.001,
        bias_update_steps=1,
        normalize_weights=None,
        normalization_epsilon=0.0,
        routed_scaling_factor=1.0,
        use_expert_scale=False,
        num_expert_groups=1,
        num_selected_groups=1,
        group_score_experts=2,
        priority="choice",
        overflow="drop",
        load_balancing_loss_weight=0.0,
        hidden_layers=None,
        mechanism="sigmoid",
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
        if normalize_weights is None:
            normalize_weights = num_selected_experts != 1
        super().__init__(
            num_experts,
            num_selected_experts=num_selected_experts,
            normalize_weights=normalize_weights,
            normalization_epsilon=normalization_epsilon,
            routed_scaling_factor=routed_scaling_factor,
            use_expert_scale=use_expert_scale,
            num_expert_groups=num_expert_groups,
            num_selected_groups=num_selected_groups,
            group_score_experts=group_score_experts,
            priority=priority,
            overflow=overflow,
            load_balancing_loss_weight=load_balancing_loss_weight,
            hidden_layers=hidden_layers,
            mechanism=checks.one_of("mechanism", mechanism, SCORES),
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
        self.bias_update_rate = checks.number("bias_update_rate", bias_update_rate)
        self.bias_update_steps = checks.whole_number(
            "bias_update_steps", bias_update_steps
        )
        self._passes = ForwardPasses()
        # The bias of a training step, which is constant in it.
        self._bias = None
        self._load_sums = None
        if self.bias_update_steps > 1:
            # The loads, and the number of batches.
            self._load_sums = _LoadSums(self, self.num_experts)

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

    def _biased(self, scores):
        bias = self.expert_bias if self._bias is None else self._bias
        return scores + ops.convert_to_tensor(bias)

    def call(self, inputs, *, expert_capacity, mask=None, training=None):
        call = functools.partial(
            super().call,
            inputs,
            expert_capacity=expert_capacity,
            mask=mask,
            training=training,
        )
        if not (training and self.trainable and self.bias_update_rate):
            return call()
        bias = ops.stop_gradient(ops.convert_to_tensor(self.expert_bias))
        is_second, self._bias = self._passes.next(bias)
        try:
            routing = call()
        finally:
            self._bias = None
        if not is_second:
            self._update_bias(routing)
        return routing

    def _update_bias(self, routing):
        load, is_due = expert_load(routing), True
        if self._load_sums is not None:
            load, is_due = self._load_sums.add(load, self.bias_update_steps)
        error = ops.mean(load) - load
        # At a perfect balance the error is a rounding error.
        error = ops.where(ops.abs(error) < 1e-3, 0.0, error)
        step = self.bias_update_rate * ops.sign(error)
        bias = ops.convert_to_tensor(self.expert_bias)
        # A constant shift changes no selection, and the mean does not drift.
        change = step - ops.mean(bias + step)
        add_to(self.expert_bias, ops.where(is_due, change, 0.0))

    @property
    def running_state(self):
        sums = [self._load_sums.variable] if self._load_sums else []
        return super().running_state + sums

    def get_config(self):
        return {
            **super().get_config(),
            "bias_update_rate": self.bias_update_rate,
            "bias_update_steps": self.bias_update_steps,
        }


class _LoadSums:
    """Loads of several batches. Not a Keras object, so it is not tracked as a weight.

    Args:
        owner: the router.
        num_experts: int.
    """

    def __init__(self, owner, num_experts):
        # The last element is the number of batches.
        self.variable = OwnedVariable(owner, "load_sums", (num_experts + 1,))

    def add(self, load, steps):
        """Adds a batch.

        Args:
            load: float32 `[e]`.
            steps: int, the number of batches to add up.

        Returns:
            A pair: the sums, float32 `[e]`, and bool, whether that many batches have
            been added. Then the sums begin again at 0.
        """
        old = ops.convert_to_tensor(self.variable)
        new = old + ops.concatenate([load, ops.ones((1,), dtype="float32")])
        is_due = new[-1] >= steps
        add_to(self.variable, ops.where(is_due, 0.0, new) - old)
        return new[:-1], is_due
