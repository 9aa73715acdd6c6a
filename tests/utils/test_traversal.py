import keras
from layer_check import Subclassed, functional

from keras_moe import (
    FeedForwardExperts,
    MaskedRouter,
    MoeLayer,
    MoeLayerWithBackbone,
    Router,
    SoftMoeLayer,
)
from keras_moe.utils.traversal import find_layers


class Block(keras.layers.Layer):
    def __init__(self, layer):
        super().__init__()
        self.parts = {"moe": [layer]}

    def call(self, inputs):
        return self.parts["moe"][0](inputs)


def test_layers_at_any_depth_are_found_once():
    first, second, third = (
        MoeLayer(FeedForwardExperts(2, 3), MaskedRouter(2), name=f"moe_{i}")
        for i in range(3)
    )
    inner = functional(first, (4, 5))
    inputs = keras.Input((4, 5))
    outputs = Block(second)(inner(inputs))
    outputs = MoeLayerWithBackbone(third, 3)(first(outputs))  # Reuses the first layer.
    model = Subclassed(keras.Model(inputs, outputs))
    found = find_layers(model, MoeLayer)
    assert sorted(layer.name for layer in found) == ["moe_0", "moe_1", "moe_2"]
    assert len(find_layers(model, Router)) == 3
    assert find_layers(model, SoftMoeLayer) == []
