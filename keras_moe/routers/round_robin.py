"""Routing in turn, for benchmarks."""

import keras

from keras_moe.kernels import ops
from keras_moe.routers.masked import MaskedRouter


@keras.saving.register_keras_serializable(package="keras_moe")
class RoundRobinRouter(MaskedRouter):
    """A `MaskedRouter` that dispatches tokens to the experts in turn. For benchmarks.

    Token `i` of a batch has the experts `k · i` to `k · i + k - 1`, modulo `e`,
    whatever its values are. So the speed of a layer does not depend on the load of an
    untrained gate. The combine weights are those of `MaskedRouter`.

    Args:
        num_experts: int, the number of experts `e`.
        num_selected_experts: int, the number `k` of experts per token. Defaults to 1.
        name: string. Defaults to `"router"`.
        **kwargs: further arguments of `MaskedRouter`.

    Call arguments:
        See `Router`.

    Example:

    ```python
    layer = keras_moe.MoeLayer(
        keras_moe.FeedForwardExperts(8, 64),
        keras_moe.RoundRobinRouter(8, num_selected_experts=2),
        train_capacity_factor=None,
        eval_capacity_factor=None,
    )
    ```
    """

    def __init__(self, num_experts, *, num_selected_experts=1, name="router", **kwargs):
        super().__init__(
            num_experts, num_selected_experts=num_selected_experts, name=name, **kwargs
        )

    def compute_routing(self, probs, expert_capacity, training=None):
        groups, tokens, e = ops.shape(probs)
        k = self.num_selected_experts
        place = ops.reshape(
            ops.arange(groups * tokens, dtype="int32"), (groups, tokens, 1)
        )
        in_turn = (k * place + ops.arange(k, dtype="int32")) % e
        return self.replay_routing(probs, in_turn, expert_capacity, training)
