"""The options of top-k routers that models vary, each alone, against tables."""

import numpy as np
import pytest
from gradients import gradients
from keras import ops

import keras_moe
from keras_moe import BiasBalancedMaskedRouter, Gate, MaskedRouter, SparseMixerRouter

# Two tokens and four experts, in two groups.
PROBS = np.array([[[0.4, 0.1, 0.2, 0.3], [0.1, 0.35, 0.35, 0.2]]], "float32")
both = pytest.mark.parametrize("make", [MaskedRouter, BiasBalancedMaskedRouter])


def weights_of(router, probs=PROBS, **kwargs):
    """Returns the combine weights `[t, e]`, 0 for an expert that is not selected."""
    if not router.built:
        router.build((None, None, 5))
    slots = router.compute_routing(ops.convert_to_tensor(probs), 2, **kwargs)
    return ops.convert_to_numpy(slots.combine_array).sum(axis=(0, 3))


def check(router, expected, **kwargs):
    np.testing.assert_allclose(weights_of(router, **kwargs), expected, atol=1e-6)


@both
def test_normalization(make):
    def router(**kwargs):
        return make(4, num_selected_experts=2, mechanism="softmax", **kwargs)

    check(router(normalize_weights=False), [[0.4, 0, 0, 0.3], [0, 0.35, 0.35, 0]])
    check(router(normalize_weights=True), [[4 / 7, 0, 0, 3 / 7], [0, 0.5, 0.5, 0]])
    check(
        router(normalize_weights=True, normalization_epsilon=0.3),
        [[0.4, 0, 0, 0.3], [0, 0.35, 0.35, 0]],
    )
    check(
        router(normalize_weights=False, routed_scaling_factor=2.0),
        [[0.8, 0, 0, 0.6], [0, 0.7, 0.7, 0]],
    )


def test_normalization_by_default():
    """A single weight that is divided by itself has no gradient."""
    assert not BiasBalancedMaskedRouter(4).normalize_weights
    assert BiasBalancedMaskedRouter(4, num_selected_experts=2).normalize_weights


@both
def test_groups_by_their_best_experts(make):
    """The first token's groups have sums of 0.5 and 0.5, and maxima of 0.4 and 0.3."""

    def router(best, **kwargs):
        return make(
            4,
            num_selected_experts=2,
            normalize_weights=False,
            num_expert_groups=2,
            group_score_experts=best,
            **kwargs,
        )

    probs = PROBS + np.array([0, 0, 0.01, 0], "float32")
    check(router(1), [[0.4, 0.1, 0, 0], [0, 0, 0.36, 0.2]], probs=probs)
    check(router(2), [[0, 0, 0.21, 0.3], [0, 0, 0.36, 0.2]], probs=probs)
    check(router(9), [[0, 0, 0.21, 0.3], [0, 0, 0.36, 0.2]], probs=probs)


@both
def test_a_scale_for_each_expert(make):
    router = make(
        4, num_selected_experts=2, normalize_weights=True, use_expert_scale=True
    )
    check(router, [[4 / 7, 0, 0, 3 / 7], [0, 0.5, 0.5, 0]])
    router.expert_scale.assign([1.0, 2.0, 4.0, 7.0])
    check(router, [[4 / 7, 0, 0, 3], [0, 1, 2, 0]])
    assert router.expert_scale.trainable
    masked = np.zeros_like(PROBS)
    check(router, np.zeros((2, 4)), probs=masked)


@both
def test_the_next_best_expert_has_the_options(make):
    """Expert 0 has no room for the second token, which takes its next best one."""
    router = make(
        4,
        num_selected_experts=1,
        normalize_weights=False,
        routed_scaling_factor=2.0,
        priority="token",
        overflow="next_best",
        num_expert_groups=2,
    )
    router.build((None, None, 5))
    probs = ops.convert_to_tensor([[[0.6, 0.2, 0.1, 0.1], [0.5, 0.2, 0.1, 0.2]]])
    slots = router.compute_routing(probs, 1)
    found = ops.convert_to_numpy(slots.combine_array).sum(axis=(0, 3))
    np.testing.assert_allclose(found, [[1.2, 0, 0, 0], [0, 0.4, 0, 0]], atol=1e-6)


def test_the_bias_changes_only_the_selection():
    router = BiasBalancedMaskedRouter(
        4, num_selected_experts=2, mechanism="softmax", normalize_weights=False
    )
    router.build((None, None, 5))
    router.expert_bias.assign([-0.3, 0.3, 0.0, 0.0])
    check(router, [[0, 0.1, 0, 0.3], [0, 0.35, 0.35, 0]])


def test_the_root_of_the_softplus():
    """Also where the softplus is 0 in float32, with finite gradients."""
    gate = Gate(3, mechanism="sqrt_softplus", use_bias=False, kernel_initializer="ones")
    x = np.array([[[0.0], [2.0], [-200.0], [100.0]]], "float32")
    found = ops.convert_to_numpy(gate(x))[0, :, 0]
    expected = np.sqrt(np.log1p(np.exp([0.0, 2.0])))
    np.testing.assert_allclose(found[:2], expected, rtol=1e-6)
    np.testing.assert_allclose(found[2:], [0, 10], atol=1e-6)
    (gradient,) = gradients(lambda x: ops.sum(gate(x)), x)
    assert np.isfinite(gradient).all()
    assert gradient[0, 0, 0] > 0


def test_normalized_inputs_of_a_gate(rng):
    gate = Gate(3, input_norm_epsilon=1e-3)
    gate.build((None, None, 5))
    x = rng.normal(size=(2, 4, 5), scale=3).astype("float32")
    scale = rng.normal(size=5).astype("float32")
    gate.input_scale.assign(scale)
    rms = np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + 1e-3)
    expected = x / rms * scale / np.sqrt(5) @ ops.convert_to_numpy(gate.kernel)
    _, logits = gate(x, return_logits=True)
    np.testing.assert_allclose(ops.convert_to_numpy(logits), expected, atol=1e-6)


def sparse_mixer(logits, threshold, k):
    """A loop over the experts: the weights `[e]` of one token in inference."""
    weights, chosen = np.zeros(len(logits)), []
    for _ in range(k):
        rest = {e: v for e, v in enumerate(logits) if e not in chosen}
        largest = max(rest.values())
        close = {
            e: np.exp(v)
            for e, v in rest.items()
            if largest - v <= threshold * max(abs(v), largest)
        }
        best = max(close, key=close.get)
        weights[best] = close[best] / sum(close.values())
        chosen.append(best)
    return weights


@pytest.mark.parametrize("threshold", [0.0, 0.3, 5.0])
def test_sparse_mixer_in_inference(threshold, rng):
    router = SparseMixerRouter(
        4, sparsity_threshold=threshold, use_bias=False, kernel_initializer="identity"
    )
    x = rng.normal(size=(1, 6, 4)).astype("float32")
    slots = router(x, expert_capacity=6)
    found = ops.convert_to_numpy(slots.combine_array).sum(axis=(0, 3))
    expected = [sparse_mixer(token, threshold, 2) for token in x[0]]
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_sparse_mixer_in_training(rng):
    """It samples by the softmax; the value is a third where it is not the best."""
    router = SparseMixerRouter(
        3,
        num_selected_experts=1,
        sparsity_threshold=100.0,
        use_bias=False,
        kernel_initializer="identity",
    )
    logits = np.array([0.0, 1.0, 0.5], "float32")
    x = np.tile(logits, (1, 4000, 1))
    routing = router(x, expert_capacity=4000, training=True)
    load = ops.convert_to_numpy(routing.load)[0]
    probs = np.exp(logits) / np.exp(logits).sum()
    np.testing.assert_allclose(load, probs, atol=0.04)
    weight = ops.convert_to_numpy(routing.weight)[0]
    for e, (p, found) in enumerate(zip(probs, weight, strict=True)):
        values = np.unique(np.round(found[found > 0], 4))
        expected = [p] if e == 1 else [p / 3, p]
        np.testing.assert_allclose(values, expected, atol=1e-3)


def test_sparse_mixer_has_the_gradient_of_the_softmax():
    """Whatever is sampled: `p (1 - p)` for the logit of the sampled expert."""
    router = SparseMixerRouter(
        2,
        num_selected_experts=1,
        sparsity_threshold=100.0,
        use_bias=False,
        kernel_initializer="identity",
    )
    router.build((None, None, 2))
    x = np.array([[[0.0, 1.0]]], "float32")

    def weight(x):
        return ops.sum(router(x, expert_capacity=1, training=True).weight)

    (found,) = gradients(weight, x)
    p = 1 / (1 + np.exp(-1))
    np.testing.assert_allclose(np.abs(found), p * (1 - p), atol=1e-6)
    assert found.sum() == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: MaskedRouter(4, num_expert_groups=3), "`num_expert_groups` must div"),
        (
            lambda: MaskedRouter(4, num_expert_groups=2, num_selected_experts=3),
            "`num_selected_experts` must be .* most 2",
        ),
        (lambda: MaskedRouter(4, group_score_experts=0), "`group_score_experts`"),
        (lambda: MaskedRouter(4, routed_scaling_factor=0), "`routed_scaling_factor`"),
        (lambda: MaskedRouter(4, normalization_epsilon=-1), "`normalization_epsilon`"),
        (lambda: MaskedRouter(4, input_norm_epsilon=0), "`input_norm_epsilon`"),
        (lambda: BiasBalancedMaskedRouter(4, mechanism="gumbel"), "`mechanism` must"),
        (lambda: SparseMixerRouter(4, num_selected_experts=5), "`num_selected_exp"),
        (lambda: SparseMixerRouter(4, sparsity_threshold=-1), "`sparsity_threshold`"),
    ],
)
def test_refused_options(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_the_weights_of_a_hierarchy():
    """One expert is reserved for a group only if its weights sum to 1."""

    def experts_per_token(**kwargs):
        outer = MaskedRouter(2, num_selected_experts=2, name="outer", **kwargs)
        inner = keras_moe.Top2MaskedRouter(2, name="inner")
        return keras_moe.HierarchicalMoeLayer(
            keras_moe.FeedForwardExperts(4, 3),
            outer,
            inner,
            train_capacity_factor=4.0,
            eval_capacity_factor=4.0,
        ).experts_per_token

    assert experts_per_token() == 3
    assert experts_per_token(routed_scaling_factor=2.0) == 4
    assert experts_per_token(use_expert_scale=True) == 4
    assert experts_per_token(mechanism="sqrt_softplus") == 4
