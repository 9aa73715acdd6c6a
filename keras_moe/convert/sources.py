"""Sources of tensors: dicts, modules, layers and safetensors files."""

import collections.abc
import contextlib
import os
import pathlib

import keras
import numpy as np


@contextlib.contextmanager
def open_source(source):
    """Opens a source as a dict of names to tensors, which `as_numpy` converts.

    Args:
        source: dict of arrays or tensors; PyTorch module; layer of Keras or tf-keras;
            or path of a safetensors file or of a folder of them.

    Raises:
        TypeError: for another type of source.
        ValueError: for a folder without safetensors files.
    """
    if isinstance(source, (str, os.PathLike)):
        with contextlib.ExitStack() as stack:
            yield _from_files(pathlib.Path(source), stack)
    elif isinstance(source, collections.abc.Mapping):
        yield source
    elif hasattr(source, "weights"):  # First: on PyTorch, Keras layers are modules.
        yield {_path_below(source, weight): weight for weight in source.weights}
    elif hasattr(source, "state_dict"):
        yield source.state_dict()
    else:
        raise TypeError(
            "`source` must be a dict, a module, a layer or a path. "
            f"Received: {type(source).__name__}."
        )


def as_numpy(tensor):
    """Converts a variable, tensor, array or `LazyTensor` to a numpy array."""
    if isinstance(tensor, keras.Variable):
        return keras.ops.convert_to_numpy(tensor)
    if hasattr(tensor, "detach"):  # PyTorch: numpy has no bfloat16 of its own.
        tensor = tensor.detach().cpu()
        tensor = tensor.float() if tensor.is_floating_point() else tensor
    return np.asarray(tensor)


class LazyTensor:
    """A tensor in an open safetensors file, read when it is converted to an array."""

    def __init__(self, file, name):
        self.file, self.name = file, name
        self.shape = tuple(file.get_slice(name).get_shape())

    def __array__(self, dtype=None, copy=None):
        return np.asarray(self.file.get_tensor(self.name), dtype=dtype)


def _path_below(layer, weight):
    # tf-keras has no paths, but names that end with the number of an output.
    path = getattr(weight, "path", None) or weight.name.split(":")[0]
    return f"/{path}".partition(f"/{layer.name}/")[2] or path


def _from_files(path, stack):
    from safetensors import safe_open

    files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
    if not files:
        raise ValueError(f"There is no safetensors file in {path}.")
    result = {}
    for file in files:
        opened = stack.enter_context(safe_open(file, framework="numpy"))
        names = opened.keys()
        result |= {name: LazyTensor(opened, name) for name in names}
    return result
