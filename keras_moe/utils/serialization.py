"""Sublayers in the config of a layer, and the dtype policies of quantized ones."""

import keras


def deserialize_sublayers(config, *names):
    """Returns the config with layers in place of their configs.

    The `build_config` of a sublayer is ignored: the layer that owns a sublayer
    builds it, so that the sublayer's path begins with its owner's.

    Args:
        config: dict.
        *names: keys of `config` that hold the config of a layer or a list of them.

    Returns:
        A new dict.
    """
    sublayers = {name: _deserialize(config[name]) for name in names if name in config}
    return {**config, **sublayers}


def _deserialize(config):
    if isinstance(config, list):
        return [_deserialize(part) for part in config]
    if not isinstance(config, dict):
        # A layer already, or a value that the constructor rejects.
        return config
    config = {k: v for k, v in config.items() if k != "build_config"}
    return keras.saving.deserialize_keras_object(config)


def base_dtype_policy(policy):
    """Returns the float policy that `quantize` started from, or `policy` itself.

    Args:
        policy: dtype policy; of a `DTypePolicyMap`, each policy is replaced.
    """
    policy = keras.dtype_policies.get(policy)
    if isinstance(policy, keras.dtype_policies.DTypePolicyMap):
        policies = {path: base_dtype_policy(x) for path, x in policy.items()}
        return keras.dtype_policies.DTypePolicyMap(
            base_dtype_policy(policy.default_policy), policies
        )
    return keras.dtype_policies.get(policy.name.rpartition("_from_")[2])
