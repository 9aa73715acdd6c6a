"""The way of the tokens, the same for every Mixture-of-Experts layer."""

import keras
from keras import ops

from keras_moe import checks
from keras_moe.dispatch import combine, dispatch
from keras_moe.distribution import from_experts, to_experts
from keras_moe.grouping import group, ungroup
from keras_moe.routing import row_arguments
from keras_moe.serialization import with_parts


class BaseMoeLayer(keras.layers.Layer):
    """Abstract: tokens go to experts, and the results come home.

    A subclass says which tokens go where, in `decide`.

    Args:
        experts: a layer with `num_experts` that maps `[g, e, c, h]` to the
            same shape.
        examples_per_group: how many examples of the batch are routed together.
        name: string.
        **kwargs: forwarded to `keras.layers.Layer`.
    """

    def __init__(self, experts, *, examples_per_group=1.0, name=None, **kwargs):
        super().__init__(name=name, **kwargs)
        if not isinstance(experts, keras.layers.Layer) or not hasattr(
            experts, "num_experts"
        ):
            raise TypeError(
                "`experts` must be a Keras layer with an attribute `num_experts`. "
                f"Received: {type(experts).__name__}."
            )
        self.experts = experts
        self.num_experts = checks.whole_number("num_experts", experts.num_experts)
        self.examples_per_group = checks.examples_per_group(examples_per_group)
        self.supports_masking = True

    def decide(self, tokens, mask, training, report=True):
        """Decides which tokens go where. To be overridden.

        Args:
            tokens: `[g, t, h]`.
            mask: bool `[g, t]`, false for a masked token, or `None`.
            training: bool.
            report: bool, whether to add losses and metrics.

        Returns:
            `Slots`, `Rows` or a `RouterMask`.
        """
        raise NotImplementedError(f"{type(self).__name__} must implement `decide`.")

    # How many experts a token goes to at most; `None` where experts choose.
    experts_per_token = None

    def count_slots(self, tokens, training):
        """How many slots all experts have together. To be overridden.

        Args:
            tokens: int, the tokens of a group.
            training: bool.

        Returns:
            An int; `None` where there is no capacity.
        """
        raise NotImplementedError(
            f"{type(self).__name__} must implement `count_slots`."
        )

    def build(self, input_shape):
        self._check_input_shape(input_shape)
        hidden = input_shape[-1]
        self.input_spec = keras.InputSpec(min_ndim=2, axes={-1: hidden})
        # A symbolic call builds any layer, with or without a `build`.
        buffers = keras.KerasTensor(
            (1, self.num_experts, None, hidden), dtype=self.compute_dtype
        )
        results = self.experts(buffers)
        received = getattr(results, "shape", type(results).__name__)
        if received != buffers.shape:
            raise ValueError(
                "`experts` must return the shape that they are given. "
                f"Received: {received} for {buffers.shape}."
            )

    def call(self, inputs, mask=None, training=None, return_routing=False):
        tokens, mask = self._group(inputs, mask)
        routing = self.decide(tokens, mask, training)
        buffers = to_experts(dispatch(tokens, routing), self.experts)
        results = self.experts(buffers, **row_arguments(routing))
        results = from_experts(results, self.experts)
        outputs = ops.cast(combine(results, routing), self.compute_dtype)
        outputs = ungroup(outputs, inputs, self.examples_per_group)
        return (outputs, routing) if return_routing else outputs

    def route(self, inputs, mask=None, training=False):
        """Where the tokens go, without any loss, metric or expert.

        Args:
            inputs: `[batch, ..., h]`.
            mask: bool `[batch, ...]`, or `None` for none: it has no eye for the
                mask that inputs may carry in Keras.
            training: bool.

        Returns:
            The routing: `Slots`, `Rows` or a `RouterMask`, in groups.
        """
        inputs = ops.cast(ops.convert_to_tensor(inputs), self.compute_dtype)
        if not self.built:
            self.build(inputs.shape)
        tokens, mask = self._group(inputs, mask)
        return self.decide(tokens, mask, training, report=False)

    def _group(self, inputs, mask):
        self._check_input_shape(inputs.shape)
        _check_mask_shape(mask, inputs)
        return group(inputs, mask, self.examples_per_group)

    def _check_input_shape(self, shape):
        if len(shape) < 2 or shape[-1] is None:
            raise ValueError(
                "Inputs must be (batch, ..., hidden), with a known last axis. "
                f"Received: input_shape={shape}."
            )
        examples = self.examples_per_group
        if len(shape) == 2 and examples is not None and examples <= 1:
            raise ValueError(
                "Inputs (batch, hidden) have one token an example, so groups of one "
                "example or less have one token, and routing has no choice. Use "
                "`examples_per_group=None`, or more examples. "
                f"Received: examples_per_group={examples:g}, input_shape={shape}."
            )

    def compute_output_shape(self, input_shape):
        return input_shape

    def compute_output_spec(
        self, inputs, mask=None, training=None, return_routing=False
    ):
        _check_mask_shape(mask, inputs)
        if return_routing:
            # The routing's shapes follow from running the layer on no data.
            return keras.Operation.compute_output_spec(
                self, inputs, mask=mask, training=training, return_routing=True
            )
        return keras.KerasTensor(inputs.shape, dtype=self.compute_dtype)

    def get_build_config(self):
        # Whoever holds the layer builds it, so that its path begins with theirs.
        return None

    def get_config(self):
        return {
            **super().get_config(),
            "experts": keras.saving.serialize_keras_object(self.experts),
            "examples_per_group": self.examples_per_group,
        }

    @classmethod
    def from_config(cls, config):
        return cls(**with_parts(config, "experts"))


def _check_mask_shape(mask, inputs):
    if mask is None:
        return
    received, expected = tuple(mask.shape), tuple(inputs.shape[:-1])
    if len(received) != len(expected) or any(
        r != e for r, e in zip(received, expected, strict=True) if None not in (r, e)
    ):
        raise ValueError(
            "`mask` must have the shape of the inputs without the last axis, "
            f"{expected}. Received: a mask of shape {received}."
        )
