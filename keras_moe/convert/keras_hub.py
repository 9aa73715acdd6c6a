"""Sparse computation of keras-hub's Mixture-of-Experts blocks.

keras-hub computes every expert for every token and multiplies most results by zero.
Here only `call` of its blocks changes. Their weights, paths and files stay the same, so
there is nothing to convert or to undo.
"""

import functools

import keras
from keras import ops

from keras_moe import losses
from keras_moe.kernels import XLA_COMPILES_ROWS, grouped_dense
from keras_moe.routing.dispatch import combine, dispatch
from keras_moe.routing.placement import assign_slots, selection_load
from keras_moe.routing.selection import top_k
from keras_moe.utils.traversal import find_layers

BLOCKS = (
    "MixtralSparseMoeBlock",
    "QwenSparseMoeBlock",
    "Qwen3SparseMoeBlock",
    "Qwen3_5MoeSparseMoeBlock",
)
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
    ordinary keras-hub model.

    Args:
        model: built keras-hub backbone or task, or any other Keras model or layer that
            contains Mixtral, Qwen-MoE, Qwen3-MoE or Qwen3.5-MoE blocks. It is changed
            in place.

    Returns:
        The model.

    Raises:
        ValueError: if there is no such block, or one is not built, is quantized, or has
            jitter, which keras-hub 0.32 cannot compute.

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
    sparse = [_sparse_call(block) for block in blocks]
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


def _sparse_call(block):
    """Returns a function that computes a block without its idle experts."""
    if not block.built:
        raise ValueError(f"{block.name} must be built: it has no weights yet.")
    layers = find_layers(block, keras.layers.Layer)
    if any(getattr(layer, "quantization_mode", None) for layer in layers):
        raise ValueError(f"{block.path} must not be quantized.")
    if getattr(block, "router_jitter_noise", 0):
        raise ValueError(
            f"{block.path} must have no jitter. Received: "
            f"router_jitter_noise={block.router_jitter_noise}."
        )
    parts = {layer.name: layer for layer in layers}
    return functools.partial(
        _call,
        block,
        gate=parts.get("sparse_feedforward_gate_dense") or parts["router_gate"],
        shared=parts.get("shared_expert_dense") or parts.get("shared_expert"),
        shared_gate=parts.get("shared_expert_gate_dense")
        or parts.get("shared_expert_gate"),
    )


def _call(
    block,
    hidden_states,
    attention_mask=None,
    training=None,
    *,
    gate,
    shared,
    shared_gate,
):
    shape = ops.shape(hidden_states)
    tokens = ops.reshape(hidden_states, (1, -1, shape[-1]))
    logits = gate(tokens)
    probs = ops.softmax(ops.cast(logits, "float32"), axis=-1)
    k, normalize = block.top_k, getattr(block, "norm_top_k_prob", True)
    selection = top_k(probs, k, normalize)
    routing = assign_slots(selection, probs, None)
    results = _experts(block.expert_bank, dispatch(tokens, routing), routing)
    outputs = combine(results, routing)
    if shared is not None:
        outputs = outputs + shared(tokens) * ops.sigmoid(shared_gate(tokens))
    if training:
        block.add_loss(_weight(block) * _balance_loss(selection, probs, attention_mask))
    logits = ops.reshape(logits, (-1, block.num_experts))
    return ops.reshape(outputs, shape), logits


def _experts(bank, rows, routing):
    """Applies the experts of a bank to rows `[a, h]`, sorted by expert."""
    kernels = {weight.name: weight for weight in bank.weights}

    def dense(x, name):
        kernel = ops.convert_to_tensor(kernels[f"expert_feedforward_{name}_dense"])
        return grouped_dense(x, kernel, None, routing.group_sizes)

    gate = dense(rows, "gate")
    if len(kernels) == 2:  # Gate and inner layer are one kernel.
        gate, inner = ops.split(gate, 2, axis=-1)
    else:
        inner = dense(rows, "intermediate")
    activation = getattr(bank, "activation", ops.silu)  # Qwen3.5 has no such attribute.
    return dense(activation(gate) * inner, "output")


def _balance_loss(selection, probs, attention_mask):
    """Balance loss of the non-padding tokens; the mask is `[b, s]` or `[b, s, s]`."""
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
