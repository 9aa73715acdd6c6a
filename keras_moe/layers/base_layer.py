"""The pipeline of every Mixture-of-Experts layer: group, route, dispatch, combine."""

import functools

import keras

from keras_moe.experts.adaptation import AdaptableLayer
from keras_moe.kernels import ops
from keras_moe.routing.dispatch import combine, dispatch, unweighted
from keras_moe.routing.grouping import group, ungroup
from keras_moe.routing.sharding import shard_by_expert, shard_by_group
from keras_moe.routing.values import group_size_arguments
from keras_moe.utils import checks
from keras_moe.utils.traversal import child_layers

# Arguments of the router and the experts, also under the names of other packages.
_OF_ROUTER = (
    ("num_selected_experts", "num_selected_experts"),
    ("top_k", "num_selected_experts"),
    ("k", "num_selected_experts"),
    ("num_experts_per_tok", "num_selected_experts"),
    ("load_balancing_loss_weight", "load_balancing_loss_weight"),
    ("loss_coef", "load_balancing_loss_weight"),
    ("router_z_loss_weight", "router_z_loss_weight"),
    ("export_metrics", "export_metrics"),
)
_OF_EXPERTS = (("d_ff", "d_ff"), ("hidden_dim", "d_ff"), ("activation", "activation"))
HINTS = {
    "num_experts": "`num_experts` of the experts and of the router",
    "capacity_factor": "`train_capacity_factor` and `eval_capacity_factor`",
    **{name: f"`{ours}` of the router" for name, ours in _OF_ROUTER},
    **{name: f"`{ours}` of the experts" for name, ours in _OF_EXPERTS},
}


class BaseMoeLayer(AdaptableLayer):
    """Dispatches tokens to experts and combines their outputs. Abstract.

    A subclass implements `compute_routing` and `count_slots`.

    Args:
        experts: layer with `num_experts` that maps `[g, e, c, h]` to the same shape.
        examples_per_group: float, the number of examples that are routed together.
        name: string.
        **kwargs: forwarded to `keras.layers.Layer`.
    """

    serialized_sublayers = ("experts",)
    # The largest number of experts of a token; `None` where experts choose.
    experts_per_token = None
    # Whether the combine weights multiply the experts' inputs, not their outputs.
    weighted_inputs = False
    # Whether the experts of each token can be given.
    supports_replay = False
    # The size of the experts' inputs; `None` for that of the layer's.
    latent_dim = None
    # The shape that the layer was built with.
    built_shape = None
    # Whether a `keras.RematScope` applies to the layer.
    rematerializes = False

    def __init__(self, experts, *, examples_per_group=1.0, name=None, **kwargs):
        checks.no_foreign_arguments(self, kwargs, HINTS)
        super().__init__(name=name, **kwargs)
        self.num_experts = count_experts(experts)
        self.experts = experts
        self.examples_per_group = checks.examples_per_group(examples_per_group)
        self.supports_masking = True

    def _adaptable_parts(self):
        return [self.experts]

    def compute_routing(self, tokens, mask, training, report=True):
        """Computes the routing of tokens. Subclasses must override it.

        Args:
            tokens: `[g, t, h]`.
            mask: bool `[g, t]`, false for a masked token, or `None`.
            training: bool.
            report: bool, whether to add losses and metrics.

        Returns:
            `Slots`, `Rows` or a `RouterMask`.
        """
        raise NotImplementedError(
            f"{type(self).__name__} must implement `compute_routing`."
        )

    def count_slots(self, tokens, training):
        """Returns the number of slots of all experts. Subclasses must override it.

        Args:
            tokens: int, the tokens of a group.
            training: bool.

        Returns:
            An int; `None` without a capacity.
        """
        raise NotImplementedError(
            f"{type(self).__name__} must implement `count_slots`."
        )

    def build(self, input_shape):
        self._check_input_shape(input_shape)
        self.built_shape = tuple(input_shape)
        hidden = input_shape[-1]
        self.input_spec = keras.InputSpec(min_ndim=2, axes={-1: hidden})
        build_experts(self.experts, self.latent_dim or hidden, self.compute_dtype)

    def call(
        self,
        inputs,
        mask=None,
        training=None,
        return_routing=False,
        router_inputs=None,
        expert_index=None,
    ):
        inputs = ops.cast(inputs, self.compute_dtype)
        tokens, token_mask = self._group(inputs, mask)
        router_tokens = tokens
        if router_inputs is not None:
            _check_router_inputs_shape(router_inputs, inputs)
            router_inputs = ops.cast(router_inputs, self.compute_dtype)
            router_tokens, _ = self._group(router_inputs, mask)
        routing = self.compute_routing(
            router_tokens,
            token_mask,
            training,
            **self._given_experts(expert_index, inputs, tokens),
        )
        outputs = self._call_experts(tokens, routing, training)
        outputs = ungroup(outputs, inputs, self.examples_per_group)
        return (outputs, routing) if return_routing else outputs

    def _call_experts(self, tokens, routing, training):
        """Returns the outputs of tokens, `[g, t, h]`."""
        buffers = dispatch(tokens, routing, self.weighted_inputs)
        buffers = shard_by_expert(buffers, self.experts)
        experts = functools.partial(
            self.experts, training=training, **group_size_arguments(routing)
        )
        if self.rematerializes:
            experts = keras.remat(experts)
        results = experts(buffers)
        results = shard_by_group(results, self.experts)
        routing = unweighted(routing) if self.weighted_inputs else routing
        return ops.cast(combine(results, routing), self.compute_dtype)

    def rematerialized_call(self, layer_call, *args, **kwargs):
        # The experts are rematerialized alone: losses and state stay in reach.
        call = super().rematerialized_call(layer_call, *args, **kwargs)
        self.rematerializes |= call is not layer_call
        return layer_call

    def route(self, inputs, mask=None, training=False):
        """Returns the routing of inputs, without calling the experts.

        No loss or metric is added.

        Args:
            inputs: `[batch, ..., h]`, those of the router.
            mask: bool `[batch, ...]`, false for a masked token. Defaults to `None`, no
                mask; the implicit Keras mask of the inputs is ignored.
            training: bool. Defaults to `False`.

        Returns:
            `Slots`, `Rows` or a `RouterMask`, in groups.
        """
        inputs = ops.cast(ops.convert_to_tensor(inputs), self.compute_dtype)
        if not self.built:
            self.build(inputs.shape)
        tokens, mask = self._group(inputs, mask)
        return self.compute_routing(tokens, mask, training, report=False)

    def _group(self, inputs, mask):
        self._check_input_shape(inputs.shape)
        check_mask_shape(mask, inputs)
        return group(inputs, mask, self.examples_per_group)

    def _given_experts(self, expert_index, inputs, tokens):
        """Returns the keyword arguments of `compute_routing` for given experts."""
        if expert_index is None:
            return {}
        self._check_expert_index(expert_index, inputs.shape, tokens.shape)
        index = ops.cast(expert_index, "int32")
        of_index, of_inputs, of_tokens = (
            tuple(x.shape[:-1]) for x in (index, inputs, tokens)
        )
        # Where sizes are unknown, both shapes may fit.
        in_groups = of_index == of_tokens != of_inputs
        if _same_shape(of_index, of_inputs) and not in_groups:
            # Padding, which is 0, becomes -1.
            index = group(index + 1, None, self.examples_per_group)[0] - 1
        return {"expert_index": index}

    def _check_expert_index(self, expert_index, inputs_shape, tokens_shape):
        if not self.supports_replay:
            raise ValueError(
                f"{type(self).__name__} does not support a given `expert_index`."
            )
        shape = tuple(expert_index.shape)
        if not any(
            _same_shape(shape[:-1], expected[:-1])
            for expected in (inputs_shape, tokens_shape)
        ):
            raise ValueError(
                "`expert_index` must have the shape of the inputs, with the experts of "
                "a token on the last axis, or that of a routing, [g, t, k]. Received: "
                f"expert_index of shape {shape} for inputs of shape "
                f"{tuple(inputs_shape)}."
            )

    def _check_input_shape(self, shape):
        if len(shape) < 2 or shape[-1] is None:
            raise ValueError(
                "Inputs must be (batch, ..., hidden), with a known last axis. "
                f"Received: input_shape={shape}."
            )
        examples = self.examples_per_group
        if len(shape) == 2 and examples is not None and examples <= 1:
            raise ValueError(
                "Inputs (batch, hidden) have one token per example, so a group of one "
                "example or less has a single token, and routing is meaningless. Use "
                "`examples_per_group=None`, or a number above 1. "
                f"Received: examples_per_group={examples:g}, input_shape={shape}."
            )

    @property
    def metrics(self):
        # Without those of sublayers: Keras collects the metrics of every layer of a
        # model, and would list these twice.
        nested = {id(m) for layer in child_layers(self) for m in layer.metrics}
        return [m for m in super().metrics if id(m) not in nested]

    def compute_output_shape(self, input_shape):
        return input_shape

    def compute_output_spec(
        self,
        inputs,
        mask=None,
        training=None,
        return_routing=False,
        router_inputs=None,
        expert_index=None,
    ):
        check_mask_shape(mask, inputs)
        _check_router_inputs_shape(router_inputs, inputs)
        if expert_index is not None:
            self._check_expert_index(expert_index, inputs.shape, (None, None, None))
        if return_routing:
            # Infers the shapes of the routing by a symbolic call.
            return keras.Operation.compute_output_spec(
                self,
                inputs,
                mask=mask,
                training=training,
                return_routing=True,
                router_inputs=router_inputs,
                expert_index=expert_index,
            )
        return keras.KerasTensor(inputs.shape, dtype=self.compute_dtype)

    def get_build_config(self):
        # The owner of this layer builds it, so that its path begins with the owner's.
        return None

    def get_config(self):
        return {
            **super().get_config(),
            "experts": keras.saving.serialize_keras_object(self.experts),
            "examples_per_group": self.examples_per_group,
        }


def count_experts(experts):
    """Returns the number of experts of a layer, or raises an error if it has none."""
    if not isinstance(experts, keras.layers.Layer) or not hasattr(
        experts, "num_experts"
    ):
        raise TypeError(
            "`experts` must be a Keras layer with an attribute `num_experts`. "
            f"Received: {type(experts).__name__}."
        )
    return checks.whole_number("num_experts", experts.num_experts)


def build_experts(experts, hidden, dtype):
    """Builds experts for inputs `[1, e, c, hidden]`, and checks their outputs."""
    # A symbolic call builds any layer, with or without a `build`.
    buffers = keras.KerasTensor((1, experts.num_experts, None, hidden), dtype=dtype)
    results = experts(buffers)
    received = getattr(results, "shape", type(results).__name__)
    if received != buffers.shape:
        raise ValueError(
            "`experts` must return the shape of their inputs. "
            f"Received: {received} for {buffers.shape}."
        )


def check_mask_shape(mask, inputs):
    """Raises an error if a mask does not have the shape of the inputs."""
    if mask is not None and not _same_shape(mask.shape, inputs.shape[:-1]):
        raise ValueError(
            "`mask` must have the shape of the inputs without the last axis, "
            f"{tuple(inputs.shape[:-1])}. Received: a mask of shape "
            f"{tuple(mask.shape)}."
        )


def _check_router_inputs_shape(router_inputs, inputs):
    if router_inputs is not None and not _same_shape(router_inputs.shape, inputs.shape):
        raise ValueError(
            f"`router_inputs` must have the shape of the inputs, {tuple(inputs.shape)}."
            f" Received: router_inputs of shape {tuple(router_inputs.shape)}."
        )


def _same_shape(received, expected):
    return len(received) == len(expected) and all(
        r == e for r, e in zip(received, expected, strict=True) if None not in (r, e)
    )
