"""Growing: a dense layer into experts, and experts into more or fewer."""

import numpy as np
from keras import ops

from keras_moe import checks
from keras_moe.experts import FeedForward, FeedForwardExperts
from keras_moe.moe_layer import MoeLayer


def upcycle(feed_forward, router, *, noise=0.0, seed=None, **kwargs):
    """Makes a `MoeLayer` of a trained `FeedForward`: each expert is a copy of it.

    With weights that are 1 in sum (`normalize_weights=True`) and nothing
    dropped, its outputs are those of the dense layer.

    Args:
        feed_forward: a built `FeedForward`; it stays as it is.
        router: a `Router`, not built, with as many experts as there are to be.
        noise: float, the standard deviation of Gaussian noise that is added to
            the copies' kernels, in units of each kernel's own.
        seed: int, of the noise.
        **kwargs: forwarded to `MoeLayer`; the name is the dense layer's by
            default, which `keras.models.clone_model` asks for.

    Returns:
        A built `MoeLayer`.

    Raises:
        TypeError: if `feed_forward` is something else.
        ValueError: if it is not built, or quantised.

    Reference:
        [Komatsuzaki et al., 2022](https://arxiv.org/abs/2212.05055).
    """
    if not isinstance(feed_forward, FeedForward):
        raise TypeError(
            "`feed_forward` must be a `FeedForward`. "
            f"Received: {type(feed_forward).__name__}."
        )
    _check_can_be_copied(feed_forward)
    checks.number("noise", noise)
    config = {**feed_forward.get_config(), "name": "experts"}
    experts = FeedForwardExperts.from_config(
        {**config, "num_experts": router.num_experts}
    )
    layer = MoeLayer(experts, router, **{"name": feed_forward.name, **kwargs})
    layer.build((None, None, feed_forward.output_layer.units))
    rng = np.random.default_rng(seed)
    for dense, source in zip(
        experts.dense_layers, feed_forward.dense_layers, strict=True
    ):
        for weight, value in zip(dense.weights, source.weights, strict=True):
            copies = np.broadcast_to(ops.convert_to_numpy(value), weight.shape)
            is_kernel = weight.name == "kernel"
            weight.assign(_noisy(copies, noise, rng) if is_kernel else copies)
    return layer


def select_experts(layer, indices, *, noise=0.0, seed=None):
    """Makes a `MoeLayer` of some of the experts of another one.

    `[0, 2, 3]` leaves out the second of four; `[0, 1, 2, 3, 1]` has it twice. A
    copy has the gate of its original too, so that tokens want both until the
    gates part; `noise` helps.

    Args:
        layer: a built `MoeLayer` of `FeedForwardExperts`; it stays as it is.
        indices: the experts that are to be there, in their order.
        noise: float, the standard deviation of Gaussian noise that is added to
            the kernels of experts and gate where an expert is taken again, in
            units of each kernel's own.
        seed: int, of the noise.

    Returns:
        A built `MoeLayer` with `len(indices)` experts.

    Raises:
        TypeError: for another layer or other experts.
        ValueError: if the layer is not built, or quantised; for indices that
            are none of its experts.
    """
    if not isinstance(layer, MoeLayer) or not isinstance(
        layer.experts, FeedForwardExperts
    ):
        raise TypeError(
            "`layer` must be a `MoeLayer` of `FeedForwardExperts`. "
            f"Received: {type(layer).__name__}."
        )
    _check_can_be_copied(layer.experts)
    indices = [int(i) for i in indices]
    if not indices or not all(0 <= i < layer.num_experts for i in indices):
        raise ValueError(
            f"`indices` must name experts from 0 to {layer.num_experts - 1}. "
            f"Received: indices={indices}."
        )
    k = layer.experts_per_token or 1
    if len(indices) < k:
        raise ValueError(
            f"`indices` must name at least {k} experts, as a token goes to so many. "
            f"Received: indices={indices}."
        )
    checks.number("noise", noise)
    config = layer.get_config()
    for part in ("experts", "router"):
        config[part]["config"]["num_experts"] = len(indices)
    selected = type(layer).from_config(config)
    selected.build((None, None, layer.experts.output_layer.units))
    again = [i in indices[:place] for place, i in enumerate(indices)]
    rng = np.random.default_rng(seed)

    def take(weights, sources, axis):
        for weight, source in zip(weights, sources, strict=True):
            source = ops.convert_to_numpy(source)
            if "/hidden_" in weight.path:  # Of the gate, but of no one expert.
                weight.assign(source)
                continue
            values = np.take(source, indices, axis=axis)
            if weight.name == "kernel":
                chosen = np.expand_dims(again, [n for n in range(values.ndim) if n])
                chosen = np.moveaxis(chosen, 0, axis)
                values = np.where(chosen, _noisy(values, noise, rng), values)
            weight.assign(values)

    take(selected.experts.weights, layer.experts.weights, axis=0)
    take(selected.router.weights, layer.router.weights, axis=-1)
    return selected


def _noisy(kernel, noise, rng):
    return kernel + noise * kernel.std() * rng.normal(size=kernel.shape)


def _check_can_be_copied(layer):
    if not layer.built:
        raise ValueError(f"{layer.name} must be built: it has no weights to copy yet.")
    for dense in layer.dense_layers:
        if dense.quantization_mode is not None or dense.lora_enabled:
            raise ValueError(
                f"{layer.name} must be neither quantised nor have adapters to be "
                f"copied. Received: {dense.dtype_policy.name}, "
                f"lora_enabled={dense.lora_enabled}."
            )
