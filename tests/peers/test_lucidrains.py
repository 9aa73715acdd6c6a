"""Parity with `mixture_of_experts.MoE` (PyTorch) on equal weights."""

import keras
import numpy as np
import pytest
import torch
from mixture_of_experts import HeirarchicalMoE, MoE

from keras_moe import (
    FeedForwardExperts,
    HierarchicalMoeLayer,
    MoeLayer,
    Top2MaskedRouter,
)

H, E, F = 8, 4, 16


def make_pair(policy, threshold=0.2, train=1.25, evaluation=2.0):
    theirs = MoE(
        H,
        num_experts=E,
        hidden_dim=F,
        second_policy_train=policy,
        second_policy_eval=policy,
        capacity_factor_train=train,
        capacity_factor_eval=evaluation,
        loss_coef=1e-2,
    )
    with torch.no_grad():
        # They start at nearly nothing.
        theirs.experts.w1.normal_()
        theirs.experts.w2.normal_()
    ours = MoeLayer(
        FeedForwardExperts(E, F, activation="relu", use_bias=False),
        Top2MaskedRouter(
            E,
            use_bias=False,
            second_policy_train=policy,
            second_policy_eval=policy,
            second_threshold_train=threshold,
            second_threshold_eval=threshold,
        ),
        train_capacity_factor=train,
        eval_capacity_factor=evaluation,
        min_expert_capacity=4,
        name="moe",
    )
    ours.build((None, None, H))
    weights = {
        "moe/router/router_weights/kernel": theirs.gate.w_gating,
        "moe/experts/intermediate/kernel": theirs.experts.w1,
        "moe/experts/output/kernel": theirs.experts.w2,
    }
    take_over(ours, weights)
    return ours, theirs


def take_over(layer, weights):
    """Gives a layer their weights, by path."""
    for w in layer.weights:
        w.assign(weights[w.path].detach().numpy())


def check_outputs_and_loss(ours, theirs, length, training):
    x = np.random.default_rng(0).normal(size=(3, length, H)).astype("float32")
    expected, loss = theirs.train(training)(torch.from_numpy(x))
    outputs = keras.ops.convert_to_numpy(ours(x, training=training))
    expected = expected.detach().numpy()
    scale = np.abs(expected).max()
    np.testing.assert_allclose(outputs / scale, expected / scale, atol=1e-5)
    found = sum(float(a) for a in ours.losses)
    assert found == pytest.approx(float(loss.detach()), rel=1e-6)


@pytest.mark.parametrize("policy", ["all", "none"])
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(("length", "train"), [(16, 1.25), (32, 0.5), (8, 1.0)])
def test_outputs_and_loss(policy, training, length, train):
    torch.manual_seed(0)
    ours, theirs = make_pair(policy, train=train)
    check_outputs_and_loss(ours, theirs, length, training)


@pytest.mark.parametrize("threshold", [0.1, 0.3, 0.45])
def test_a_corrected_threshold(threshold):
    """Where nothing overflows, a threshold drops the second choices below it.

    Their `threshold` policy crashes for a missing axis, so this is put together
    from their `all` and `none`: token by token the one or the other.
    """
    torch.manual_seed(0)
    x = np.random.default_rng(0).normal(size=(3, 16, H)).astype("float32")
    results = {}
    ours, theirs = make_pair("threshold", threshold, evaluation=4.0)
    for policy in ("all", "none"):
        theirs.gate.second_policy_eval = policy
        results[policy] = theirs.eval()(torch.from_numpy(x))[0].detach().numpy()
    probs = torch.softmax(torch.from_numpy(x) @ theirs.gate.w_gating, dim=-1)
    best = probs.topk(2).values.detach().numpy()
    keeps = best[..., 1] / best.sum(-1) > threshold
    assert keeps.any() and not keeps.all()
    expected = np.where(keeps[..., None], results["all"], results["none"])
    outputs = keras.ops.convert_to_numpy(ours(x))
    scale = np.abs(expected).max()
    np.testing.assert_allclose(outputs / scale, expected / scale, atol=1e-5)


@pytest.mark.parametrize("policy", ["all", "none"])
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(("outer", "inner"), [(4, 2), (2, 4)])
def test_two_levels(policy, training, outer, inner):
    torch.manual_seed(0)
    theirs = HeirarchicalMoE(
        H,
        num_experts=(outer, inner),
        hidden_dim=F,
        second_policy_train=policy,
        second_policy_eval=policy,
        capacity_factor_train=1.0,
        capacity_factor_eval=2.0,
        loss_coef=1e-2,
    )
    with torch.no_grad():
        theirs.experts.w1.normal_()
        theirs.experts.w2.normal_()

    def top2(num_experts, name):
        return Top2MaskedRouter(
            num_experts,
            use_bias=False,
            second_policy_train=policy,
            second_policy_eval=policy,
            name=name,
        )

    ours = HierarchicalMoeLayer(
        FeedForwardExperts(outer * inner, F, activation="relu", use_bias=False),
        top2(outer, "outer"),
        top2(inner, "inner"),
        train_capacity_factor=1.0,
        name="moe",
    )
    ours.build((None, None, H))
    weights = {
        "moe/outer/router_weights/kernel": theirs.gate_outer.w_gating,
        "moe/inner/router_weights/kernel": theirs.gate_inner.w_gating,
        "moe/experts/intermediate/kernel": theirs.experts.w1.reshape(-1, H, F),
        "moe/experts/output/kernel": theirs.experts.w2.reshape(-1, F, H),
    }
    take_over(ours, weights)
    check_outputs_and_loss(ours, theirs, 64, training)
