"""Soft MoE: every slot is a mixture of all tokens."""

import keras
from keras import ops

from keras_moe import checks, initializers
from keras_moe.base_layer import BaseMoeLayer
from keras_moe.routing import RouterMask


@keras.saving.register_keras_serializable(package="keras_moe")
class SoftMoeLayer(BaseMoeLayer):
    """A Mixture-of-Experts layer whose slots are convex mixtures of tokens.

    With the tokens' and the slots' vectors `x` and `s`, both scaled to length
    1, a slot is the mean of the tokens with weights `softmax_t(scale · x · s)`,
    and a token gets the mean of the slots' results with weights
    `softmax_slots(scale · x · s)`. Nothing is dropped, everything has a
    gradient, and no loss is needed. It costs what its slots cost, plus
    `4 · g · t · e · c · h` FLOPs for the mixtures.

    For encoders only: each token sees all tokens of its group.

    Args:
        experts: see `MoeLayer`.
        slots_per_expert: int, the slots `c` of an expert for each group; the
            work of a dense layer at `e · c = t`.
        examples_per_group: see `MoeLayer`.
        kernel_initializer: initializer of the slots' vectors `[h, e, c]`;
            LeCun normal by default.
        name: string.
        **kwargs: forwarded to `keras.layers.Layer`.

    Call arguments:
        inputs: `[batch, ..., h]`, of any rank from 2.
        mask: bool `[batch, ...]`, false for tokens that enter no slot and get
            0; the mask of the inputs by default.
        return_routing: bool.

    Returns:
        `[batch, ..., h]`; with `return_routing` a pair of this and the
        `RouterMask`.

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
        # Float32, as all routing is.
        float32 = {"dtype": "float32", "autocast": False}
        self.slots = self.add_weight(
            name="slots", shape=shape, initializer=self.kernel_initializer, **float32
        )
        self.scale = self.add_weight(name="scale", initializer="ones", **float32)

    @property
    def experts_per_token(self):
        return self.num_experts

    def count_slots(self, tokens, training):
        return self.num_experts * self.slots_per_expert

    def decide(self, tokens, mask, training, report=True):
        tokens = _direction(ops.cast(tokens, "float32"), axis=-1)
        slots = _direction(ops.convert_to_tensor(self.slots), axis=0)
        logits = self.scale * ops.einsum("gth,hec->gtec", tokens, slots)
        groups, t, experts, capacity = ops.shape(logits)
        combine = ops.softmax(
            ops.reshape(logits, (groups, t, experts * capacity)), axis=-1
        )
        combine = ops.reshape(combine, (groups, t, experts, capacity))
        if mask is None:
            return RouterMask(ops.softmax(logits, axis=1), combine)
        valid = ops.cast(ops.reshape(mask, (groups, t, 1, 1)), "float32")
        # A number so low that a masked token has no weight, but in a group of
        # nothing else, where a softmax of infinities would be NaN.
        dispatch = ops.softmax(logits - 1e9 * (1.0 - valid), axis=1)
        return RouterMask(valid * dispatch, valid * combine)

    def get_config(self):
        return {
            **super().get_config(),
            "slots_per_expert": self.slots_per_expert,
            "kernel_initializer": initializers.serialize(self.kernel_initializer),
        }


def _direction(x, axis):
    """Vectors scaled to length 1; those shorter than Keras's epsilon are shorter.

    `ops.normalize` has no gradient at 0, and squares that may be infinite.
    """
    size = ops.max(ops.abs(x), axis=axis, keepdims=True)
    x = x / ops.stop_gradient(ops.maximum(size, keras.config.epsilon()))
    squares = ops.sum(ops.square(x), axis=axis, keepdims=True)  # 1 or more
    return x * ops.rsqrt(ops.maximum(squares, 0.5))
