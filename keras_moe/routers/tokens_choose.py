"""The base class of routers where tokens choose experts."""

from keras_moe import losses
from keras_moe.routers.router import Router
from keras_moe.routing.values import check_has_probs
from keras_moe.utils import checks

SCOPES = "group", "batch"


class TokensChooseRouter(Router):
    """A router where tokens choose experts and a loss balances the load. Abstract.

    A subclass implements `compute_routing`.

    Args:
        num_experts: int, the number of experts `e`.
        load_balancing_loss_weight: float, the weight of
            `keras_moe.losses.load_balancing_loss`, which is added in training and
            evaluation. Defaults to 0.01.
        balance_scope: string, the tokens over which the balance loss is computed:
            `"group"`, those of each group; `"batch"`, those of all groups, in training
            including those of other replicas and processes. Defaults to `"group"`.
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

    Example:

    ```python
    class BestTwo(keras_moe.TokensChooseRouter):
        experts_per_token = 2

        def compute_routing(self, probs, expert_capacity, training=None):
            selection = keras_moe.routing.top_k(probs, 2)
            return keras_moe.routing.assign_slots(selection, probs, expert_capacity)
    ```
    """

    def __init__(
        self,
        num_experts,
        *,
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
        super().__init__(
            num_experts,
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
        self.load_balancing_loss_weight = checks.number(
            "load_balancing_loss_weight", load_balancing_loss_weight
        )
        self.balance_scope = checks.one_of("balance_scope", balance_scope, SCOPES)

    def load_balancing_loss(self, routing):
        check_has_probs(routing)
        return losses.load_balancing_loss(
            routing.probs,
            routing.load,
            per_group=self.balance_scope == "group",
            across_replicas=self._is_training,
        )

    def get_config(self):
        return {
            **super().get_config(),
            "load_balancing_loss_weight": self.load_balancing_loss_weight,
            "balance_scope": self.balance_scope,
        }
