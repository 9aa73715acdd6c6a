"""Model Garden's MoE module, loaded by path without the rest of the package.

Importing it the usual way would import all of Model Garden, with dependencies
that the module does not use.
"""

import importlib.metadata
import importlib.util
import sys
import types

import tf_keras

PACKAGES = (
    "official",
    "official.modeling",
    "official.nlp",
    "official.nlp.modeling",
    "official.nlp.modeling.layers",
)


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
