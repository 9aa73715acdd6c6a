import math

import numpy as np
import pytest
from gradients import gradients
from keras import ops

from keras_moe.losses import (
    importance_loss,
    load_balancing_loss,
    load_loss,
    router_entropy_loss,
    router_z_loss,
)


def balance(probs, load, **kwargs):
    return float(
        load_balancing_loss(
            ops.convert_to_tensor(np.array(probs, "float32")),
            ops.convert_to_tensor(np.array(load, "float32")),
            **kwargs,
        )
    )


def test_balance_loss_is_1_at_balance():
    assert balance(np.full((2, 6, 4), 0.25), np.full((2, 4), 0.25)) == 1.0


def test_balance_loss_is_e_if_all_tokens_select_one_expert():
    probs = np.zeros((1, 6, 4))
    probs[..., 2] = 1
    assert balance(probs, [[0, 0, 1, 0]]) == 4.0


def test_balance_loss_is_0_without_tokens():
    assert balance(np.zeros((1, 6, 4)), np.zeros((1, 4))) == 0.0


def test_groups_are_weighted_by_their_valid_tokens():
    # A collapsed group of three tokens, and a balanced group of one token.
    probs = [[[1, 0], [1, 0], [1, 0]], [[0.5, 0.5], [0, 0], [0, 0]]]
    load = [[1, 0], [0.5, 0.5]]
    assert balance(probs, load) == pytest.approx((3 * 2 + 1 * 1) / 4)


def test_the_balance_loss_has_a_gradient_by_the_probabilities_only():
    probs = np.full((1, 4, 2), 0.5, "float32")
    load = np.array([[0.75, 0.25]], "float32")
    found, load_gradient = gradients(load_balancing_loss, probs, load)
    expected = np.tile(2 * load[0] / 4, (4, 1))[None]
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    assert not load_gradient.any()


def test_z_loss():
    logits = ops.convert_to_tensor(np.log([[[1.0, 1.0], [2.0, 6.0]]]).astype("float32"))
    expected = (np.log(2) ** 2 + np.log(8) ** 2) / 2
    assert float(router_z_loss(logits)) == pytest.approx(expected)
    mask = ops.convert_to_tensor(np.array([[True, False]]))
    assert float(router_z_loss(logits, mask)) == pytest.approx(np.log(2) ** 2)
    all_masked = ops.convert_to_tensor(np.array([[False, False]]))
    assert float(router_z_loss(logits, all_masked)) == 0.0


def test_the_balance_loss_over_the_batch():
    probs = [[[1, 0], [1, 0]], [[0, 1], [0, 1]]]
    load = [[1, 0], [0, 1]]
    assert balance(probs, load) == 2.0
    assert balance(probs, load, per_group=False) == 1.0
    # Weighted by tokens: three of four select the first expert.
    probs = [[[1, 0], [1, 0], [1, 0]], [[0, 1], [0, 0], [0, 0]]]
    together = balance(probs, load, per_group=False)
    assert together == pytest.approx(2 * (0.75**2 + 0.25**2))


def test_importance_loss():
    def loss(probs):
        return float(importance_loss(ops.convert_to_tensor(np.array(probs, "float32"))))

    assert loss(np.full((2, 3, 4), 0.25)) == 0
    collapsed = np.zeros((2, 3, 4))
    collapsed[..., 1] = 1
    assert loss(collapsed) == pytest.approx(3)
    assert loss(np.zeros((2, 3, 4))) == 0
    # Importances 3 and 1: mean 2, variance 1.
    assert loss([[[1, 0], [1, 0], [1, 0], [0, 1]]]) == pytest.approx(1 / 4)


@pytest.mark.parametrize("k", [1, 3])
def test_load_loss_by_loops(k, rng):
    logits = rng.normal(size=(2, 5, 4)).astype("float32")
    std = rng.uniform(0.5, 2, size=(2, 5, 4)).astype("float32")
    noisy = logits + std * rng.normal(size=(2, 5, 4)).astype("float32")
    mask = rng.random((2, 5)) < 0.7
    loads = np.zeros(4)
    for g, t in np.argwhere(mask):
        for i in range(4):
            others = sorted(np.delete(noisy[g, t], i), reverse=True)
            normal = (logits[g, t, i] - others[k - 1]) / std[g, t, i]
            loads[i] += 0.5 * (1 + math.erf(normal / math.sqrt(2)))
    expected = loads.var() / loads.mean() ** 2
    logits, noisy, std = map(ops.convert_to_tensor, (logits, noisy, std))
    found = load_loss(logits, noisy, std, k, mask=mask)
    assert float(found) == pytest.approx(expected, rel=1e-4)
    assert float(load_loss(logits, noisy, std, k, mask=mask & False)) == 0


def test_the_load_loss_is_0_at_balance_and_has_a_gradient():
    equal = np.zeros((1, 4, 4), "float32")
    noisy = np.array([np.roll([3.0, 2, 1, 0], i) for i in range(4)], "float32")[None]
    noisy = ops.convert_to_tensor(noisy)
    found = load_loss(ops.convert_to_tensor(equal), noisy, 1.0, 2)
    assert float(found) == pytest.approx(0, abs=1e-6)
    larger = equal + np.array([0.5, 0, 0, 0], "float32")
    (slope,) = gradients(lambda x: load_loss(x, noisy, 1.0, 2), larger)
    # A larger logit of the first expert makes the load less equal.
    assert (slope[..., 0] > 0).all()
    with pytest.raises(ValueError, match="num_selected_experts"):
        load_loss(equal, noisy, 1.0, 4)


def test_the_entropy_loss():
    def loss(probs):
        return float(
            router_entropy_loss(ops.convert_to_tensor(np.array(probs, "float32")))
        )

    assert loss([[[0.25] * 4, [1, 0, 0, 0]]]) == pytest.approx(np.log(4) / 2)
    assert loss([[[0.25] * 4, [0, 0, 0, 0]]]) == pytest.approx(np.log(4))
    assert loss(np.zeros((1, 2, 4))) == 0
