"""Upcycling and expert selection: dense layers into experts, experts into others."""

import keras
import numpy as np
from keras import ops

from keras_moe.experts import FeedForward, FeedForwardExperts
from keras_moe.layers import MoeLayer
from keras_moe.utils import checks
from keras_moe.utils.traversal import find_layers


def upcycle(feed_forward, router, *, noise=0.0, seed=None, **kwargs):
    """Creates a `MoeLayer` whose experts are copies of a trained dense layer.

    If the combine weights of a token sum to 1 (`normalize_weights=True`) and no token
    is dropped, the layer computes the same function as the dense layer, whatever the
    router selects.

    Args:
        feed_forward: built `FeedForward`, or a list of two built `keras.layers.Dense`,
            the first with the activation. It is not changed.
        router: `Router`, not built. Its `num_experts` is the number of copies.
        noise: float, the standard deviation of Gaussian noise added to the kernels of
            the copies, relative to that of each kernel. Defaults to 0.
        seed: int, the seed of the noise. Defaults to `None`.
        **kwargs: arguments of `MoeLayer`. `name` defaults to that of `feed_forward`.

    Returns:
        A built `MoeLayer`.

    Raises:
        TypeError: if `feed_forward` or `router` has another type.
        ValueError: if `feed_forward` is not built or is quantized, if its dense layers
            do not fit together, or if an argument is out of range.

    Example:

    ```python
    dense = keras_moe.FeedForward(64)
    dense.build((None, 8, 16))
    router = keras_moe.MaskedRouter(4, num_selected_experts=2, normalize_weights=True)
    layer = keras_moe.upcycle(
        dense, router, train_capacity_factor=None, eval_capacity_factor=None
    )
    ```

    Reference:
        [Komatsuzaki et al., 2022](https://arxiv.org/abs/2212.05055).
    """
    if isinstance(feed_forward, (list, tuple)):
        feed_forward = _as_feed_forward(feed_forward)
    if not isinstance(feed_forward, FeedForward):
        raise TypeError(
            "`feed_forward` must be a `FeedForward` or a list of two `Dense` layers. "
            f"Received: {type(feed_forward).__name__}."
        )
    _check_can_be_copied(feed_forward)
    checks.number("noise", noise)
    config = {**feed_forward.get_config(), "name": "experts"}
    experts = FeedForwardExperts.from_config(
        {**config, "num_experts": getattr(router, "num_experts", 1)}
    )
    layer = MoeLayer(experts, router, **{"name": feed_forward.name, **kwargs})
    layer.build((None, None, feed_forward.output_layer.units))
    rng = np.random.default_rng(seed)
    for dense, source in zip(
        experts.dense_layers, feed_forward.dense_layers, strict=True
    ):
        for weight, value in zip(dense.weights, _merged(source), strict=True):
            copies = np.broadcast_to(value, weight.shape)
            is_kernel = weight.name == "kernel"
            weight.assign(_noisy(copies, noise, rng) if is_kernel else copies)
    return layer


def upcycle_model(
    model,
    make_router,
    *,
    layers=None,
    train_capacity_factor=None,
    eval_capacity_factor=None,
    noise=0.0,
    seed=None,
    **kwargs,
):
    """Copies a trained dense model, with experts in place of its feed-forward layers.

    Args:
        model: built functional or Sequential model. It is not changed.
        make_router: function without arguments that returns a new `Router`.
        layers: list of the layers to replace: names of `FeedForward` layers, and pairs
            of names of `Dense` layers of which the second has the output of the first
            as its only input. Defaults to `None`, all `FeedForward` layers.
        train_capacity_factor: see `MoeLayer`. Defaults to `None`, dropless.
        eval_capacity_factor: see `MoeLayer`. Defaults to `None`, dropless.
        noise: see `upcycle`. Defaults to 0.
        seed: int, the seed of the noise. Defaults to `None`.
        **kwargs: arguments of `MoeLayer`.

    Returns:
        A model, not compiled, with copies of all weights.

    Raises:
        ValueError: if there is no layer to replace, or a `FeedForward` inside another
            layer, which cannot be replaced; if a name is unknown; and as `upcycle`.
        TypeError: as `upcycle`.

    Example:

    ```python
    inputs = keras.Input((8, 16))
    outputs = inputs + keras_moe.FeedForward(64, name="feed_forward")(inputs)
    dense = keras.Model(inputs, outputs)
    sparse = keras_moe.upcycle_model(
        dense,
        lambda: keras_moe.MaskedRouter(
            4, num_selected_experts=2, normalize_weights=True
        ),
    )
    ```

    Reference:
        [Komatsuzaki et al., 2022](https://arxiv.org/abs/2212.05055).
    """
    pairs = [name for name in layers or () if isinstance(name, (list, tuple))]
    named = [name for name in layers or () if isinstance(name, str)]
    pairs = {first: _dense_pair(model, first, second) for first, second in pairs}
    replaced_by_pairs = {second.name for _, second in pairs.values()}
    kwargs |= {
        "train_capacity_factor": train_capacity_factor,
        "eval_capacity_factor": eval_capacity_factor,
    }
    known = {layer.name for layer in find_layers(model, keras.layers.Layer)}
    if set(named) - known:
        raise ValueError(
            f"`layers` must name layers of {model.name}. "
            f"Received: {sorted(set(named) - known)}."
        )

    def replace(layer):
        if layer.name in pairs:
            layer = pairs[layer.name]
        elif layer.name in replaced_by_pairs:
            return keras.layers.Identity(name=layer.name)
        elif layer.name not in named if layers else not isinstance(layer, FeedForward):
            return None
        return upcycle(layer, make_router(), noise=noise, seed=seed, **kwargs)

    result = replace_layers(model, replace)
    if not find_layers(result, MoeLayer):
        raise ValueError(
            f"`model` must have `FeedForward` layers to replace, or `layers` must name "
            f"layers of it. Received: {model.name}."
        )
    remaining = [x.path for x in find_layers(result, FeedForward)]
    if layers is None and remaining:
        raise ValueError(
            "Only layers of functional and Sequential models can be replaced, not "
            f"layers inside of others. Received: {remaining} in {model.name}."
        )
    return result


def replace_layers(model, replace):
    """Copies a functional or Sequential model with other layers in some places.

    Args:
        model: built functional or Sequential model. It is not changed.
        replace: function of a layer, which returns the layer to use instead, or `None`
            for a copy. It sees the layers of nested models, too, but not those inside
            of other layers.

    Returns:
        A model, not compiled, with copies of the weights of all layers that were not
        replaced.

    Example:

    ```python
    inputs = keras.Input((8, 16))
    moe = keras_moe.presets.mixtral(num_experts=4, d_ff=32, name="moe")
    model = keras.Model(inputs, inputs + moe(inputs))
    smaller = keras_moe.replace_layers(
        model,
        lambda layer: (
            keras_moe.select_experts(layer, [0, 1, 3])
            if isinstance(layer, keras_moe.MoeLayer)
            else None
        ),
    )
    ```
    """
    copies = []

    def clone(layer):
        replacement = replace(layer)
        if replacement is not None:
            return replacement
        copy = type(layer).from_config(layer.get_config())
        if isinstance(layer, keras.layers.Layer):  # Not an operation, such as `+`.
            copies.append((copy, layer))
        return copy

    result = keras.models.clone_model(model, clone_function=clone, recursive=True)
    for copy, layer in copies:
        copy.set_weights(layer.get_weights())
    return result


def select_experts(layer, indices, *, noise=0.0, seed=None):
    """Creates a `MoeLayer` with some of the experts of another one.

    `[0, 2, 3]` removes the second of four experts; `[0, 1, 2, 3, 1]` duplicates it. A
    duplicate has the gate of its original, so tokens select both until their gates
    diverge; `noise` makes them different from the start.

    Args:
        layer: built `MoeLayer` with `FeedForwardExperts`. It is not changed.
        indices: list of ints, the experts in their new order; or a mask, bool `[e]`,
            true for the experts to keep.
        noise: float, the standard deviation of Gaussian noise added to the kernels and
            gates of duplicates, relative to that of each kernel. Defaults to 0.
        seed: int, the seed of the noise. Defaults to `None`.

    Returns:
        A built `MoeLayer`.

    Raises:
        TypeError: if `layer` or its experts have another type, or if `indices` are
            neither ints nor bools.
        ValueError: if the layer is not built or is quantized, if an index is out of
            range, or if fewer experts remain than a token selects.

    Example:

    ```python
    layer = keras_moe.presets.mixtral(num_experts=4, d_ff=32)
    layer.build((None, 8, 16))
    keras_moe.select_experts(layer, [0, 2, 3]).num_experts  # 3
    keras_moe.select_experts(layer, [True, False, True, True]).num_experts  # 3
    ```
    """
    if not isinstance(layer, MoeLayer) or not isinstance(
        layer.experts, FeedForwardExperts
    ):
        raise TypeError(
            "`layer` must be a `MoeLayer` with `FeedForwardExperts`. "
            f"Received: {type(layer).__name__}."
        )
    _check_can_be_copied(layer.experts)
    if layer.experts.num_identity_experts:
        raise ValueError(
            "`layer` must have no identity experts. Received: num_identity_experts="
            f"{layer.experts.num_identity_experts}."
        )
    indices = _indices(indices, layer)
    checks.number("noise", noise)
    config = layer.get_config()
    for part in ("experts", "router"):
        config[part]["config"]["num_experts"] = len(indices)
    selected = type(layer).from_config(config)
    selected.build(layer.built_shape)
    duplicate = [i in indices[:place] for place, i in enumerate(indices)]
    rng = np.random.default_rng(seed)

    def copy(weights, sources, axis):
        for weight, source in zip(weights, sources, strict=True):
            if "/hidden_" in weight.path or weight.name == "input_scale":
                weight.assign(source)  # Of the gate's inputs, not of its experts.
                continue
            values = np.take(source, indices, axis=axis)
            if weight.name == "kernel":
                noisy = np.expand_dims(duplicate, [n for n in range(values.ndim) if n])
                noisy = np.moveaxis(noisy, 0, axis)
                values = np.where(noisy, _noisy(values, noise, rng), values)
            weight.assign(values)

    for dense, source in zip(
        selected.experts.dense_layers, layer.experts.dense_layers, strict=True
    ):
        copy(dense.weights, _merged(source), axis=0)
    gates = [ops.convert_to_numpy(weight) for weight in layer.router.weights]
    copy(selected.router.weights, gates, axis=-1)
    if layer.latent_dim is not None:
        for name in ("latent_input", "latent_output"):
            weights = getattr(layer, name).get_weights()
            getattr(selected, name).set_weights(weights)
    return selected


def _indices(indices, layer):
    """Returns the indices of the selected experts as a list of ints."""
    array = np.asarray(indices)
    e = layer.num_experts
    if array.dtype.kind not in "biu" and array.size:
        raise TypeError(
            f"`indices` must be ints, or bools. Received: indices={indices!r}."
        )
    if array.dtype.kind == "b":
        if array.shape != (e,):
            raise ValueError(
                f"`indices` as a mask must have one bool for each of {e} experts. "
                f"Received: indices={indices!r}."
            )
        array = np.flatnonzero(array)
    found = array.tolist() if array.ndim == 1 else None
    if not found or not all(0 <= i < e for i in found):
        raise ValueError(
            f"`indices` must be a list of experts from 0 to {e - 1}. "
            f"Received: indices={indices!r}."
        )
    k = layer.router.min_experts_per_token or 1
    if len(found) < k:
        raise ValueError(
            f"`indices` must have at least {k} experts, which a token selects. "
            f"Received: indices={indices!r}."
        )
    return found


def _as_feed_forward(layers):
    """Returns a `FeedForward` with the weights of two dense layers."""
    if len(layers) != 2 or not all(isinstance(x, keras.layers.Dense) for x in layers):
        raise TypeError(
            "`feed_forward` must be a `FeedForward` or a list of two `Dense` layers. "
            f"Received: {[type(layer).__name__ for layer in layers]}."
        )
    inner, output = layers
    for layer in layers:
        _check_can_be_copied(layer)
    _check_fit_together(inner, output)
    result = FeedForward(
        inner.units,
        activation=inner.activation,
        use_bias=inner.use_bias,
        kernel_initializer=inner.kernel_initializer,
        bias_initializer=inner.bias_initializer,
        name=inner.name,
        dtype=inner.dtype_policy,
    )
    result.build((None, inner.kernel.shape[0]))
    for dense, source in zip(result.dense_layers, layers, strict=True):
        dense.set_weights(_merged(source))
    return result


def _check_fit_together(inner, output):
    problems = []
    if output.activation is not keras.activations.linear:
        problems.append(f"{output.name} must have no activation")
    if inner.use_bias != output.use_bias:
        problems.append("both or none must have a bias")
    if output.kernel.shape != inner.kernel.shape[::-1]:
        problems.append(
            f"kernels must be [h, f] and [f, h], not {tuple(inner.kernel.shape)} and "
            f"{tuple(output.kernel.shape)}"
        )
    if problems:
        raise ValueError(
            f"The dense layers {inner.name} and {output.name} do not fit together as "
            f"a feed-forward layer: {'; '.join(problems)}."
        )


def _dense_pair(model, first, second):
    """Returns two layers by name, if the second is the only consumer of the first."""
    inner, output = model.get_layer(first), model.get_layer(second)
    consumers = [
        x.name
        for x in model.operations
        if any(t is inner.output for t in keras.tree.flatten(x.input))
        and x is not inner
    ]
    if consumers != [second]:
        raise ValueError(
            f"{second} must be the only layer that uses the output of {first}. "
            f"Received: {consumers}."
        )
    return inner, output


def _merged(dense):
    """Returns the weights of a dense layer as numpy, with adapters in the kernel."""
    names = [weight.name for weight in dense.weights if "lora" not in weight.name]
    return [ops.convert_to_numpy(getattr(dense, name)) for name in names]


def _noisy(kernel, noise, rng):
    return kernel + noise * kernel.std() * rng.normal(size=kernel.shape)


def _check_can_be_copied(layer):
    if not layer.built:
        raise ValueError(f"{layer.name} must be built: it has no weights to copy yet.")
    for dense in getattr(layer, "dense_layers", [layer]):
        if dense.quantization_mode is not None:
            raise ValueError(
                f"{layer.name} must not be quantized to be copied. "
                f"Received: {dense.dtype_policy.name}."
            )
