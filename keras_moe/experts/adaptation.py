"""Adapters (LoRA) and quantization of dense layers, and of layers that hold some."""

import keras
import numpy as np

from keras_moe.kernels import ops
from keras_moe.utils.composite import CompositeLayer
from keras_moe.utils.traversal import find_layers

ADAPTERS = ("lora_kernel_a", "lora_kernel_b")
ALPHA = "lora_alpha"


class AdaptableDense:
    """Adds to a dense layer of Keras adapters that are kept in files. Abstract.

    Keras merges adapters into the kernel when a layer is saved, which quantizes a
    quantized kernel again. Here a file holds the kernel and the adapters. They are
    merged when a layer without adapters loads it.
    """

    _error = None  # Why a file could not be loaded.

    def quantize(self, mode=None, type_check=True, config=None):
        self.check_quantization(mode, config)
        # The type check rejects subclasses.
        super().quantize(mode, type_check=False, config=config)

    def check_quantization(self, mode, config=None):
        """Raises an error for a quantization that cannot work.

        Args:
            mode: string, or `None` with a config.
            config: `keras.quantizers.QuantizationConfig`, or `None`.
        """
        if not hasattr(keras.quantizers, "abs_max_quantize_grouped_with_zero_point"):
            raise ValueError(
                "The quantization of experts needs Keras 3.14 or newer. "
                f"Received: Keras {keras.__version__}. {self.path!r} has not been "
                "changed."
            )
        if (mode or config.mode) == "float8" and self.lora_enabled:
            raise ValueError(
                "A layer with adapters cannot be quantized with 'float8'. "
                f"{self.path!r} has not been changed."
            )

    def enable_lora(self, rank, lora_alpha=None, **kwargs):
        if self.quantization_mode == "float8":
            raise ValueError(
                "A layer that is quantized with 'float8' cannot have adapters. "
                f"{self.path!r} has not been changed."
            )
        super().enable_lora(rank, lora_alpha=lora_alpha, **kwargs)

    def merge_lora(self):
        """Adds the adapters to the kernel, and removes them.

        A quantized kernel is quantized again.
        """
        if not self.lora_enabled:
            raise ValueError(f"There are no adapters to merge in {self.path!r}.")
        _merge_adapters(self, self._merged_variables())

    def _merged_variables(self):
        """Returns what Keras would save, with the adapters merged."""
        merged = {}
        super().save_own_variables(merged)
        return merged

    def save_own_variables(self, store):
        if not self.lora_enabled:
            return super().save_own_variables(store)
        self.lora_enabled = False
        try:
            super().save_own_variables(store)
        finally:
            self.lora_enabled = True
        store[ALPHA] = np.float32(self.lora_alpha)
        for name in ADAPTERS:
            store[name] = getattr(self, name)

    def load_own_variables(self, store):
        names = store.keys()  # Keras's stores have no `__iter__`.
        found = {name: store[name] for name in names}
        if self._error and not found:
            # Keras follows each attribute that holds the layer. Only the first has its
            # variables, and the last error is shown.
            raise self._error
        try:
            self._load(found)
        except ValueError as error:
            self._error = error
            raise

    def _load(self, found):
        a, b = (found.pop(name, None) for name in ADAPTERS)
        alpha = found.pop(ALPHA, None)
        if a is not None:
            self._check_adapters(rank=a.shape[-1])
            a, b, alpha = (ops.convert_to_numpy(x[()]) for x in (a, b, alpha))
            b = b * (alpha / a.shape[-1])
        if not self.lora_enabled:
            super().load_own_variables(found)
            if a is not None:
                change = ops.convert_to_tensor(np.matmul(a, b))
                self._kernel.assign_add(ops.cast(change, self._kernel.dtype))
            return
        if a is None:  # Adapters that begin as new ones do.
            a = ops.convert_to_numpy(self.lora_kernel_a)
            b = np.zeros(self.lora_kernel_b.shape)
        super().load_own_variables(found)  # Sets both to 0, which could not train.
        self.lora_kernel_a.assign(a)
        # A change of `lora_alpha` would not reach functions that are compiled.
        self.lora_kernel_b.assign(b * (self.lora_rank / self.lora_alpha))

    def _check_adapters(self, rank):
        if self.lora_enabled and rank != self.lora_rank:
            raise ValueError(
                "A file with adapters must have their rank. Received: "
                f"{rank} in the file, and {self.lora_rank} in {self.path!r}."
            )
        if not self.lora_enabled and self.quantization_mode is not None:
            raise ValueError(
                "A file with adapters cannot be loaded into a quantized layer without "
                f"adapters. Call `enable_lora({rank})` before. Received: {self.path!r}."
            )


def _merge_adapters(layer, merged):
    """Removes the adapters of a dense layer, whose merged variables are given."""
    merged = {key: ops.convert_to_numpy(value) for key, value in merged.items()}
    # Functions that are compiled still add the adapters.
    b = layer.lora_kernel_b
    b.assign(ops.zeros(b.shape, dtype=b.dtype))
    for name in ADAPTERS:
        delattr(layer, name)
    layer.lora_enabled, layer.lora_rank, layer.lora_alpha = False, None, None
    is_float = layer.quantization_mode is None
    kernel = next(weight for weight in layer.weights if weight.name == "kernel")
    kernel.trainable = layer.trainable and is_float
    layer.load_own_variables(merged)


class AdaptableLayer(CompositeLayer):
    """A layer that holds dense layers, with adapters and quantization. Abstract."""

    def _adaptable_parts(self):
        """Returns the layers whose dense layers are adapted and quantized."""
        # Not a property: Keras follows the properties of layers to files' paths.
        return [self]

    def _all_dense_layers(self):
        kinds = (keras.layers.Dense, keras.layers.EinsumDense)
        return [x for part in self._adaptable_parts() for x in find_layers(part, kinds)]

    def _adaptable_layers(self):
        found = self._all_dense_layers()
        if not self.built or not found:
            raise ValueError(
                f"{self.name!r} must be built, and its experts must be made of dense "
                "layers, to have adapters or to be quantized."
            )
        return found

    def _state(self):
        ranks = [(x.lora_rank, x.lora_alpha) for x in self._all_dense_layers()]
        return ranks, super()._state()

    def _set_state(self, state):
        ranks, weights = state
        for layer, (rank, alpha) in zip(self._all_dense_layers(), ranks, strict=True):
            if rank and not layer.lora_enabled:  # Those of float kernels.
                layer.enable_lora(rank, lora_alpha=alpha)
        super()._set_state(weights)

    def enable_lora(self, rank, lora_alpha=None):
        """Adds adapters to the dense layers, and freezes their kernels.

        Each expert has its own, which is applied to its tokens. Gates have none.

        Args:
            rank: int, the rank `r` of the adapters: `A` is `[h, r]`, and `B` `[r, f]`.
            lora_alpha: float; an adapter adds `lora_alpha / rank · x · A · B`. Defaults
                to `rank`.

        Raises:
            ValueError: if the layer is not built, has adapters, or is quantized with
                float8.

        Example:

        ```python
        layer = keras_moe.presets.mixtral(num_experts=4, d_ff=32)
        layer.build((None, 8, 16))
        layer.enable_lora(rank=4)
        layer.router.trainable = False
        ```

        Reference:
            [Hu et al., 2021](https://arxiv.org/abs/2106.09685), equation 3.
        """
        layers = self._adaptable_layers()
        if any(layer.lora_enabled for layer in layers):
            raise ValueError(f"{self.name!r} has adapters already.")
        for layer in layers:
            layer.enable_lora(rank, lora_alpha=lora_alpha)

    def merge_lora(self):
        """Adds the adapters to the kernels, and removes them.

        Quantized kernels are quantized again, which changes outputs slightly.

        Raises:
            ValueError: if there are no adapters.

        Example:

        ```python
        layer = keras_moe.presets.mixtral(num_experts=4, d_ff=32)
        layer.build((None, 8, 16))
        layer.enable_lora(rank=4)
        layer.merge_lora()
        ```
        """
        layers = [layer for layer in self._adaptable_layers() if layer.lora_enabled]
        if not layers:
            raise ValueError(f"There are no adapters to merge in {self.name!r}.")
        for layer in layers:
            if isinstance(layer, AdaptableDense):
                layer.merge_lora()
            else:
                merged = {}
                layer.save_own_variables(merged)
                _merge_adapters(layer, merged)

    def quantize(self, mode=None, type_check=True, config=None):
        """Quantizes the dense layers, each expert alone. Gates keep their floats.

        In a model that has been called, use `keras_moe.quantize_experts`, which also
        drops the functions that are compiled.

        Args:
            mode: string, `"int8"`, `"int4"` or `"float8"`. Defaults to `None`, that of
                the config.
            type_check: ignored.
            config: `keras.quantizers.QuantizationConfig`. Defaults to `None`, that of
                Keras for the mode.

        Raises:
            ValueError: if the layer is not built, or for a mode that cannot work.
                Nothing is changed then.

        Example:

        ```python
        layer = keras_moe.presets.mixtral(num_experts=4, d_ff=32)
        layer.build((None, 8, 16))
        layer.quantize("int4")
        ```
        """
        layers = self.unquantized_layers(mode, config)
        for layer in layers:
            layer.quantize(mode, config=config)

    def unquantized_layers(self, mode, config=None):
        """Returns the dense layers that are not quantized yet.

        Args:
            mode: string, or `None` with a config.
            config: `keras.quantizers.QuantizationConfig`, or `None`.

        Raises:
            ValueError: for a mode that cannot work for one of them, or if all are
                quantized otherwise.
        """
        mode = mode or config.mode
        layers = self._adaptable_layers()
        found = [x for x in layers if x.quantization_mode is None]
        if not found and layers[0].quantization_mode != mode:
            raise ValueError(
                f"{self.name!r} is quantized already, as {layers[0].dtype_policy.name}."
                f" Received: {mode!r}."
            )
        for layer in found:
            if isinstance(layer, AdaptableDense):
                layer.check_quantization(mode, config)
        return found

    def quantized_call(self, *args, **kwargs):
        # The dense layers are quantized, not this layer.
        return self.call(*args, **kwargs)
