"""Inspection of a model's Mixture-of-Experts layers: their cost and their routing."""

import math

import keras
import numpy as np

from keras_moe.layers.base_layer import BaseMoeLayer
from keras_moe.layers.moe_layer import MoeLayer
from keras_moe.routing import grouping
from keras_moe.utils import checks
from keras_moe.utils.traversal import find_layers


def route(model, x, training=False):
    """Returns the routing of each Mixture-of-Experts layer of a model for one batch.

    The layers add no losses and no metrics meanwhile. A layer that is called more than
    once returns the routing of its last call.

    Args:
        model: a built model or layer.
        x: inputs of the model.
        training: bool, whether to call the model in training mode. Defaults to `False`.

    Returns:
        A dict of layer paths to `Slots`, `Rows` or `RouterMask`.

    Raises:
        ValueError: if the model has no Mixture-of-Experts layer, or is not built.

    Example:

    ```python
    inputs = keras.Input((8, 16))
    layer = keras_moe.presets.mixtral(num_experts=4, d_ff=32, name="moe")
    model = keras.Model(inputs, inputs + layer(inputs))
    routings = keras_moe.route(model, np.ones((2, 8, 16)))
    routings["moe"].group_sizes  # the rows of each expert
    ```
    """
    routings = {}

    def recording(layer):
        compute_routing = layer.compute_routing

        def compute_and_record(tokens, mask, training, report=True, **kwargs):
            routing = compute_routing(tokens, mask, training, report=False, **kwargs)
            routings[layer.path] = routing
            return routing

        return compute_and_record

    layers = _built_moe_layers(model)
    for layer in layers:
        layer.compute_routing = recording(layer)
    try:
        model(
            keras.tree.map_structure(keras.ops.convert_to_tensor, x), training=training
        )
    finally:
        for layer in layers:
            del layer.compute_routing
    return routings


def _built_moe_layers(model):
    layers = find_layers(model, BaseMoeLayer)
    if not layers or not all(layer.built for layer in layers):
        raise ValueError(
            "`model` must be built and have Mixture-of-Experts layers. "
            f"Received: {model.name} with {len(layers)}."
        )
    return layers


def summary(model, tokens_per_group=None, print_fn=print):
    """Prints the Mixture-of-Experts layers of a model and their cost.

    The columns: `experts`; `k`, experts per token; `parameters`; `active`, the
    parameters that process a token; `FLOPs/token`, in inference, where each slot is
    computed, filled or not; then, for training and evaluation, the slots of an expert
    for a group, and `random drops`, the fraction of assignments that would be dropped
    if the tokens of a group selected experts independently and uniformly. Real data
    drops more, since similar tokens select the same experts: the metric
    `fraction_tokens_left_behind` measures it.

    Args:
        model: a built model or layer.
        tokens_per_group: int, the number of tokens that are routed together. Defaults
            to that of the shape with which each layer was built.
        print_fn: function that receives each line. Defaults to `print`.

    Raises:
        ValueError: if the model has no Mixture-of-Experts layer, or is not built; if
            the tokens per group of a layer with a capacity are unknown.

    Example:

    ```python
    inputs = keras.Input((32, 16))
    layer = keras_moe.presets.switch(num_experts=8, d_ff=64, name="moe")
    model = keras.Model(inputs, inputs + layer(inputs))
    keras_moe.summary(model)
    ```
    """
    layers = _built_moe_layers(model)
    header = ("layer", "experts", "k", "parameters", "active", "FLOPs/token")
    header += ("train: slots", "random drops", "eval: slots", "random drops")
    rows, active = [header], model.count_params()
    for layer in layers:
        cost = layer_cost(layer, _group_size(layer, tokens_per_group))
        if active is not None:
            of_layer = cost["active_parameters"]
            active = of_layer and active + of_layer - cost["parameters"]
        row = [layer.path, layer.num_experts, layer.experts_per_token or "-"]
        for name in ("parameters", "active_parameters", "flops_per_token"):
            row.append("-" if cost[name] is None else f"{cost[name]:,}")
        for phase in ("train", "eval"):
            capacity, drops = cost[f"{phase}_capacity"], cost[f"{phase}_drops"]
            row.append("no limit" if capacity is None else capacity)
            row.append("-" if drops is None else f"{drops:.1%}")
        rows.append(row)
    widths = [max(len(str(row[i])) for row in rows) for i in range(len(header))]
    for row in rows:
        cells = [str(cell).rjust(w) for cell, w in zip(row, widths, strict=True)]
        print_fn("  ".join([cells[0].strip().ljust(widths[0]), *cells[1:]]))
    total = f"{model.name}: {model.count_params():,} parameters"
    print_fn(
        f"{total}." if active is None else f"{total}, {active:,} active per token."
    )


def _group_size(layer, tokens_per_group):
    if tokens_per_group is not None:
        return tokens_per_group
    size = grouping.tokens_per_group(layer.built_shape, layer.examples_per_group)
    if size is not None:
        return size
    if layer.count_slots(1, training=True) is layer.count_slots(1, False) is None:
        return 1  # Without a capacity it does not matter.
    raise ValueError(
        f"{layer.path} was built for inputs of unknown length, on which its capacity "
        "depends: set `tokens_per_group`, the number of tokens routed together."
    )


def layer_cost(layer, tokens_per_group):
    """Returns the cost of a built Mixture-of-Experts layer.

    A parameter costs 2 FLOPs per token that it processes. A token is processed by `k`
    experts; with a capacity, every slot is computed, filled or not.

    Args:
        layer: a built `MoeLayer`, `HierarchicalMoeLayer` or `SoftMoeLayer`.
        tokens_per_group: int.

    Returns:
        A dict. `parameters`; `active_parameters`, those that process a token (on
        average, where experts choose); `flops_per_token`, in inference; and for `train`
        and `eval` each `_capacity`, the slots of an expert for a group, and `_drops`,
        the fraction of assignments that would be dropped if the tokens of a group
        selected experts independently and uniformly. A value that is not defined, or
        not known, is `None`.
    """
    tokens = checks.whole_number("tokens_per_group", tokens_per_group)
    experts = layer.num_experts
    parameters = layer.count_params()
    of_experts = layer.experts.count_params()
    k = layer.experts_per_token
    result = {"parameters": parameters}
    for phase, training in (("train", True), ("eval", False)):
        slots = layer.count_slots(tokens, training)
        computed = k if slots is None else slots / tokens
        capacity = None if slots is None else slots // experts
        drops = None
        if capacity and k and _has_fixed_number(layer):
            drops = expected_drops(tokens, experts, k, capacity)
        result |= {f"{phase}_capacity": capacity, f"{phase}_drops": drops}

    def with_experts(per_token):
        """The parameters of `per_token` experts and of all other parts."""
        if per_token is None:
            return None
        return parameters - of_experts + of_experts * per_token / experts

    active = with_experts(computed if k is None else k)
    met = with_experts(computed)
    result["active_parameters"] = active and round(active)
    result["flops_per_token"] = met and round(2 * met)
    return result


def _has_fixed_number(layer):
    """Returns whether every token of a layer selects the same number of experts."""
    if not isinstance(layer, MoeLayer):
        return False
    return layer.router.min_experts_per_token == layer.router.experts_per_token


def expected_drops(tokens, num_experts, k, capacity):
    """Returns the fraction of assignments dropped for independent, uniform choices.

    Each of `t` tokens selects `k` of `e` experts independently of the others, so the
    load of an expert has a binomial distribution with mean `t · k / e`.

    Args:
        tokens: int `t`.
        num_experts: int `e`.
        k: int.
        capacity: int `c`, the slots of an expert.

    Returns:
        A float, `E[max(load - c, 0)] · e / (t · k)`.
    """
    share = k / num_experts
    if share >= 1:
        return max(0.0, 1 - capacity / tokens)
    loads = np.arange(capacity + 1, tokens + 1)
    ways = [
        math.lgamma(tokens + 1) - math.lgamma(n + 1) - math.lgamma(tokens - n + 1)
        for n in loads
    ]
    log_p = ways + loads * math.log(share) + (tokens - loads) * math.log1p(-share)
    return float(np.sum(np.exp(log_p) * (loads - capacity)) / (tokens * share))
