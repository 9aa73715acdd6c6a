"""The settings of the presets, training, and saving."""

import inspect

import keras
import numpy as np
import pytest
from keras import ops
from layer_check import check_file, check_step, functional

from keras_moe import (
    BiasBalancedMaskedRouter,
    ExpertsChooseMaskedRouter,
    MaskedRouter,
    MoeLayer,
    MoeLayerWithBackbone,
    Top2MaskedRouter,
    convert,
    presets,
)
from keras_moe.activations import clamped_swiglu

E, H, F = 16, 6, 5

# The settings of each paper: router, k, capacity factors, gated, activation.
TABLE = {
    "switch": (MaskedRouter, 1, (1.25, 2.0), False, "relu"),
    "gshard": (Top2MaskedRouter, None, (2.0, 2.0), False, "relu"),
    "mixtral": (MaskedRouter, 2, (None, None), True, "silu"),
    "qwen3_moe": (MaskedRouter, 8, (None, None), True, "silu"),
    "olmoe": (MaskedRouter, 8, (None, None), True, "silu"),
    "deepseek_v3": (BiasBalancedMaskedRouter, 8, (None, None), True, "silu"),
    "minimax_m2": (BiasBalancedMaskedRouter, 8, (None, None), True, "silu"),
    "granite": (MaskedRouter, 8, (None, None), True, "silu"),
    "expert_choice": (ExpertsChooseMaskedRouter, None, (2.0, 2.0), False, "gelu"),
}
# Of those with a shared expert: its size over `d_ff`, and the scaling of the weights.
SHARED = {
    "qwen2_moe": (4, 1.0),
    "deepseek_v2": (2, 16.0),
    "glm4_moe": (1, 1.0),
    "kimi_k2": (1, 2.827),
    "ernie4_5": (2, 1.0),
    "llama4": (1, 1.0),
}

each_preset = pytest.mark.parametrize("name", TABLE)


def test_every_preset_is_in_a_table():
    found = {n for n, f in vars(presets).items() if inspect.isfunction(f)}
    found = {n for n in found if n[0] != "_" and n not in ("clamped_swiglu",)}
    assert found == {*TABLE, *SHARED, "gpt_oss"}


@pytest.mark.parametrize("name", SHARED)
def test_presets_with_a_shared_expert(name):
    layer = make(name, name="mine", dtype="mixed_bfloat16")
    times, scaling = SHARED[name]
    assert type(layer) is MoeLayerWithBackbone
    assert layer.backbone_d_ff == times * F
    assert layer.moe.router.routed_scaling_factor == scaling
    assert layer.name == "mine"
    parts = (layer, layer.moe, layer.moe.experts, layer.backbone)
    assert {part.compute_dtype for part in parts} == {"bfloat16"}
    assert make(name, shared_d_ff=3).backbone_d_ff == 3


# The format of each preset, whose settings it must have.
@pytest.mark.parametrize(
    ("name", "format"),
    [
        *((name, name) for name in ("mixtral", "switch", "qwen3_moe", "olmoe")),
        *((name, name) for name in ("deepseek_v3", "deepseek_v2", "glm4_moe")),
        *((name, name) for name in ("kimi_k2", "minimax_m2", "gpt_oss", "llama4")),
        ("granite", "granitemoe"),
        ("ernie4_5", "ernie4_5_moe"),
    ],
)
def test_presets_fit_the_formats_of_their_models(name, format):
    layer, other = make(name), make(name)
    for built in (layer, other):
        built.build((None, 12, H))
    convert.load_weights(other, convert.to_tensors(layer, format), format)
    x = np.random.default_rng(0).normal(size=(2, 12, H)).astype("float32")
    np.testing.assert_array_equal(*map(ops.convert_to_numpy, (layer(x), other(x))))


def test_the_experts_of_gpt_oss():
    layer = make("gpt_oss")
    assert layer.experts.activation is clamped_swiglu
    assert layer.router.use_bias and layer.experts.use_bias
    assert layer.router.normalize_weights
    assert make("llama4").moe.weighted_inputs
    assert make("deepseek_v2").moe.router.group_score_experts == 1


def make(preset, **kwargs):
    return getattr(presets, preset)(E, F, **kwargs)


@each_preset
def test_presets_have_the_settings_of_their_papers(name):
    layer = make(name)
    router, k, factors, gated, activation = TABLE[name]
    assert type(layer) is MoeLayer
    assert type(layer.router) is router
    assert getattr(layer.router, "num_selected_experts", None) == k
    assert (layer.train_capacity_factor, layer.eval_capacity_factor) == factors
    assert layer.experts.gated is gated
    assert keras.activations.serialize(layer.experts.activation) == activation
    assert not layer.router.use_bias


@each_preset
def test_arguments_of_the_router_and_of_the_experts(name):
    layer = make(
        name,
        router_kwargs={"export_metrics": (), "use_bias": True},
        experts_kwargs={"remat": True, "activation": "tanh"},
    )
    assert layer.router.export_metrics == () and layer.router.use_bias
    assert layer.experts.remat
    assert layer.experts.activation is keras.activations.tanh


# The others differ only in arguments, which the tests of layers and routers cover.
@pytest.mark.parametrize("name", ["deepseek_v3", "qwen2_moe"])
def test_training_and_saving(name, tmp_path):
    check_file(lambda: make(name), (12, H), tmp_path / "model.keras")


@each_preset
def test_arguments_override_the_preset(name):
    layer = make(name, train_capacity_factor=9.0, examples_per_group=None, name="mine")
    assert layer.train_capacity_factor == 9.0
    assert layer.examples_per_group is None
    assert layer.name == "mine"


def test_the_dtype_applies_to_all_parts():
    layer = make("mixtral", dtype="mixed_bfloat16")
    x = np.random.default_rng(0).normal(size=(2, 12, H)).astype("float32")
    assert keras.backend.standardize_dtype(layer(x).dtype) == "bfloat16"
    assert layer.experts.compute_dtype == "bfloat16"
    check_step(functional(layer, (12, H)), x)


def test_mixtral_matches_a_loop(rng):
    x = rng.normal(size=(2, 5, H)).astype("float32")
    layer = presets.mixtral(E, F)
    found = ops.convert_to_numpy(layer(x))
    w = {w.path.split("/", 1)[1]: w.numpy() for w in layer.weights}
    logits = x @ w["router/router_weights/kernel"]
    for i, j in np.ndindex(2, 5):
        selected = np.argsort(-logits[i, j])[:2]
        exps = np.exp(logits[i, j][selected])
        expected = 0
        for expert, weight in zip(selected, exps / exps.sum(), strict=True):
            gate = x[i, j] @ w["experts/gate/kernel"][expert]
            inner = x[i, j] @ w["experts/intermediate/kernel"][expert]
            inner = gate / (1 + np.exp(-gate)) * inner
            expected += weight * (inner @ w["experts/output/kernel"][expert])
        np.testing.assert_allclose(found[i, j], expected, atol=1e-6)


def test_deepseek_experts_must_be_divisible_into_groups():
    with pytest.raises(ValueError, match="num_expert_groups"):
        presets.deepseek_v3(9, F)


def test_qwen2_has_a_gated_shared_expert(rng):
    layer = presets.qwen2_moe(E, F, name="mine", dtype="float32")
    assert isinstance(layer, MoeLayerWithBackbone) and layer.name == "mine"
    assert layer.backbone_gate and layer.backbone_d_ff == 4 * F
    router = layer.moe.router
    assert (router.num_selected_experts, router.normalize_weights) == (4, False)
    assert router.load_balancing_loss_weight == pytest.approx(0.004)
    x = rng.normal(size=(2, 5, H)).astype("float32")
    assert layer(x).shape == x.shape
    assert presets.qwen2_moe(E, F, shared_d_ff=3).backbone_d_ff == 3
