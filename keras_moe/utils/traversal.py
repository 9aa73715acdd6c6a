"""Search for layers inside models and layers."""

import keras


def find_layers(layer, kind):
    """Finds all layers of a class, at any depth, each once.

    Args:
        layer: a model or layer.
        kind: class, or a tuple of classes.

    Returns:
        A list of layers, in the order of the attributes that hold them.
    """
    found, seen = [], set()

    def visit(layers):
        for layer in layers:
            if id(layer) not in seen:
                seen.add(id(layer))
                if isinstance(layer, kind):
                    found.append(layer)
                visit(child_layers(layer))

    visit([layer])
    return found


def child_layers(x):
    """Finds the layers that a layer holds in its attributes, or a container holds.

    Args:
        x: layer; list, tuple, set or dict; other values hold none.

    Returns:
        A list of layers, without the layers inside of these.
    """
    found = []

    def visit(value):
        if isinstance(value, dict):
            value = list(value.values())
        if isinstance(value, (list, tuple, set)):
            for part in value:
                visit(part)
        elif isinstance(value, keras.layers.Layer):
            found.append(value)

    visit(vars(x) if isinstance(x, keras.layers.Layer) else x)
    return list({id(layer): layer for layer in found}.values())
