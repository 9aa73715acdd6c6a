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

    def visit(x):
        if isinstance(x, dict):
            x = list(x.values())
        if isinstance(x, (list, tuple, set)):
            for part in x:
                visit(part)
        elif isinstance(x, keras.layers.Layer) and id(x) not in seen:
            seen.add(id(x))
            if isinstance(x, kind):
                found.append(x)
            visit(vars(x))

    visit(layer)
    return found
