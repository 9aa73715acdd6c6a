"""Token-choice routing with the weights of SparseMixer."""

import keras

from keras_moe.kernels import ops
from keras_moe.routers.tokens_choose import TokensChooseRouter
from keras_moe.routing.placement import assign_slots
from keras_moe.routing.selection import (
    EXCLUDED_SCORE,
    Selection,
    nonfinite_to_zero,
    valid_tokens,
)
from keras_moe.utils import checks


@keras.saving.register_keras_serializable(package="keras_moe")
class SparseMixerRouter(TokensChooseRouter):
    """Routes each token to `k` experts, each chosen among those of similar logits.

    An expert is compared with the others that are not chosen yet. Its combine weight is
    its share of a softmax over those whose logit is close to the largest, `m`:
    `m - logit <= sparsity_threshold * max(abs(logit), m)`. In inference the expert with
    the largest logit is chosen. In training one is sampled from the softmax, and the
    gradient of the weight is an estimate of that of all experts.

    Args:
        num_experts: int, the number of experts `e`.
        num_selected_experts: int, the number `k` of experts per token. Defaults to 2.
        sparsity_threshold: float, the relative distance to the largest logit. Defaults
            to 0.02.
        load_balancing_loss_weight: float, the weight of
            `keras_moe.losses.load_balancing_loss`, which is added in training and
            evaluation. Defaults to 0.01.
        balance_scope: string, the tokens over which the balance loss is computed:
            `"group"`, those of each group; `"batch"`, those of all groups, in training
            including those of other replicas and processes. Defaults to `"group"`.
        hidden_layers: int or list of ints, the sizes of ReLU layers in the gate.
            Defaults to `None`, no hidden layers.
        noise_std: float, the standard deviation of Gaussian noise added to the logits
            in training, for the balance loss; or `"learned"`, see `Gate`. Defaults to
            0.
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
        keras_moe.FeedForwardExperts(16, 64, activation="silu", gated=True),
        keras_moe.SparseMixerRouter(16),
        train_capacity_factor=None,
        eval_capacity_factor=None,
    )
    ```

    Reference:
        [Liu et al., 2024](https://arxiv.org/abs/2409.12136), section 2.
    """

    supports_dropless = True

    def __init__(
        self,
        num_experts,
        *,
        num_selected_experts=2,
        sparsity_threshold=0.02,
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
        self.num_selected_experts = checks.whole_number(
            "num_selected_experts", num_selected_experts, maximum=self.num_experts
        )
        self.sparsity_threshold = checks.number(
            "sparsity_threshold", sparsity_threshold
        )
        self.sample_seed_generator = keras.random.SeedGenerator()

    @property
    def experts_per_token(self):
        return self.num_selected_experts

    def routing_of_logits(self, logits, probs, expert_capacity, training):
        valid = ops.expand_dims(valid_tokens(probs), -1)
        logits = nonfinite_to_zero(logits)
        is_open = ops.ones_like(logits, dtype="bool")
        choices, weights = [], []
        for _ in range(self.num_selected_experts):
            choice, weight = self._choose(logits, is_open, training)
            is_chosen = ops.one_hot(choice, self.num_experts, dtype="bool")
            is_open = ops.logical_and(is_open, ops.logical_not(is_chosen))
            choices.append(choice)
            weights.append(weight)
        index = ops.where(valid, ops.stack(choices, axis=-1), -1)
        weight = ops.where(valid, ops.stack(weights, axis=-1), 0.0)
        return assign_slots(Selection(index, weight), probs, expert_capacity)

    def _choose(self, logits, is_open, training):
        """Returns the next expert of each token and its weight, both `[g, t]`."""
        constant = ops.stop_gradient(logits)
        scores = ops.where(is_open, constant, EXCLUDED_SCORE)
        largest = ops.max(scores, axis=-1, keepdims=True)
        factor = ops.maximum(ops.abs(constant), largest)
        is_close = largest - scores <= self.sparsity_threshold * factor
        scores = ops.where(is_close, scores, EXCLUDED_SCORE)
        best = ops.cast(ops.argmax(scores, axis=-1), "int32")
        choice = self._sample(scores) if training else best
        # A number far below all logits, not infinity, whose gradient is NaN.
        masked = ops.where(is_close, logits, -1e30)
        chosen = ops.one_hot(choice, self.num_experts, dtype="bool")
        probs = ops.softmax(masked, axis=-1)
        weight = ops.sum(ops.where(chosen, probs, 0.0), axis=-1)
        if not training:
            return choice, weight
        # The value of Heun's third-order method, the gradient of the softmax.
        uniform = keras.random.uniform(
            ops.shape(weight), dtype="float32", seed=self.sample_seed_generator
        )
        is_whole = ops.logical_or(choice == best, uniform > 0.75)
        value = weight * ops.where(is_whole, 1.0, 1 / 3)
        return choice, weight + ops.stop_gradient(value - weight)

    def _sample(self, scores):
        """Samples experts with the probabilities of a softmax (Gumbel-max)."""
        uniform = keras.random.uniform(
            ops.shape(scores),
            minval=1e-20,
            dtype="float32",
            seed=self.sample_seed_generator,
        )
        gumbel = -ops.log(-ops.log(uniform))
        return ops.cast(ops.argmax(scores + gumbel, axis=-1), "int32")

    def get_config(self):
        config = super().get_config()
        del config["mechanism"]
        return {
            **config,
            "num_selected_experts": self.num_selected_experts,
            "sparsity_threshold": self.sparsity_threshold,
        }
