"""keras-hub's Qwen3-MoE block, and our layer with its weights.

The block's module is imported without the packages that hold it: their
`__init__` would import all of keras-hub, with dependencies that the MoE blocks
do not use.
"""

import importlib
import importlib.metadata
import sys
import types

import numpy as np
from keras import ops
from weights import take_over

from keras_moe import presets

MODELS = "keras_hub.src.models"
OTHERS = "keras_hub.src.layers.modeling", "keras_hub.src.utils"


def block_class(model):
    """The block of `"mixtral"`, `"qwen_moe"` or `"qwen3_moe"`."""
    root = importlib.metadata.distribution("keras-hub").locate_file("")
    for name in (f"{MODELS}.{model}", *OTHERS):
        while name:
            package = sys.modules.setdefault(name, types.ModuleType(name))
            package.__path__ = [str(root / name.replace(".", "/"))]
            name = name.rpartition(".")[0]
    module = importlib.import_module(f"{MODELS}.{model}.{model}_decoder")
    prefix = model.removesuffix("_moe").capitalize()
    return getattr(module, f"{prefix}SparseMoeBlock")


def pair(num_experts, hidden, d_ff, k):
    """`(block, layer)`, where the block's balance loss has weight 1."""
    block = block_class("qwen3_moe")(
        hidden, d_ff, num_experts, k, True, router_aux_loss_coefficient=1.0
    )
    block.build((None, None, hidden))
    layer = presets.qwen3_moe(
        num_experts, d_ff, num_selected_experts=k, examples_per_group=None
    )
    layer.build((None, None, hidden))
    arrays = [ops.convert_to_numpy(w) for w in block.trainable_variables]
    take_over(layer, by_path(arrays))
    return block, layer


def by_path(arrays):
    """The block's weights, or their gradients, by the paths of our weights."""
    router, gate_and_inner, output = arrays
    # The kernels of gate and inner layer lie side by side.
    gate, inner = np.split(gate_and_inner, 2, axis=-1)
    return {
        "router/router_weights/kernel": router,
        "experts/gate/kernel": gate,
        "experts/intermediate/kernel": inner,
        "experts/output/kernel": output,
    }
