"""Sparse computation of keras-hub's Mixture-of-Experts blocks.

keras-hub computes every expert for every token and multiplies most results by zero.
Here only `call` of its blocks changes. Their weights, paths and files stay the same, so
there is nothing to convert or to undo.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import keras
from keras import ops

from keras_moe import losses
from keras_moe.kernels import XLA_COMPILES_ROWS, grouped_dense
from keras_moe.routing.dispatch import combine, dispatch
from keras_moe.routing.placement import assign_slots, selection_load
from keras_moe.routing.selection import Selection, normalized
from keras_moe.utils.traversal import child_layers, find_layers

# The compiled functions of a model, which would keep the old computation.
COMPILED = (
    "train_function",
    "test_function",
    "predict_function",
    "generate_function",
)


def accelerate(model):
    """Makes the Mixture-of-Experts blocks of a keras-hub model skip idle experts.

    Weights, outputs, the balance loss and files stay the same: a saved model is an
    ordinary keras-hub model. It can be quantized and have LoRA adapters, before or
    after.

    Args:
        model: built keras-hub backbone or task, or any other Keras model or layer that
            contains blocks of Mixtral, Qwen-MoE, Qwen3-MoE, Qwen3.5-MoE, GPT-OSS or
            Gemma 4. It is changed in place.

    Returns:
        The model.

    Raises:
        ValueError: if there is no such block; if a block is not built, has jitter,
            which keras-hub 0.32 cannot compute, or has quantized experts; or if a
            block of Gemma 4 is without its router. Then no block is changed.

    Example:

    ```python
    model = keras_hub.models.MixtralCausalLM.from_preset("mixtral_8_7b_en")
    keras_moe.accelerate(model)
    model.generate("The experts", max_length=32)
    ```
    """
    layers = find_layers(model, keras.layers.Layer)
    blocks = [layer for layer in layers if type(layer).__name__ in BLOCKS]
    if not blocks:
        raise ValueError(
            f"The model must contain blocks of keras-hub: {', '.join(BLOCKS)}. "
            f"There is none in {model.name}."
        )
    routers = _routers_of_gemma4(layers)
    sparse = [_sparse_call(block, routers.get(id(block))) for block in blocks]
    for block, call in zip(blocks, sparse, strict=True):
        block.call = call
        block.supports_jit = XLA_COMPILES_ROWS
    for layer in layers:
        if isinstance(layer, keras.Model) and not XLA_COMPILES_ROWS:
            layer.jit_compile = False
        for name in COMPILED:
            if getattr(layer, name, None) is not None:
                setattr(layer, name, None)
    return model


def _routers_of_gemma4(layers):
    """Returns the routers of Gemma 4, by the ids of the layers beside them."""
    found = {}
    for children in map(child_layers, layers):
        routers = [x for x in children if type(x).__name__ == "Gemma4Router"]
        if len(routers) == 1:
            found |= {id(layer): routers[0] for layer in children}
    return found


def _sparse_call(block, router):
    """Returns a function that computes a block without its idle experts."""
    if not block.built:
        raise ValueError(f"{block.name} must be built: it has no weights yet.")
    if getattr(block, "router_jitter_noise", 0):
        raise ValueError(
            f"{block.path} must have no jitter. Received: "
            f"router_jitter_noise={block.router_jitter_noise}."
        )
    parts = {layer.name: layer for layer in find_layers(block, keras.layers.Layer)}
    bank = parts.get("experts", block)
    if block.quantization_mode or bank.quantization_mode:
        raise ValueError(f"{bank.path} must not be quantized.")
    if bank is block:  # A block of Gemma 4 has the experts alone.
        if router is None:
            raise ValueError(f"{block.path} must be in a layer with its router.")
        parts["router"] = router
    kind = BLOCKS[type(block).__name__]
    experts = functools.partial(_experts, bank, kind)
    return functools.partial(kind.call, block, parts, experts)


# The `call` of blocks. `parts` are layers by their names, and `experts` is a function
# of rows `[a, h]`, sorted by expert, and of the number of rows of each expert.


def _call_with_logits(
    block, parts, experts, hidden_states, attention_mask=None, training=None
):
    """`call` of the blocks of Mixtral and Qwen, which return the router logits."""
    tokens = _flatten(hidden_states)
    gate = parts.get("sparse_feedforward_gate_dense") or parts["router_gate"]
    logits = gate(tokens)
    probs = ops.softmax(logits, axis=-1)
    selection = _select(probs, block.top_k)
    if getattr(block, "norm_top_k_prob", True):
        selection = selection._replace(weight=normalized(selection.weight))
    outputs = _apply(experts, tokens, selection, probs)
    shared = parts.get("shared_expert_dense") or parts.get("shared_expert")
    if shared is not None:
        gate = parts.get("shared_expert_gate_dense") or parts["shared_expert_gate"]
        outputs = outputs + shared(tokens) * ops.sigmoid(gate(tokens))
    if training:
        block.add_loss(_weight(block) * _balance_loss(selection, probs, attention_mask))
    return ops.reshape(outputs, ops.shape(hidden_states)), logits[0]


def _call_gpt_oss(block, parts, experts, hidden_states):
    """`call` of the blocks of GPT-OSS, which return the combine weights `[t, e]`."""
    tokens = _flatten(hidden_states)
    scores = parts["router"](tokens[0])
    selection = _select(scores[None], block.top_k)
    outputs = _apply(experts, tokens, selection, scores[None])
    return ops.reshape(outputs, ops.shape(hidden_states)), scores


def _call_gemma4(block, parts, experts, x, dispatch_weights):
    """`call` of the experts of Gemma 4: rows `[t, h]` and combine weights `[t, e]`."""
    scores = dispatch_weights[None]
    selection = _select(scores, parts["router"].num_experts_per_token)
    scale = ops.take(block.per_expert_scale, selection.expert_index, axis=0)
    weight = selection.weight * ops.cast(scale, "float32")
    return _apply(experts, x[None], selection._replace(weight=weight), scores)[0]


def _flatten(hidden_states):
    """Returns the tokens as one group: `[1, t, h]`."""
    return ops.reshape(hidden_states, (1, -1, ops.shape(hidden_states)[-1]))


def _select(scores, k):
    """Selects the `k` best experts of each token; ties go as in keras-hub.

    Args:
        scores: `[1, t, e]`, the combine weights, in the compute dtype.
        k: int.

    Returns:
        A `Selection`.
    """
    weight, index = ops.top_k(scores, k)
    return Selection(ops.cast(index, "int32"), ops.cast(weight, "float32"))


def _apply(experts, tokens, selection, scores):
    """Returns the weighted sums of the selected experts' outputs: `[1, t, h]`."""
    routing = assign_slots(selection, scores, None)
    return combine(experts(dispatch(tokens, routing), routing.group_sizes), routing)


def _balance_loss(selection, probs, attention_mask):
    """Balance loss of the non-padding tokens; the mask is `[b, s]` or `[b, s, s]`."""
    probs = ops.cast(probs, "float32")
    if attention_mask is not None:
        mask = ops.cast(attention_mask, "bool")
        mask = ops.any(mask, axis=-1) if len(mask.shape) == 3 else mask
        mask = ops.reshape(mask, (1, -1, 1))
        probs = ops.where(mask, probs, 0.0)
        index = ops.where(mask, selection.expert_index, -1)
        selection = selection._replace(expert_index=index)
    load = selection_load(selection, probs.shape[-1])
    return losses.load_balancing_loss(probs, load)


def _weight(block):
    """Returns the weight of a block's balance loss, which has two names."""
    if hasattr(block, "router_aux_loss_coef"):
        return block.router_aux_loss_coef
    return block.router_aux_loss_coefficient


def _experts(bank, kind, rows, group_sizes):
    """Applies the experts of a bank to rows `[a, h]`, sorted by expert."""
    weights = {weight.name: weight for weight in bank.weights}

    def dense(x, name):
        kernel = ops.convert_to_tensor(weights[name])
        bias = weights.get(f"{name}_bias")
        bias = None if bias is None else ops.expand_dims(bias, 1)
        return grouped_dense(x, kernel, bias, group_sizes)

    *kernels, output = kind.kernels
    hidden = kind.activation(bank, *(dense(rows, kernel) for kernel in kernels))
    return dense(hidden, output)


# The activations of experts, of the results of their first kernels.


def _mixtral(bank, gate, inner):
    return _in_float32(bank.activation, gate) * inner


def _qwen(bank, gate_and_inner):
    gate, inner = ops.split(gate_and_inner, 2, axis=-1)
    return bank.activation(gate) * inner


def _qwen3_5(bank, gate_and_inner):
    gate, inner = ops.split(gate_and_inner, 2, axis=-1)
    return _in_float32(ops.silu, gate) * inner


def _gpt_oss(bank, gate_and_inner):
    gate = ops.clip(gate_and_inner[..., ::2], -1e9, bank.limit)
    inner = ops.clip(gate_and_inner[..., 1::2], -bank.limit, bank.limit)
    return gate * ops.sigmoid(gate * bank.alpha) * (inner + 1)


def _gemma4(bank, gate, inner):
    return _in_float32(ops.gelu, gate) * inner


def _in_float32(activation, x):
    return ops.cast(activation(ops.cast(x, "float32")), x.dtype)


class Kind(NamedTuple):
    """What differs between the blocks of keras-hub's models.

    Attributes:
        call: function that replaces `call`.
        activation: function of the experts' layer and of the results of its kernels
            but the last. Returns the inputs of the last.
        kernels: the names of the experts' kernels.
    """

    call: Callable
    activation: Callable
    kernels: tuple


GATE, INNER, OUTPUT = (
    f"expert_feedforward_{name}_dense" for name in ("gate", "intermediate", "output")
)
BLOCKS = {
    "MixtralSparseMoeBlock": Kind(_call_with_logits, _mixtral, (GATE, INNER, OUTPUT)),
    "QwenSparseMoeBlock": Kind(_call_with_logits, _qwen, (GATE, OUTPUT)),
    "Qwen3SparseMoeBlock": Kind(_call_with_logits, _qwen, (GATE, OUTPUT)),
    "Qwen3_5MoeSparseMoeBlock": Kind(_call_with_logits, _qwen3_5, (GATE, OUTPUT)),
    "GptOssSparseMoeBlock": Kind(
        _call_gpt_oss, _gpt_oss, ("gate_up_proj", "down_proj")
    ),
    "Gemma4MoEBlock": Kind(
        _call_gemma4, _gemma4, ("gate_proj", "up_proj", "down_proj")
    ),
}
