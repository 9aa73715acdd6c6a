"""Checks of every router and every kind of experts, inside a model."""

import keras
import numpy as np
import pytest
from keras import ops
from layer_check import check_file, check_layer
from samples import ROUTERS, E, F, H

from keras_moe import (
    FeedForward,
    FeedForwardExperts,
    HeterogeneousExperts,
    MaskedRouter,
    MoeLayer,
    MoeLayerWithBackbone,
)


def make_moe(router, experts=None, **kwargs):
    experts = experts or FeedForwardExperts(E, F, gated=True, **kwargs)
    return MoeLayer(
        experts, router, train_capacity_factor=2.0, eval_capacity_factor=2.0, **kwargs
    )


# The most complex routers, which `make test` runs; `make test-all` runs all routers.
QUICK = "next best", "bias balanced", "top 2"
NAMES = [
    name if name in QUICK else pytest.param(name, marks=pytest.mark.thorough)
    for name in ROUTERS
]


@pytest.mark.parametrize("name", NAMES)
def test_the_layer_check(name, tmp_path):
    def make(**kwargs):
        return make_moe(ROUTERS[name](), **kwargs)

    check_layer(make, (12, H), tmp_path / "model.keras")


@pytest.mark.parametrize("name", ROUTERS)
def test_evaluation_is_deterministic(name, rng):
    x = rng.normal(size=(4, 12, H)).astype("float32")
    layer = make_moe(ROUTERS[name]())
    a, b = (ops.convert_to_numpy(layer(x)) for _ in range(2))
    np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("name", ROUTERS)
def test_a_nonfinite_token_does_not_affect_others(name, rng):
    x = rng.normal(size=(3, 8, H)).astype("float32")
    x[1, 3] = np.nan
    outputs = ops.convert_to_numpy(make_moe(ROUTERS[name]())(x))
    assert np.isfinite(np.delete(outputs.reshape(24, H), 11, axis=0)).all()


# Whether outputs are independent of later tokens, at a fixed length.
CAUSAL = {
    "switch": True,
    "token": True,
    "probability": False,
    "next best": True,
    "gumbel": True,
    "hidden layers": True,
    "experts choose": False,
    "bias balanced": False,  # k = 2, and first choices have priority
    "top 2": False,
    "options": False,
    "batch scope": False,
    "round robin": True,
    "top p": False,
    "sparse mixer": False,
}


@pytest.mark.parametrize("name", ROUTERS)
def test_causality(name, rng):
    """Changes later tokens, with a capacity so small that many tokens are dropped."""
    layer = make_moe(ROUTERS[name]())
    layer.eval_capacity_factor = 1.0
    layer.build((None, None, H))
    for w in layer.router.trainable_weights:
        w.assign(rng.normal(size=w.shape))
    changed = False
    for _ in range(10):
        x = rng.normal(size=(2, 24, H)).astype("float32")
        y = x.copy()
        y[:, 12:] = rng.normal(size=(2, 12, H))
        a, b = (ops.convert_to_numpy(layer(z))[:, :12] for z in (x, y))
        changed |= np.abs(a - b).max() > 1e-5
    assert changed is not CAUSAL[name]


def make_with_gate(**kwargs):
    moe = make_moe(MaskedRouter(E), **{"name": "moe", **kwargs})
    return MoeLayerWithBackbone(
        moe, 5, backbone_gate=True, gated=True, use_bias=False, name="both", **kwargs
    )


def test_a_gated_backbone(rng, tmp_path):
    x = rng.normal(size=(3, 8, H)).astype("float32")
    layer = make_with_gate()
    outputs = ops.convert_to_numpy(layer(x))
    (kernel,) = layer.backbone_gate_layer.get_weights()
    gate = 1 / (1 + np.exp(-(x @ kernel)))
    backbone, moe = (
        ops.convert_to_numpy(part(x)) for part in (layer.backbone, layer.moe)
    )
    np.testing.assert_allclose(outputs, gate * backbone + moe, atol=1e-5)
    assert "both/backbone_gate/kernel" in [w.path for w in layer.weights]
    check_file(make_with_gate, (8, H), tmp_path / "model.keras")


def test_heterogeneous_experts_in_a_layer(tmp_path):
    def make(**kwargs):
        experts = [keras.layers.Dense(H), *(FeedForward(f) for f in (3, 5, 7))]
        return make_moe(MaskedRouter(E), HeterogeneousExperts(experts), **kwargs)

    check_file(make, (12, H), tmp_path / "model.keras")
