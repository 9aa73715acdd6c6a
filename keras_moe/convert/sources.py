"""Sources of tensors: dicts, modules, layers and safetensors files."""

import collections.abc
import json
import math
import os
import pathlib
import sys

import keras
import ml_dtypes
import numpy as np

# The dtypes of safetensors files.
DTYPES = {
    "BF16": ml_dtypes.bfloat16,
    "F8_E4M3": ml_dtypes.float8_e4m3fn,
    "F8_E5M2": ml_dtypes.float8_e5m2,
    "BOOL": np.bool_,
    **{f"F{bits}": np.dtype(f"float{bits}") for bits in (16, 32, 64)},
    **{f"I{bits}": np.dtype(f"int{bits}") for bits in (8, 16, 32, 64)},
    **{f"U{bits}": np.dtype(f"uint{bits}") for bits in (8, 16, 32, 64)},
}
if hasattr(ml_dtypes, "float8_e8m0fnu"):  # Missing in old versions.
    DTYPES["F8_E8M0"] = ml_dtypes.float8_e8m0fnu
# A longer header is none, but the data of another kind of file.
LONGEST_HEADER = 100_000_000


class FileTensor:
    """A tensor in a safetensors file, whose data is read when it is used.

    Args:
        path: `pathlib.Path` of the file.
        name: string, the name of the tensor.
        headers: dict of the headers that have been read, by path.
    """

    def __init__(self, path, name, headers):
        self.path, self.name, self._headers = path, name, headers

    @property
    def _entry(self):
        if self.path not in self._headers:
            self._headers[self.path] = read_header(self.path)
        try:
            return self._headers[self.path][self.name]
        except KeyError:
            raise ValueError(
                f"{self.path} must hold {self.name}, as the index says."
            ) from None

    @property
    def shape(self):
        return tuple(self._entry["shape"])

    @property
    def dtype(self):
        name = self._entry["dtype"]
        return np.dtype(DTYPES[name]) if name in DTYPES else name

    def __array__(self, dtype=None, copy=None):
        if 0 in self.shape:
            return np.empty(self.shape, self.dtype)
        mapped = np.memmap(
            self.path, self.dtype, "r", self._entry["offset"], self.shape or (1,)
        )
        return mapped.reshape(self.shape).astype(dtype or self.dtype, copy=False)


def open_source(source):
    """Returns a source as a dict of names to tensors, which `as_numpy` converts.

    Args:
        source: dict of arrays or tensors; PyTorch module; layer of Keras or tf-keras;
            or path of a safetensors file, of an index of such files, or of a folder.

    Raises:
        TypeError: for another type of source.
        ValueError: for files that cannot be read as the tensors of one model.
    """
    if isinstance(source, (str, os.PathLike)):
        return _from_files(pathlib.Path(source))
    if isinstance(source, collections.abc.Mapping):
        return source
    if hasattr(source, "weights"):  # First: on PyTorch, Keras layers are modules.
        return {_path_below(source, weight): weight for weight in source.weights}
    if hasattr(source, "state_dict"):
        return source.state_dict()
    raise TypeError(
        "`source` must be a dict, a module, a layer or a path. "
        f"Received: {type(source).__name__}."
    )


def as_numpy(tensor):
    """Converts a variable, tensor, array or `FileTensor` to a numpy array."""
    if isinstance(tensor, keras.Variable):
        return keras.ops.convert_to_numpy(tensor)
    if hasattr(tensor, "detach"):  # PyTorch: numpy itself has no bfloat16 or float8.
        tensor, name = tensor.detach().cpu().contiguous(), dtype_name(tensor)
        if hasattr(ml_dtypes, name):
            bits = "int16" if name == "bfloat16" else "uint8"
            bits = tensor.view(getattr(sys.modules["torch"], bits)).numpy()
            return bits.view(getattr(ml_dtypes, name))
        return tensor.numpy()
    return np.asarray(tensor)


def dtype_name(tensor):
    """Returns numpy's name of the dtype of a tensor; "object" if it is none."""
    if not hasattr(tensor, "dtype") or not hasattr(tensor, "shape"):
        return "object"
    dtype = tensor.dtype
    return getattr(dtype, "name", str(dtype)).removeprefix("torch.")


def read_header(path):
    """Returns the names of a safetensors file, with dtype, shape and offset of each.

    The library of that name has no float8 for numpy.

    Raises:
        ValueError: for another kind of file, or one that is cut off.

    Reference:
        https://huggingface.co/docs/safetensors
    """
    if not path.exists():
        raise ValueError(f"{path} is missing.")
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        try:
            if length > LONGEST_HEADER:
                raise ValueError
            header = json.loads(file.read(length))
        except ValueError:
            raise ValueError(f"{path} must be a safetensors file.") from None
    header.pop("__metadata__", None)
    size = path.stat().st_size
    for name, entry in header.items():
        start, end = entry["data_offsets"]
        entry["offset"] = 8 + length + start
        dtype = DTYPES.get(entry["dtype"])
        expected = end - start if dtype is None else _num_bytes(entry["shape"], dtype)
        if end - start != expected or 8 + length + end > size:
            raise ValueError(f"{path} is damaged: {name} has not the size of its data.")
    return header


def _num_bytes(shape, dtype):
    return math.prod(shape) * np.dtype(dtype).itemsize


def _path_below(layer, weight):
    # tf-keras has no paths, but names that end with the number of an output.
    path = getattr(weight, "path", None) or weight.name.split(":")[0]
    return f"/{path}".partition(f"/{layer.name}/")[2] or path


def _from_files(path):
    index, headers = _find_index(path), {}
    if index is not None:
        files = json.loads(index.read_text())["weight_map"]
        return {
            name: FileTensor(index.parent / file, name, headers)
            for name, file in files.items()
        }
    files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
    if not files:
        raise ValueError(f"There is no safetensors file in {path}.")
    result = {}
    for file in files:
        headers[file] = read_header(file)
        for name in headers[file]:
            if name in result:
                raise ValueError(
                    f"{name} must be in one file. Received: {result[name].path.name} "
                    f"and {file.name} in {path}, without an index."
                )
            result[name] = FileTensor(file, name, headers)
    return result


def _find_index(path):
    """Returns the path of the index of a folder, if it has one."""
    if path.name.endswith(".safetensors.index.json"):
        return path
    found = sorted(path.glob("*.safetensors.index.json")) if path.is_dir() else []
    if len(found) > 1:
        raise ValueError(f"There must be one index in {path}. Received: {found}.")
    return found[0] if found else None
