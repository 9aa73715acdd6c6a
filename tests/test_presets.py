"""The settings of the presets, training, and saving."""

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
    presets,
)

E, H, F = 16, 6, 5

# The settings of each paper: router, k, capacity factors, gated, activation.
TABLE = {
    "switch": (MaskedRouter, 1, (1.25, 2.0), False, "relu"),
    "gshard": (Top2MaskedRouter, None, (2.0, 2.0), False, "relu"),
    "mixtral": (MaskedRouter, 2, (None, None), True, "silu"),
    "qwen3_moe": (MaskedRouter, 8, (None, None), True, "silu"),
    "olmoe": (MaskedRouter, 8, (None, None), True, "silu"),
    "deepseek_v3": (BiasBalancedMaskedRouter, 8, (None, None), True, "silu"),
    "expert_choice": (ExpertsChooseMaskedRouter, None, (2.0, 2.0), False, "gelu"),
}

each_preset = pytest.mark.parametrize("name", TABLE)


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
