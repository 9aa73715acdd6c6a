"""A module of keras-hub, imported without the packages that hold it.

Their `__init__` would import all of keras-hub, with dependencies that the MoE
blocks do not use.
"""

import importlib
import importlib.metadata
import sys
import types

MODULE = "keras_hub.src.models.qwen3_moe.qwen3_moe_decoder"
OTHERS = "keras_hub.src.layers.modeling", "keras_hub.src.utils"


def load():
    root = importlib.metadata.distribution("keras-hub").locate_file("")
    for name in (MODULE.rpartition(".")[0], *OTHERS):
        while name:
            package = sys.modules.setdefault(name, types.ModuleType(name))
            package.__path__ = [str(root / name.replace(".", "/"))]
            name = name.rpartition(".")[0]
    return importlib.import_module(MODULE)
