"""Layers inside the config of a layer."""

import keras


def with_parts(config, *names):
    """The config with layers in place of their configs.

    The parts are built by the layer that owns them, so that their paths begin
    with its path; what their configs say about building is left out.

    Args:
        config: a dict.
        *names: the keys under which configs of layers stand, or lists of them.

    Returns:
        A new dict.
    """
    parts = {name: _deserialize(config[name]) for name in names if name in config}
    return {**config, **parts}


def _deserialize(config):
    if isinstance(config, list):
        return [_deserialize(part) for part in config]
    if not isinstance(config, dict):
        # A layer, or what the constructor refuses.
        return config
    config = {k: v for k, v in config.items() if k != "build_config"}
    return keras.saving.deserialize_keras_object(config)


def unquantized(policy):
    """The dtype policy from which `quantize` made this one, if it did."""
    return keras.dtype_policies.get(policy.name.rpartition("_from_")[2])
