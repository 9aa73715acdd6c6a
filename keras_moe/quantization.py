"""Quantization of the experts in a model."""

import keras

from keras_moe.layers.base_layer import BaseMoeLayer
from keras_moe.layers.moe_layer_with_backbone import MoeLayerWithBackbone
from keras_moe.utils.traversal import find_layers


def quantize_experts(model, mode=None, config=None):
    """Quantizes the experts of a model, shared ones too, and nothing else.

    Experts hold most parameters of a model. Each is quantized alone, as if it were a
    `keras.layers.Dense`.

    Args:
        model: built model or layer with Mixture-of-Experts layers.
        mode: string, `"int8"`, `"int4"` or `"float8"`. Defaults to `None`, that of the
            config.
        config: `keras.quantizers.QuantizationConfig`. Defaults to `None`, that of Keras
            for the mode.

    Raises:
        ValueError: if there are no such layers, or for a mode that cannot work for one
            of them. Nothing is changed then.

    Example:

    ```python
    inputs = keras.Input((8, 16))
    outputs = inputs + keras_moe.presets.mixtral(num_experts=4, d_ff=32)(inputs)
    model = keras.Model(inputs, outputs)
    keras_moe.quantize_experts(model, "int4")
    ```
    """
    layers = find_layers(model, (BaseMoeLayer, MoeLayerWithBackbone))
    if not layers:
        raise ValueError(
            f"There is no Mixture-of-Experts layer in {model.name!r} to quantize."
        )
    found = {
        id(dense): dense
        for layer in layers
        for dense in layer.unquantized_layers(mode, config)
    }
    if isinstance(model, keras.Model):
        # It releases memory, and drops the functions that are compiled.
        model.quantize(mode, config=config, filters=lambda layer: id(layer) in found)
    else:
        for dense in found.values():
            dense.quantize(mode, config=config)
