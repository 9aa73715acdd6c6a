import numpy as np
import pytest
from gradients import gradients
from keras import ops

from keras_moe.losses import importance_loss, load_balancing_loss, router_z_loss


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
