"""What a model's Mixture-of-Experts layers are, and what they cost."""

import math

import keras
import numpy as np

from keras_moe import checks
from keras_moe.base_layer import BaseMoeLayer
from keras_moe.capacity_layer import CapacityMoeLayer


def layers_within(layer, kind):
    """The layers of a kind in a model or layer, however nested, each once."""
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


def costs(layer, tokens_per_group):
    """What a built Mixture-of-Experts layer costs.

    A parameter counts as 2 FLOPs for each token that it meets. A token meets
    `k` experts; where experts have slots, these are computed, full or not.

    Args:
        layer: a built `MoeLayer`, `HierarchicalMoeLayer` or `SoftMoeLayer`.
        tokens_per_group: int.

    Returns:
        A dict:
        `parameters`, `active_parameters` that a token meets (in the mean, where
        experts choose); `flops_per_token`, outside training; and for
        `train` and `eval` each `_capacity`, the slots of an expert for a group,
        and `_drops`, the share of choices that find no slot when a router's
        choices are random and balanced; `None` without slots, or where no
        token chooses.
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
        if capacity and k and isinstance(layer, CapacityMoeLayer):
            drops = expected_drops(tokens, experts, k, capacity)
        result |= {f"{phase}_capacity": capacity, f"{phase}_drops": drops}
    met = computed if k is None else k
    of_others = parameters - of_experts
    result["active_parameters"] = round(of_others + of_experts * met / experts)
    result["flops_per_token"] = round(2 * (of_others + of_experts * computed / experts))
    return result


def expected_drops(tokens, num_experts, k, capacity):
    """The share of choices that find their expert full.

    Each of `t` tokens chooses `k` of `e` experts at random, so that an expert
    is wanted by a binomial number of them, with mean `t · k / e`.

    Args:
        tokens: int `t`.
        num_experts: int `e`.
        k: int.
        capacity: int `c`, the slots of an expert.

    Returns:
        float, `E[max(wanted - c, 0)] · e / (t · k)`.
    """
    share = k / num_experts
    if share >= 1:
        return max(0.0, 1 - capacity / tokens)
    wanted = np.arange(capacity + 1, tokens + 1)
    ways = [
        math.lgamma(tokens + 1) - math.lgamma(n + 1) - math.lgamma(tokens - n + 1)
        for n in wanted
    ]
    log_p = ways + wanted * math.log(share) + (tokens - wanted) * math.log1p(-share)
    return float(np.sum(np.exp(log_p) * (wanted - capacity)) / (tokens * share))


def summary(model, tokens_per_group, print_fn=print):
    """Prints what the Mixture-of-Experts layers of a model are, and cost.

    Args:
        model: a built model or layer.
        tokens_per_group: int, for capacities: the tokens that are routed
            together, such as the length of an example.
        print_fn: function that is given each line.

    Raises:
        ValueError: if there is no such layer, or it is not built.
    """
    layers = layers_within(model, BaseMoeLayer)
    if not layers or not all(layer.built for layer in layers):
        raise ValueError(
            "`model` must have Mixture-of-Experts layers, and be built. "
            f"Received: {model.name} with {len(layers)}."
        )
    header = ("layer", "experts", "k", "parameters", "active", "FLOPs/token")
    header += ("train: slots", "drops", "eval: slots", "drops")
    rows, active = [header], model.count_params()
    for layer in layers:
        cost = costs(layer, tokens_per_group)
        active += cost["active_parameters"] - cost["parameters"]
        row = [layer.path, layer.num_experts, layer.experts_per_token or "-"]
        row += [f"{cost[name]:,}" for name in ("parameters", "active_parameters")]
        row.append(f"{cost['flops_per_token']:,}")
        for phase in ("train", "eval"):
            capacity, drops = cost[f"{phase}_capacity"], cost[f"{phase}_drops"]
            row.append("no limit" if capacity is None else capacity)
            row.append("-" if drops is None else f"{drops:.1%}")
        rows.append(row)
    widths = [max(len(str(row[i])) for row in rows) for i in range(len(header))]
    for row in rows:
        cells = [str(cell).rjust(w) for cell, w in zip(row, widths, strict=True)]
        print_fn("  ".join([cells[0].strip().ljust(widths[0]), *cells[1:]]))
    print_fn(
        f"{model.name}: {model.count_params():,} parameters, of which a token meets "
        f"{active:,}."
    )
