"""Hugging Face's Mixtral block, and our layer with its weights."""

import torch
from transformers import MixtralConfig
from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

from keras_moe import convert, presets


def pair(num_experts, hidden, d_ff, k, implementation="eager"):
    """Returns `(block, layer)`, in float32.

    Args:
        num_experts: int.
        hidden: int.
        d_ff: int.
        k: int.
        implementation: how the block runs its experts.
    """
    config = MixtralConfig(
        hidden_size=hidden,
        intermediate_size=d_ff,
        num_local_experts=num_experts,
        num_experts_per_tok=k,
    )
    config._experts_implementation = implementation
    block = MixtralSparseMoeBlock(config)
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.normal_(std=hidden**-0.5)
    layer = presets.mixtral(
        num_experts, d_ff, num_selected_experts=k, examples_per_group=None
    )
    layer.build((None, None, hidden))
    convert.load_weights(layer, block, "mixtral")
    return block, layer


def by_path(block, get):
    """Returns `get(parameter)` of all parameters, by the paths of our weights."""
    gate, inner = get(block.experts.gate_up_proj).chunk(2, dim=1)
    parts = {
        "router/router_weights/kernel": get(block.gate.weight).T,
        "experts/gate/kernel": gate.transpose(1, 2),
        "experts/intermediate/kernel": inner.transpose(1, 2),
        "experts/output/kernel": get(block.experts.down_proj).transpose(1, 2),
    }
    return {path: part.detach().numpy() for path, part in parts.items()}
