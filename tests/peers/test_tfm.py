"""Parity with `tfm.nlp.layers` on equal weights: outputs, losses, gradients."""

import itertools

import garden
import numpy as np
import pytest
import tensorflow as tf

import keras_moe

B, S, H, E, F = 4, 12, 8, 4, 16


def pair(factor, examples, **kwargs):
    return garden.pair(E, H, F, factor, examples, eval_factor=factor / 2, **kwargs)


def capacity(factor, examples, training):
    factor = factor if training else factor / 2
    return round(factor * int(S * examples) / E)


CASES = [
    case
    for case in itertools.product(
        (0.5, 1.0, 1.25, 2.0), (1.0, 2.0, 4.0, 0.5, 0.25), (False, True)
    )
    # Their layer gives 0 and NaN where the capacity rounds to 0.
    if capacity(*case) > 0
]


@pytest.mark.parametrize(("factor", "examples", "training"), CASES)
def test_outputs_losses_metrics_and_gradients(factor, examples, training):
    theirs, ours = pair(factor, examples, z_weight=0.3)
    x = np.random.default_rng(0).normal(size=(B, S, H)).astype("float32")
    (a, loss_a, d_x_a, d_weights_a) = results(ours, x, training, lambda w: w.path)
    (b, loss_b, d_x_b, d_weights_b) = results(
        theirs, x, training, lambda w: w.name.split(":")[0]
    )
    assert_close(a, b)
    assert_close(loss_a, loss_b)
    assert_close(d_x_a, d_x_b)
    assert d_weights_a.keys() == d_weights_b.keys()
    for path, gradient in d_weights_a.items():
        assert_close(gradient, d_weights_b[path])
    for metric in theirs.metrics:
        metric.reset_state()
    for metric in ours.router.metrics:
        metric.reset_state()
    ours(x, training=training), theirs(x, training=training)
    metrics = {m.name.split("/")[-1]: float(m.result()) for m in ours.router.metrics}
    assert metrics.pop("max_load") >= 1  # Theirs has no such metric.
    expected = {m.name: float(m.result()) for m in theirs.metrics}
    assert len(expected) == 6
    assert metrics == pytest.approx(expected, abs=1e-5)


def results(layer, x, training, path):
    x = tf.convert_to_tensor(x)
    with tf.GradientTape() as tape:
        tape.watch(x)
        outputs = layer(x, training=training)
        loss = tf.reduce_sum(outputs**2) + tf.add_n(layer.losses)
    variables = layer.trainable_weights
    targets = [v if isinstance(v, tf.Variable) else v.value for v in variables]
    d_x, *gradients = tape.gradient(loss, [x, *targets])
    by_path = {
        path(v): tf.convert_to_tensor(g)
        for v, g in zip(variables, gradients, strict=True)
    }
    return outputs, loss, d_x, by_path


def assert_close(a, b):
    a, b = np.asarray(a), np.asarray(b)
    scale = max(np.abs(b).max(), 1.0)
    np.testing.assert_allclose(a / scale, b / scale, atol=1e-5)


def test_with_backbone():
    theirs, ours = pair(1.0, 1.0, backbone=5)
    x = np.random.default_rng(0).normal(size=(B, S, H)).astype("float32")
    assert_close(ours(x), theirs(x))


def test_feed_forward():
    x = np.random.default_rng(0).normal(size=(B, S, H)).astype("float32")
    ours, theirs = keras_moe.FeedForward(F), garden.load().FeedForward(F)
    theirs(x), ours(x)
    weights = garden.by_path(theirs)
    for w in ours.weights:
        w.assign(weights[w.path].numpy())
    assert_close(ours(x), theirs(x))


def test_dense_arrays():
    theirs, ours = pair(1.0, 1.0)
    x = np.random.default_rng(0).normal(size=(B, S, H)).astype("float32")
    mask = theirs._router(tf.convert_to_tensor(x), expert_capacity=S // E)
    routing = ours.router.route(x, expert_capacity=S // E)
    # Their slots of an expert are in no particular order.
    assert_close(np.sum(routing.dispatch_mask, -1), np.sum(mask.dispatch_mask, -1))
    assert_close(np.sum(routing.combine_array, -1), np.sum(mask.combine_array, -1))
