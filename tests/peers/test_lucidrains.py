"""Parity with `mixture_of_experts.MoE` (PyTorch) on equal weights."""

import keras
import numpy as np
import pytest
import torch
from lucidrains import enlarge_weights, pair
from mixture_of_experts import HeirarchicalMoE

from keras_moe import FeedForwardExperts, HierarchicalMoeLayer, Top2MaskedRouter
from keras_moe.convert import load_weights

H, E, F = 8, 4, 16


def make_pair(policy, **kwargs):
    return pair(E, H, F, policy, **kwargs)


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
    theirs, ours = make_pair(policy, train=train)
    check_outputs_and_loss(ours, theirs, length, training)


@pytest.mark.parametrize("threshold", [0.1, 0.3, 0.45])
def test_threshold_policy(threshold):
    """Where nothing overflows, a threshold drops the second choices below it.

    Their `threshold` policy crashes because of a missing axis, so the expected
    outputs are those of their `all` or `none` policy, token by token.
    """
    torch.manual_seed(0)
    x = np.random.default_rng(0).normal(size=(3, 16, H)).astype("float32")
    results = {}
    theirs, ours = make_pair("threshold", threshold=threshold, evaluation=4.0)
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
def test_hierarchical_layers(policy, training, outer, inner):
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
    enlarge_weights(theirs.experts)

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
    load_weights(ours, theirs, "lucidrains")
    check_outputs_and_loss(ours, theirs, 64, training)
