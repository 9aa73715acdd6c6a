"""Parity with `tfm.nlp.layers` on equal weights: outputs, losses, gradients."""

import itertools

import garden
import numpy as np
import pytest
import tensorflow as tf

import keras_moe

B, S, H, E, F = 4, 12, 8, 4, 16
tfm = garden.load()


def make_pair(factor, examples, z_weight=0.0, backbone=False):
    """Ours and theirs with the same weights, built."""
    kernel = tf.random_normal_initializer(stddev=0.5, seed=1)

    def make(package, initializer):
        kwargs = {"kernel_initializer": initializer}
        layer = package.MoeLayer(
            package.FeedForwardExperts(E, F, **kwargs),
            package.ExpertsChooseMaskedRouter(
                E, router_z_loss_weight=z_weight, **kwargs
            ),
            train_capacity_factor=factor,
            eval_capacity_factor=factor / 2,
            examples_per_group=examples,
            name="moe",
        )
        if backbone:
            layer = package.MoeLayerWithBackbone(layer, 5, name="both")
        layer(np.zeros((B, S, H), "float32"))
        return layer

    theirs = make(tfm, kernel)
    ours = make(keras_moe, "he_normal")
    weights = by_path(theirs)
    assert {w.path: tuple(w.shape) for w in ours.weights} == {
        path: tuple(w.shape) for path, w in weights.items()
    }
    rng = np.random.default_rng(2)
    for w in ours.weights:
        value = weights[w.path].numpy()
        if w.path.endswith("bias"):
            value = rng.normal(size=value.shape).astype("float32")
            weights[w.path].assign(value)
        w.assign(value)
    return ours, theirs


def by_path(layer):
    return {w.name.split(":")[0]: w for w in layer.trainable_weights}


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
    ours, theirs = make_pair(factor, examples, z_weight=0.3)
    x = np.random.default_rng(0).normal(size=(B, S, H)).astype("float32")
    (a, loss_a, of_x, of_weights) = results(ours, x, training, lambda w: w.path)
    (b, loss_b, of_x_b, of_weights_b) = results(
        theirs, x, training, lambda w: w.name.split(":")[0]
    )
    close(a, b)
    close(loss_a, loss_b)
    close(of_x, of_x_b)
    assert of_weights.keys() == of_weights_b.keys()
    for path, gradient in of_weights.items():
        close(gradient, of_weights_b[path])
    for metric in theirs.metrics:
        metric.reset_state()
    for metric in ours.metrics:
        metric.reset_state()
    ours(x, training=training), theirs(x, training=training)
    metrics = {m.name.split("/")[-1]: float(m.result()) for m in ours.metrics}
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
    of_x, *gradients = tape.gradient(loss, [x, *targets])
    named = {
        path(v): tf.convert_to_tensor(g)
        for v, g in zip(variables, gradients, strict=True)
    }
    return outputs, loss, of_x, named


def close(a, b):
    a, b = np.asarray(a), np.asarray(b)
    scale = max(np.abs(b).max(), 1.0)
    np.testing.assert_allclose(a / scale, b / scale, atol=1e-5)


def test_with_backbone():
    ours, theirs = make_pair(1.0, 1.0, backbone=True)
    x = np.random.default_rng(0).normal(size=(B, S, H)).astype("float32")
    close(ours(x), theirs(x))


def test_feed_forward():
    x = np.random.default_rng(0).normal(size=(B, S, H)).astype("float32")
    ours, theirs = keras_moe.FeedForward(F), tfm.FeedForward(F)
    theirs(x), ours(x)
    weights = by_path(theirs)
    for w in ours.weights:
        w.assign(weights[w.path].numpy())
    close(ours(x), theirs(x))


def test_our_dense_arrays_are_theirs():
    ours, theirs = make_pair(1.0, 1.0)
    x = np.random.default_rng(0).normal(size=(B, S, H)).astype("float32")
    mask = theirs._router(tf.convert_to_tensor(x), expert_capacity=S // E)
    routing = ours.router.route(x, expert_capacity=S // E)
    # They number an expert's slots in no particular order.
    close(np.sum(routing.dispatch_mask, -1), np.sum(mask.dispatch_mask, -1))
    close(np.sum(routing.combine_array, -1), np.sum(mask.combine_array, -1))
