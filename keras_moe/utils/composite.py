"""The base class of layers that are made of other layers."""

import keras

from keras_moe.utils.serialization import deserialize_sublayers
from keras_moe.utils.traversal import child_layers, find_layers


class CompositeLayer(keras.layers.Layer):
    """A layer made of other layers. Abstract.

    It keeps `trainable` of each sublayer in configs, and so in files and clones, which
    Keras forgets, and it can be copied and pickled.

    A subclass calls `restore_trainable` at the end of its `build`. It names in
    `serialized_sublayers` the attributes whose layers are in its config; they keep
    `trainable` themselves. For all others, the config lists the sublayers that differ
    from this layer, by their path below it.
    """

    serialized_sublayers = ()
    # Of the config; `None` for a layer that is not made from one.
    _trainable_by_path = None

    def restore_trainable(self):
        """Freezes sublayers as the config says, or all of them if this layer is frozen.

        Keras freezes the sublayers that exist when `trainable` is set.
        """
        if self._trainable_by_path is not None:
            for path, layer in self._unserialized_sublayers():
                value = self._trainable_by_path.get(path, self.trainable)
                if layer.trainable != value:
                    layer.trainable = value
        elif not self.trainable:
            # Setting it on this layer again does nothing on TensorFlow.
            for layer in find_layers(self, keras.layers.Layer):
                if layer.trainable:
                    layer.trainable = False

    def get_config(self):
        if not self.built:
            self.restore_trainable()
        config = super().get_config()
        different = {
            path: layer.trainable
            for path, layer in self._unserialized_sublayers()
            if layer.trainable != self.trainable
        }
        return {**config, "sublayers_trainable": different} if different else config

    @classmethod
    def from_config(cls, config):
        config = deserialize_sublayers(config, *cls.serialized_sublayers)
        trainable = config.pop("sublayers_trainable", {})
        layer = super().from_config(config)
        layer._trainable_by_path = trainable
        return layer

    def __reduce__(self):
        # Keras pickles a layer as a file, but not one that others build.
        shape = getattr(self, "built_shape", None)
        if shape is None:
            return super().__reduce__()
        return _rebuild, (type(self), self.get_config(), shape, self._state())

    def _state(self):
        """Returns what a copy needs besides the config."""
        return self.get_weights()

    def _set_state(self, state):
        """Gives a copy, which is built, the state of the original."""
        self.set_weights(state)

    def _unserialized_sublayers(self):
        """Yields pairs of paths and layers, each before its own sublayers."""
        serialized = {
            id(layer)
            for name in self.serialized_sublayers
            for layer in child_layers([vars(self).get(name)])
        }

        def visit(parent, prefix):
            for layer in child_layers(parent):
                if id(layer) not in serialized:
                    yield f"{prefix}{layer.name}", layer
                    yield from visit(layer, f"{prefix}{layer.name}/")

        yield from visit(self, "")


def _rebuild(cls, config, shape, state):
    layer = cls.from_config(config)
    layer.build(shape)
    layer._set_state(state)
    return layer
