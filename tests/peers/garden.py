"""Model Garden's MoE layer, and ours with its weights.

The module is loaded by path: a normal import would import all of Model Garden, with
dependencies that the module does not use.
"""

import importlib.metadata
import importlib.util
import sys
import types

import numpy as np
import tensorflow as tf
import tf_keras

import keras_moe

PACKAGES = (
    "official",
    "official.modeling",
    "official.nlp",
    "official.nlp.modeling",
    "official.nlp.modeling.layers",
)


def pair(
    num_experts,
    hidden,
    d_ff,
    factor,
    examples_per_group,
    eval_factor=None,
    z_weight=0.0,
    backbone=None,
):
    """Returns `(theirs, ours)`, with expert choice and with biases other than 0.

    Args:
        num_experts: int.
        hidden: int.
        d_ff: int.
        factor: float, the capacity factor in training.
        examples_per_group: float.
        eval_factor: float, the capacity factor outside training; `factor` by
            default.
        z_weight: float, the weight of the z-loss.
        backbone: int, the inner width of a backbone, or `None` for none.
    """

    def make(package, initializer):
        kwargs = {"kernel_initializer": initializer}
        layer = package.MoeLayer(
            package.FeedForwardExperts(num_experts, d_ff, **kwargs),
            package.ExpertsChooseMaskedRouter(
                num_experts, router_z_loss_weight=z_weight, **kwargs
            ),
            train_capacity_factor=factor,
            eval_capacity_factor=eval_factor or factor,
            examples_per_group=examples_per_group,
            name="moe",
        )
        if backbone:
            layer = package.MoeLayerWithBackbone(layer, backbone, name="both")
        layer(np.zeros((8, 16, hidden), "float32"))
        return layer

    initializer = tf.random_normal_initializer(stddev=hidden**-0.5, seed=1)
    theirs, ours = make(load(), initializer), make(keras_moe, "he_normal")
    weights = by_path(theirs)
    assert {w.path: tuple(w.shape) for w in ours.weights} == {
        path: tuple(w.shape) for path, w in weights.items()
    }
    rng = np.random.default_rng(2)
    for w in ours.weights:
        if w.path.endswith("bias"):
            weights[w.path].assign(rng.normal(size=w.shape))
        w.assign(weights[w.path].numpy())
    return theirs, ours


def by_path(layer):
    """Returns their weights by the paths of our weights."""
    return {w.name.split(":")[0]: w for w in layer.trainable_weights}


def load():
    for name in PACKAGES:
        sys.modules.setdefault(name, types.ModuleType(name)).__path__ = []
    activations = types.ModuleType("official.modeling.activations")
    activations.gelu = tf_keras.activations.gelu
    sys.modules["official.modeling.activations"] = activations
    sys.modules["official.modeling"].activations = activations
    sys.modules["official.modeling"].tf_utils = _load("official.modeling.tf_utils")
    return _load("official.nlp.modeling.layers.moe")


def _load(name):
    files = importlib.metadata.distribution("tf-models-official")
    path = files.locate_file(name.replace(".", "/") + ".py")
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module
