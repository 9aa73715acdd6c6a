"""Weights of other packages' blocks, imported and exported: equal outputs."""

import hub
import numpy as np
import pytest
import torch
from garden import pair as tfm_pair
from keras import ops
from mixture_of_experts import HeirarchicalMoE, MoE

import keras_moe
from keras_moe import presets
from keras_moe.convert import load_weights, to_tensors

E, H, F, K, T = 4, 8, 12, 2, 10
SHARED = {"activation": "silu", "gated": True, "use_bias": False}


@pytest.fixture
def x(rng):
    return rng.normal(size=(3, T, H)).astype("float32")


def with_shared_expert(normalize):
    moe = keras_moe.MoeLayer(
        keras_moe.FeedForwardExperts(E, F, **SHARED),
        keras_moe.MaskedRouter(
            E, num_selected_experts=K, normalize_weights=normalize, use_bias=False
        ),
        train_capacity_factor=None,
        eval_capacity_factor=None,
    )
    return keras_moe.MoeLayerWithBackbone(moe, 5, backbone_gate=True, **SHARED)


def of_family(name):
    return keras_moe.convert.layer_from_config(
        {
            "model_type": name,
            "hidden_size": H,
            **dict.fromkeys(("intermediate_size", "moe_intermediate_size"), F),
            **dict.fromkeys(("num_local_experts", "num_experts"), E),
            **dict.fromkeys(("num_experts_per_tok", "top_k_experts"), K),
            "enable_moe_block": True,
        }
    )


# The arguments of a block of keras-hub, and the layer.
HUB = {
    "mixtral": ((H, F, E, K), lambda: presets.mixtral(E, F)),
    "qwen_moe": ((H, F, 5, E, K, False), lambda: with_shared_expert(False)),
    "qwen3_moe": (
        (H, F, E, K, True),
        lambda: presets.qwen3_moe(E, F, num_selected_experts=K),
    ),
    "qwen3_5_moe": ((H, F, 5, E, K), lambda: with_shared_expert(True)),
    "gpt_oss": ((H, F, E, K), lambda: of_family("gpt_oss")),
    "gemma4": ((H, F, E, K), lambda: of_family("gemma4")),
}


@pytest.mark.parametrize("name", HUB)
def test_keras_hub_blocks(name, x, rng):
    arguments, make = HUB[name]
    is_gemma = name == "gemma4"
    block = hub.Gemma4RouterAndExperts if is_gemma else hub.block_class(name)
    block, layer = block(*arguments), make()
    for built in (block, layer):
        built.build((None, None, H))
    for weight in block.weights:
        weight.assign(rng.normal(size=weight.shape, scale=H**-0.5))
    load_weights(layer, block, f"keras_hub_{name}")
    expected = block(x) if is_gemma else block(x)[0]
    expected = ops.convert_to_numpy(expected)
    np.testing.assert_allclose(layer(x), expected, atol=1e-5)
    exported = to_tensors(layer, f"keras_hub_{name}")
    for weight in block.weights:
        found = exported[weight.path.partition(f"{block.name}/")[2] or weight.path]
        np.testing.assert_array_equal(found, ops.convert_to_numpy(weight))


@pytest.mark.parametrize("backbone", [None, 5])
def test_tfm_layers(backbone, x):
    theirs, ours = tfm_pair(E, H, F, 1.0, 1.0, backbone=backbone)
    for weight in ours.weights:
        weight.assign(ops.zeros_like(weight))
    load_weights(ours, theirs, "tfm")
    np.testing.assert_allclose(ours(x), theirs(x), atol=1e-5)
    prefix = theirs.name + "/"
    by_name = {w.name.split(":")[0]: w.numpy() for w in theirs.trainable_weights}
    exported = to_tensors(ours, "tfm", prefix=prefix)
    assert exported.keys() == by_name.keys()
    for name, array in exported.items():
        np.testing.assert_array_equal(array, by_name[name])
    load_weights(ours, by_name, "tfm", prefix=prefix)


POLICY = {"second_policy_train": "all", "second_policy_eval": "all"}


@pytest.mark.parametrize("levels", [None, (2, 4)])
def test_lucidrains_layers(levels, rng):
    def top2(num_experts, name):
        return keras_moe.Top2MaskedRouter(
            num_experts, use_bias=False, name=name, **POLICY
        )

    def experts(n):
        return keras_moe.FeedForwardExperts(n, F, activation="relu", use_bias=False)

    if levels:
        theirs = HeirarchicalMoE(H, num_experts=levels, hidden_dim=F, **POLICY)
        outer, inner = levels
        routers = (top2(outer, "outer"), top2(inner, "inner"))
        ours = keras_moe.HierarchicalMoeLayer(experts(outer * inner), *routers)
    else:
        theirs = MoE(H, num_experts=E, hidden_dim=F, **POLICY)
        ours = keras_moe.MoeLayer(
            experts(E),
            top2(E, "router"),
            train_capacity_factor=1.25,
            eval_capacity_factor=2.0,
            min_expert_capacity=4,
        )
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.normal_(std=H**-0.5)
    ours.build((None, None, H))
    load_weights(ours, theirs, "lucidrains")
    x = rng.normal(size=(3, 64, H)).astype("float32")
    expected = theirs.eval()(torch.from_numpy(x))[0].detach().numpy()
    np.testing.assert_allclose(ours(x), expected, atol=1e-5)
    exported = to_tensors(ours, "lucidrains")
    theirs.load_state_dict({n: torch.from_numpy(a.copy()) for n, a in exported.items()})
    loaded = theirs(torch.from_numpy(x))[0].detach().numpy()
    np.testing.assert_array_equal(loaded, expected)
