"""Experts of different architectures."""

import keras

from keras_moe.experts.adaptation import AdaptableLayer
from keras_moe.kernels import ops
from keras_moe.utils import checks
from keras_moe.utils.layouts import refuse_layout


@keras.saving.register_keras_serializable(package="keras_moe")
class HeterogeneousExperts(AdaptableLayer):
    """Experts of different architectures, each called on its own slots.

    They need a capacity.

    Args:
        experts: list of layers, one per expert. Each maps `[g, c, h]` to the same shape
            and treats each token independently of the others.
        name: string. Defaults to `"experts"`.
        **kwargs: forwarded to `keras.layers.Layer`.

    Call arguments:
        inputs: `[g, e, c, h]`, the tokens in the slots of each expert.

    Returns:
        `[g, e, c, h]`.

    Raises:
        TypeError: if `experts` is not a list of layers.
        ValueError: if it is empty, or the inputs have another number of experts.

    Example:

    ```python
    experts = keras_moe.HeterogeneousExperts(
        [keras.layers.Dense(16), keras_moe.FeedForward(32), keras_moe.FeedForward(64)]
    )
    layer = keras_moe.MoeLayer(experts, keras_moe.MaskedRouter(3))
    layer(np.ones((2, 8, 16))).shape  # (2, 8, 16)
    ```
    """

    serialized_sublayers = ("experts",)

    def __init__(self, experts, *, name="experts", **kwargs):
        super().__init__(name=name, **kwargs)
        if not isinstance(experts, (list, tuple)) or not all(
            isinstance(expert, keras.layers.Layer) for expert in experts
        ):
            raise TypeError(
                f"`experts` must be a list of layers. Received: experts={experts!r}."
            )
        if not experts:
            raise ValueError("`experts` must hold at least one layer. Received: [].")
        self.experts = list(experts)
        self.num_experts = len(experts)

    def build(self, input_shape):
        checks.experts_shape(input_shape, self.num_experts)
        refuse_layout(
            self,
            "they are layers of their own. Use `FeedForwardExperts` with "
            "`expert_layout_map`",
        )
        groups, _, capacity, hidden = input_shape
        for expert in self.experts:
            # A symbolic call builds any layer, with or without a `build`.
            expert(
                keras.KerasTensor((groups, capacity, hidden), dtype=self.compute_dtype)
            )
        self.restore_trainable()

    def call(self, inputs):
        slots = ops.unstack(inputs, self.num_experts, axis=1)
        results = [
            expert(tokens) for expert, tokens in zip(self.experts, slots, strict=True)
        ]
        return ops.stack(results, axis=1)

    def compute_output_shape(self, input_shape):
        return input_shape

    def get_config(self):
        experts = [keras.saving.serialize_keras_object(e) for e in self.experts]
        return {**super().get_config(), "experts": experts}
