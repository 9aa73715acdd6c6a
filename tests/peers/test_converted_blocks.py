"""Weights of the original blocks, imported and exported: equal outputs."""

import hub
import keras
import numpy as np
import pytest
import torch
import transformers
from garden import pair as tfm_pair
from keras import ops
from mixture_of_experts import HeirarchicalMoE, MoE
from safetensors.numpy import load_file, save_file

import keras_moe
from keras_moe import presets
from keras_moe.convert import load_weights, to_tensors

E, H, F, K, T = 4, 8, 12, 2, 10
SMALL = {
    "vocab_size": 20,
    "hidden_size": H,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}
NARROW = {"moe_intermediate_size": F, "num_experts": E, "num_experts_per_tok": K}
SHARED = {"activation": "silu", "gated": True, "use_bias": False}


def with_shared_expert(moe, width, gate):
    return keras_moe.MoeLayerWithBackbone(moe, width, backbone_gate=gate, **SHARED)


def mixtral():
    config = transformers.MixtralConfig(
        **SMALL, intermediate_size=F, num_local_experts=E, num_experts_per_tok=K
    )
    return transformers.MixtralForCausalLM(config), presets.mixtral(E, F)


def qwen2_moe():
    config = transformers.Qwen2MoeConfig(
        **SMALL, **NARROW, shared_expert_intermediate_size=5
    )
    moe = keras_moe.MoeLayer(
        keras_moe.FeedForwardExperts(E, F, **SHARED),
        keras_moe.MaskedRouter(E, num_selected_experts=K, use_bias=False),
        train_capacity_factor=None,
        eval_capacity_factor=None,
    )
    return transformers.Qwen2MoeForCausalLM(config), with_shared_expert(moe, 5, True)


def qwen3_moe():
    config = transformers.Qwen3MoeConfig(
        **SMALL, **NARROW, head_dim=4, norm_topk_prob=True
    )
    layer = presets.qwen3_moe(E, F, num_selected_experts=K)
    return transformers.Qwen3MoeForCausalLM(config), layer


def olmoe():
    config = transformers.OlmoeConfig(
        **SMALL, intermediate_size=F, num_experts=E, num_experts_per_tok=K
    )
    layer = presets.olmoe(E, F, num_selected_experts=K)
    return transformers.OlmoeForCausalLM(config), layer


def deepseek_v3():
    config = transformers.DeepseekV3Config(
        **SMALL,
        moe_intermediate_size=F,
        n_routed_experts=E,
        num_experts_per_tok=K,
        n_group=2,
        topk_group=1,
        n_shared_experts=1,
        first_k_dense_replace=0,
        **dict.fromkeys(("q_lora_rank", "kv_lora_rank", "v_head_dim"), 4),
        **dict.fromkeys(("qk_rope_head_dim", "qk_nope_head_dim"), 4),
    )
    moe = presets.deepseek_v3(
        E, F, num_selected_experts=K, num_expert_groups=2, num_selected_groups=1
    )
    model = transformers.DeepseekV3ForCausalLM(config)
    return model, with_shared_expert(moe, F, False)


def switch():
    """Each expert has 3 slots for 10 tokens, so that some tokens are dropped."""
    config = transformers.SwitchTransformersConfig(
        vocab_size=20,
        d_model=H,
        d_kv=4,
        d_ff=F,
        num_heads=2,
        num_layers=1,
        num_sparse_encoder_layers=1,
        num_decoder_layers=1,
        num_sparse_decoder_layers=1,
        num_experts=E,
        expert_capacity=3,
    )
    layer = presets.switch(E, F, eval_capacity_factor=3 * E / T)
    return transformers.SwitchTransformersForConditionalGeneration(config), layer


# The path of the block in the model, and in its files.
HUGGING = {
    mixtral: ("model.layers.0.mlp", "model.layers.0.block_sparse_moe"),
    qwen2_moe: ("model.layers.0.mlp",) * 2,
    qwen3_moe: ("model.layers.0.mlp",) * 2,
    olmoe: ("model.layers.0.mlp",) * 2,
    deepseek_v3: ("model.layers.0.mlp",) * 2,
    switch: ("encoder.block.0.layer.1.mlp",) * 2,
}
each_hugging_face_block = pytest.mark.parametrize(
    "make", HUGGING, ids=lambda f: f.__name__
)


@pytest.fixture
def x(rng):
    return rng.normal(size=(3, T, H)).astype("float32")


def random_model(make):
    """Returns `(model, block, layer)`, with large random weights in the block."""
    model, layer = make()
    layer.build((None, T, H))
    block = model.eval().get_submodule(HUGGING[make][0])
    with torch.no_grad():
        for tensor in block.state_dict().values():
            tensor.normal_(std=tensor.shape[-1] ** -0.5)
    return model, block, layer


def check(layer, block, x):
    with torch.no_grad():
        expected = block(torch.from_numpy(x)).numpy()
    np.testing.assert_allclose(layer(x), expected, atol=1e-5)
    assert np.abs(expected).max() > 0.1


@each_hugging_face_block
def test_load_from_a_transformers_module(make, x):
    _, block, layer = random_model(make)
    load_weights(layer, block, make.__name__)
    check(layer, block, x)


@each_hugging_face_block
def test_export_to_a_transformers_module(make, x):
    _, block, layer = random_model(make)
    load_weights(layer, random_model(make)[1], make.__name__)
    tensors = to_tensors(layer, make.__name__, stacked=True)
    block.load_state_dict({n: torch.from_numpy(a) for n, a in tensors.items()})
    check(layer, block, x)


@each_hugging_face_block
def test_load_from_transformers_files(make, x, tmp_path):
    model, block, layer = random_model(make)
    model.save_pretrained(tmp_path, max_shard_size="4KB")
    prefix = HUGGING[make][1] + "."
    load_weights(layer, tmp_path, make.__name__, prefix=prefix)
    check(layer, block, x)


@each_hugging_face_block
def test_export_to_transformers_files(make, x, tmp_path):
    model, _, layer = random_model(make)
    load_weights(layer, random_model(make)[1], make.__name__)
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    ours = to_tensors(layer, make.__name__, prefix=HUGGING[make][1] + ".")
    assert ours.keys() <= tensors.keys()
    ours = {name: np.ascontiguousarray(array) for name, array in ours.items()}
    save_file(tensors | ours, tmp_path / "model.safetensors", {"format": "pt"})
    loaded = type(model).from_pretrained(tmp_path).eval()
    check(layer, loaded.get_submodule(HUGGING[make][0]), x)


def hub_qwen_moe(block_class):
    moe = qwen2_moe()[1]
    return block_class(H, F, 5, E, K, False), moe


HUB = {
    "mixtral": lambda block: (block(H, F, E, K), presets.mixtral(E, F)),
    "qwen_moe": hub_qwen_moe,
    "qwen3_moe": lambda block: (
        block(H, F, E, K, True),
        presets.qwen3_moe(E, F, num_selected_experts=K),
    ),
}


@pytest.mark.parametrize("name", HUB)
def test_keras_hub_blocks(name, x, rng):
    block, layer = HUB[name](hub.block_class(name))
    for built in (block, layer):
        built.build((None, None, H))
    for weight in block.weights:
        weight.assign(rng.normal(size=weight.shape, scale=weight.shape[-2] ** -0.5))
    load_weights(layer, block, f"keras_hub_{name}")
    expected = ops.convert_to_numpy(block(x)[0])
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


def test_a_loaded_layer_trains(x):
    """A training step changes the loaded weights."""
    _, block, layer = random_model(mixtral)
    model = keras.Sequential([keras.Input((T, H)), layer])
    load_weights(layer, block, "mixtral")
    before = to_tensors(layer, "mixtral")
    model.compile(keras.optimizers.SGD(0.1), "mse")
    model.train_on_batch(x, 2 * x)
    after = to_tensors(layer, "mixtral")
    assert not np.array_equal(before["gate.weight"], after["gate.weight"])
