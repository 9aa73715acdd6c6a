"""Expert-choice routing."""

import keras

from keras_moe.routers.router import Router
from keras_moe.routing.placement import choose_tokens
from keras_moe.routing.selection import normalized


@keras.saving.register_keras_serializable(package="keras_moe")
class ExpertsChooseMaskedRouter(Router):
    """Each expert selects the `c` tokens with the highest probability for it.

    A token may be selected by several experts or by none; its output is 0 if by none.
    All experts have the same load, so there is no balance loss, and its metric is 0.

    Not for decoders: the routing of a token depends on later tokens.

    Args:
        num_experts: int, the number of experts `e`.
        hidden_layers: int or list of ints, the sizes of ReLU layers in the gate.
            Defaults to `None`, no hidden layers.
        mechanism: string, `"softmax"` or `"sigmoid"`, see `Gate`. Defaults to
            `"softmax"`.
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
        keras_moe.ExpertsChooseMaskedRouter(8),
        train_capacity_factor=2.0,
        eval_capacity_factor=2.0,
    )
    ```

    Reference:
        [Zhou et al., 2022](https://arxiv.org/abs/2202.09368).
    """

    def __init__(
        self,
        num_experts,
        *,
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
        if self.mechanism == "gumbel":
            raise ValueError(
                '`mechanism="gumbel"` selects one expert per token, and here experts '
                f"select tokens. Received: mechanism={self.mechanism!r}."
            )

    def compute_routing(self, probs, expert_capacity, training=None):
        routing = choose_tokens(probs, expert_capacity)
        if self.mechanism == "sigmoid":
            routing = routing._replace(probs=normalized(probs))
        return routing
