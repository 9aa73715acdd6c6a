"""Soft Mixture of Experts: every slot is a weighted mean of all tokens."""

import keras

from keras_moe.kernels import ops
from keras_moe.layers.base_layer import BaseMoeLayer
from keras_moe.routing.values import RouterMask
from keras_moe.utils import checks, initializers


@keras.saving.register_keras_serializable(package="keras_moe")
class SoftMoeLayer(BaseMoeLayer):
    """A Mixture-of-Experts layer whose slots are convex combinations of tokens.

    Let `x` and `s` be the vectors of the tokens and of the slots, both normalized to
    length 1. The input of a slot is the mean of the tokens, weighted by
    `softmax_t(scale · x · s)`. The output of a token is the mean of the slots' outputs,
    weighted by `softmax_slots(scale · x · s)`. Nothing is dropped, everything has a
    gradient, and no auxiliary loss is needed. The cost is that of the slots, plus
    `4 · g · t · e · c · h` FLOPs for the means.

    For encoders only: the output of a token depends on all tokens of its group.

    Args:
        experts: see `MoeLayer`.
        slots_per_expert: int, the number of slots `c` of each expert for each group.
            With `e · c = t` the experts cost what a dense layer costs. Defaults to 1.
        examples_per_group: see `MoeLayer`. Defaults to 1.
        kernel_initializer: initializer of the slots' vectors `[h, e, c]`. Defaults to
            `"lecun_normal"`.
        name: string.
        **kwargs: forwarded to `keras.layers.Layer`.

    Call arguments:
        inputs: `[batch, ..., h]`, of rank 2 or more.
        mask: bool `[batch, ...]`, false for a masked token, which enters no slot and
            gets 0. Defaults to the Keras mask of the inputs.
        return_routing: bool, whether to return the routing, too.

    Returns:
        `[batch, ..., h]`; with `return_routing` a pair of this and the `RouterMask`.

    Raises:
        ValueError: if an argument is out of range.
        TypeError: if an argument has another type.

    Example:

    ```python
    layer = keras_moe.SoftMoeLayer(
        keras_moe.FeedForwardExperts(num_experts=8, d_ff=64), slots_per_expert=4
    )
    layer(np.ones((2, 32, 16))).shape  # (2, 32, 16)
    ```

    Reference:
        [Puigcerver et al., 2023](https://arxiv.org/abs/2308.00951), section 2.
    """

    def __init__(
        self,
        experts,
        *,
        slots_per_expert=1,
        examples_per_group=1.0,
        kernel_initializer="lecun_normal",
        name=None,
        **kwargs,
    ):
        super().__init__(
            experts, examples_per_group=examples_per_group, name=name, **kwargs
        )
        self.slots_per_expert = checks.whole_number(
            "slots_per_expert", slots_per_expert
        )
        self.kernel_initializer = initializers.get(
            "kernel_initializer", kernel_initializer
        )

    def build(self, input_shape):
        super().build(input_shape)
        shape = (input_shape[-1], self.num_experts, self.slots_per_expert)
        # Routing is float32 under every dtype policy.
        float32 = {"dtype": "float32", "autocast": False}
        self.slots = self.add_weight(
            name="slots", shape=shape, initializer=self.kernel_initializer, **float32
        )
        self.scale = self.add_weight(name="scale", initializer="ones", **float32)
        self.restore_trainable()

    @property
    def experts_per_token(self):
        return self.num_experts

    def count_slots(self, tokens, training):
        return self.num_experts * self.slots_per_expert

    def compute_routing(self, tokens, mask, training, report=True):
        tokens = _unit_vectors(ops.cast(tokens, "float32"), axis=-1)
        slots = _unit_vectors(ops.convert_to_tensor(self.slots), axis=0)
        hidden, experts, capacity = ops.shape(slots)
        # Not an einsum, which `tf.vectorized_map` computes wrongly (TensorFlow 2.21).
        slots = ops.reshape(slots, (hidden, experts * capacity))
        logits = self.scale * ops.matmul(tokens, slots)
        combine = ops.softmax(logits, axis=-1)
        if mask is None:
            dispatch = ops.softmax(logits, axis=1)
        else:
            valid = ops.cast(ops.expand_dims(mask, -1), "float32")
            # With -1e9 a masked token has weight 0. With -inf the softmax would be NaN
            # in a group of masked tokens only.
            dispatch = valid * ops.softmax(logits - 1e9 * (1.0 - valid), axis=1)
            combine = valid * combine
        shape = (*ops.shape(logits)[:2], experts, capacity)
        return RouterMask(ops.reshape(dispatch, shape), ops.reshape(combine, shape))

    def get_config(self):
        return {
            **super().get_config(),
            "slots_per_expert": self.slots_per_expert,
            "kernel_initializer": initializers.serialize(self.kernel_initializer),
        }


def _unit_vectors(x, axis):
    """Normalizes vectors to length 1 (less if shorter than Keras's epsilon).

    `ops.normalize` has no gradient at 0, and its squares may overflow.
    """
    size = ops.max(ops.abs(x), axis=axis, keepdims=True)
    x = x / ops.stop_gradient(ops.maximum(size, keras.config.epsilon()))
    squares = ops.sum(ops.square(x), axis=axis, keepdims=True)  # 1 or more
    return x * ops.rsqrt(ops.maximum(squares, 0.5))
