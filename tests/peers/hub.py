"""keras-hub's MoE blocks, and our layer with the weights of a Qwen3-MoE block."""

import importlib

import keras
import numpy as np
from keras import ops

from keras_moe import convert, presets


def block_class(model):
    """Returns the class of the MoE block of a model, such as `"qwen3_moe"`."""
    module = importlib.import_module(f"keras_hub.src.models.{model}.{model}_decoder")
    (name,) = (name for name in vars(module) if name.endswith("SparseMoeBlock"))
    return getattr(module, name)


class Gemma4RouterAndExperts(keras.layers.Layer):
    """The router and the experts of a Gemma 4 decoder block, without its norms."""

    def __init__(self, hidden, d_ff, num_experts, k, **kwargs):
        super().__init__(**kwargs)
        moe = importlib.import_module("keras_hub.src.models.gemma4.gemma4_moe")
        dtype = self.dtype_policy
        self.moe_router = moe.Gemma4Router(
            num_experts, k, dtype=dtype, name="moe_router"
        )
        self.moe_expert_bank = moe.Gemma4MoEBlock(
            num_experts, hidden, d_ff, dtype=dtype, name="moe_expert_bank"
        )

    def build(self, input_shape):
        self.moe_router.build(input_shape)
        self.moe_expert_bank.build(input_shape)
        self.built = True

    def call(self, x):
        shape = ops.shape(x)
        rows = ops.reshape(x, (-1, shape[-1]))
        return ops.reshape(self.moe_expert_bank(rows, self.moe_router(x)), shape)


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
