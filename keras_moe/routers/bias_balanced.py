"""Top-k token-choice routing, balanced by a bias instead of a loss."""

import functools

import keras

from keras_moe.kernels import ForwardPasses, ops, sum_over_replicas
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
        bias_update_rate: float, the change of the bias in an update. The attribute can
            be set while training, as by `BiasUpdateRateScheduler`. Defaults to 0.001.
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
        balance_scope: string, the tokens over which the balance loss is computed:
            `"group"`, those of each group; `"batch"`, those of all groups, in training
            including those of other replicas and processes. Defaults to `"group"`.
        importance_loss_weight: float, see `MaskedRouter`. Defaults to 0.
        load_loss_weight: float, see `MaskedRouter`; the bias does not count. Defaults
            to 0.
        hidden_layers: int or list of ints, the sizes of ReLU layers in the gate.
            Defaults to `None`, no hidden layers.
        mechanism: string, `"sigmoid"`, `"softmax"` or `"sqrt_softplus"`, see `Gate`.
            Defaults to `"sigmoid"`.
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
    router = keras_moe.BiasBalancedMaskedRouter(
        64, num_selected_experts=4, num_expert_groups=8, num_selected_groups=4
    )
    ```

    Reference:
        [DeepSeek-AI, 2024](https://arxiv.org/abs/2412.19437), section 2.1.2, equations
        12-16, and 17-20 for a balance loss of each sequence.
    """

    # Set before `__init__`, where Keras may read `variables`.
    _updates = None

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
        balance_scope="group",
        importance_loss_weight=0.0,
        load_loss_weight=0.0,
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
            balance_scope=balance_scope,
            importance_loss_weight=importance_loss_weight,
            load_loss_weight=load_loss_weight,
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
        bias_update_rate = checks.number("bias_update_rate", bias_update_rate)
        self.bias_update_steps = checks.whole_number(
            "bias_update_steps", bias_update_steps
        )
        self._updates = _BiasUpdates(self, bias_update_rate)
        self._passes = ForwardPasses()
        # The bias of a training step, which is constant in it.
        self._bias = None

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

    def call(
        self, inputs, *, expert_capacity, mask=None, training=None, expert_index=None
    ):
        call = functools.partial(
            super().call,
            inputs,
            expert_capacity=expert_capacity,
            mask=mask,
            training=training,
            expert_index=expert_index,
        )
        if not (training and self.trainable):
            return call()
        bias = ops.stop_gradient(ops.convert_to_tensor(self.expert_bias))
        is_second, self._bias = self._passes.next(bias)
        try:
            routing = call()
        finally:
            self._bias = None
        if not is_second:
            load = sum_over_replicas(expert_load(routing))
            self._updates.add(self.expert_bias, load)
        return routing

    @property
    def bias_update_rate(self):
        return self._updates.rate

    @bias_update_rate.setter
    def bias_update_rate(self, value):
        self._updates.set_rate(checks.number("bias_update_rate", value))

    @property
    def running_state(self):
        updates = self._updates
        return super().running_state + (updates.variables if updates else [])

    def get_config(self):
        return {
            **super().get_config(),
            "bias_update_rate": self.bias_update_rate,
            "bias_update_steps": self.bias_update_steps,
        }


class _BiasUpdates:
    """Updates of a bias, and their state. Not a Keras object, so it adds no weights.

    Args:
        router: `BiasBalancedMaskedRouter`.
        rate: float.
    """

    def __init__(self, router, rate):
        self.rate = rate
        self._steps = router.bias_update_steps
        self._rate = OwnedVariable(
            router, "bias_update_rate", (), rate, per_replica=False
        )
        self.variables = [self._rate]
        if self._steps > 1:
            # The loads of several batches, and the number of these.
            self._sums = OwnedVariable(router, "load_sums", (router.num_experts + 1,))
            self.variables.append(self._sums)

    def set_rate(self, rate):
        """Sets the rate, also of steps that are compiled already."""
        self.rate = rate
        self._rate.assign(rate)

    def add(self, bias, load):
        """Adds a batch, and updates the bias if an update is due.

        Args:
            bias: variable `[e]`.
            load: float32 `[e]`.
        """
        rate, is_due = ops.convert_to_tensor(self._rate), True
        if self._steps > 1:
            load, is_due = self._summed(load)
        error = ops.mean(load) - load
        # At a perfect balance the error is a rounding error.
        error = ops.where(ops.abs(error) < 1e-3, 0.0, error)
        step = rate * ops.sign(error)
        # A constant shift changes no selection, and the mean does not drift.
        change = step - ops.mean(ops.convert_to_tensor(bias) + step)
        add_to(bias, ops.where(ops.logical_and(is_due, rate > 0), change, 0.0))

    def _summed(self, load):
        """Returns the sums with a batch, and whether they are those of an update.

        After these, they begin again at 0.
        """
        old = ops.convert_to_tensor(self._sums)
        new = old + ops.concatenate([load, ops.ones((1,), dtype="float32")])
        is_due = new[-1] >= self._steps
        add_to(self._sums, ops.where(is_due, 0.0, new) - old)
        return new[:-1], is_due
