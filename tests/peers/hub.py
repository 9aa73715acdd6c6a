"""keras-hub's MoE blocks, and our layer with the weights of a Qwen3-MoE block."""

import importlib

import numpy as np

from keras_moe import convert, presets


def block_class(model):
    """Returns the class of the MoE block of a model, such as `"qwen3_moe"`."""
    module = importlib.import_module(f"keras_hub.src.models.{model}.{model}_decoder")
    (name,) = (name for name in vars(module) if name.endswith("SparseMoeBlock"))
    return getattr(module, name)


def pair(num_experts, hidden, d_ff, k):
    """Returns `(block, layer)`; the block's balance loss has weight 1."""
    block = block_class("qwen3_moe")(
        hidden, d_ff, num_experts, k, True, router_aux_loss_coefficient=1.0
    )
    block.build((None, None, hidden))
    layer = presets.qwen3_moe(
        num_experts, d_ff, num_selected_experts=k, examples_per_group=None
    )
    layer.build((None, None, hidden))
    convert.load_weights(layer, block, "keras_hub_qwen3_moe")
    return block, layer


def by_path(arrays):
    """Returns the gradients of the block's weights by the paths of our weights."""
    router, gate_and_inner, output = arrays
    # The block concatenates the kernels of the gate and of the inner layer.
    gate, inner = np.split(gate_and_inner, 2, axis=-1)
    return {
        "router/router_weights/kernel": router,
        "experts/gate/kernel": gate,
        "experts/intermediate/kernel": inner,
        "experts/output/kernel": output,
    }
