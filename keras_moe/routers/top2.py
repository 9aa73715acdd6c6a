"""Top-2 token-choice routing with a policy for second choices."""

import keras

from keras_moe.kernels import ops
from keras_moe.routers.tokens_choose import TokensChooseRouter
from keras_moe.routing.placement import assign_slots, selection_load
from keras_moe.routing.selection import Selection, top_k
from keras_moe.utils import checks

POLICIES = ("all", "none", "threshold", "random")


@keras.saving.register_keras_serializable(package="keras_moe")
class Top2MaskedRouter(TokensChooseRouter):
    """Routes each token to its best expert and, by a policy, to the second best.

    The two combine weights are divided by their sum. Then the policy may remove the
    second choice, which leaves the first weight below 1:

    - `"all"` keeps it;
    - `"none"` removes it;
    - `"threshold"` keeps it if its weight is above the threshold;
    - `"random"` keeps it with probability `weight / threshold`, at most 1.

    The balance loss counts first choices only.

    Args:
        num_experts: int, the number of experts `e`, at least 2.
        second_policy_train: string, the policy in training. Defaults to `"random"`.
        second_policy_eval: string, the policy in inference. Defaults to `"threshold"`.
        second_threshold_train: float, the threshold in training. Defaults to 0.2.
        second_threshold_eval: float, the threshold in inference. Defaults to 0.2.
        load_balancing_loss_weight: float, the weight of
            `keras_moe.losses.load_balancing_loss`, which is added in training and
            evaluation. Defaults to 0.01.
        balance_scope: string, the tokens over which the balance loss is computed:
            `"group"`, those of each group; `"batch"`, those of all groups, in training
            including those of other replicas and processes. Defaults to `"group"`.
        hidden_layers: int or list of ints, the sizes of ReLU layers in the gate.
            Defaults to `None`, no hidden layers.
        mechanism: string, `"softmax"` only.
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
        keras_moe.FeedForwardExperts(8, 64),
        keras_moe.Top2MaskedRouter(8),
        train_capacity_factor=2.0,
        eval_capacity_factor=None,
    )
    ```

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
        load_balancing_loss_weight=0.01,
        balance_scope="group",
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
        checks.whole_number("num_experts", num_experts, minimum=2)
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
        first, both = self.select(probs, training)
        load = selection_load(first, self.num_experts)
        return assign_slots(both, probs, expert_capacity, load=load)

    def select(self, probs, training, important=None):
        """Selects experts and applies the policy.

        Args:
            probs: float32 `[g, t, e]`, all zero for a masked token.
            training: bool.
            important: bool `[g, t]`, false for a token whose best expert counts as its
                second choice; `None` if there is no such token.

        Returns:
            A pair of `Selection`s: the first choices `[g, t, 1]`, and both `[g, t, 2]`.
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
            first = _keep(important, first)
        second = _keep(self._keeps_second(second.weight, training), second)
        both = (
            ops.concatenate(pair, axis=-1) for pair in zip(first, second, strict=True)
        )
        return first, Selection(*both)

    def _keeps_second(self, weight, training):
        """Returns bool, in the shape of the second choices' weights."""
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


def _keep(kept, selection):
    """Removes the choices for which `kept` is false."""
    return Selection(
        ops.where(kept, selection.expert_index, -1),
        ops.where(kept, selection.weight, 0.0),
    )
