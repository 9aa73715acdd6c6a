"""Pictures of routings and expert loads. Needs matplotlib."""

import numpy as np
from keras import ops

from keras_moe.routing.values import RouterMask, Rows, check_routing

# Loads above this have the same color: one peak must not hide all other differences.
HIGHEST_LOAD = 3.0
# Color maps: combine weights; loads, diverging about the mean. Background colors.
WEIGHTS, LOADS = "Blues", "RdBu_r"
DROPPED, MASKED = "#f4c7c3", "#d9d9d9"


def token_weights(routing):
    """Returns the combine weight of each token for each expert.

    Args:
        routing: `Slots`, `Rows` or `RouterMask`, from `layer.route(inputs)`,
            `keras_moe.route` or a call with `return_routing`.

    Returns:
        numpy `[g, t, e]`, 0 where the token was not dispatched to the expert.

    Example:

    ```python
    layer = keras_moe.presets.mixtral(num_experts=4, d_ff=32)
    routing = layer.route(np.ones((2, 8, 16)))
    keras_moe.visualization.token_weights(routing).shape  # (2, 8, 4)
    ```
    """
    check_routing(routing)
    if isinstance(routing, RouterMask):
        return ops.convert_to_numpy(ops.sum(routing.combine_array, axis=-1))
    token, weight, probs = (
        ops.convert_to_numpy(part)
        for part in (routing.token_index, routing.weight, routing.probs)
    )
    groups, tokens, experts = probs.shape
    if isinstance(routing, Rows):
        parts = len(token)
        group, token = np.divmod(token, tokens)
        group = np.arange(parts)[:, None] * (groups // parts) + group
        expert = _expert_of_rows(routing, experts).reshape(token.shape)
    else:
        group = np.arange(groups)[:, None, None]
        expert = np.arange(experts)[:, None]
        weight = np.where(token >= 0, weight, 0)
    result = np.zeros((groups, tokens, experts), "float32")
    np.add.at(result, (*np.broadcast_arrays(group, token, expert),), weight)
    return result


def _expert_of_rows(routing, experts):
    """Returns the expert of each row, numpy `[p·a]`; 0 for rows without a token."""
    sizes = ops.convert_to_numpy(routing.group_sizes).reshape(-1, experts)
    rows = np.size(ops.convert_to_numpy(routing.token_index)) // len(sizes)
    expert = [np.repeat(np.arange(experts), n) for n in sizes]
    return np.concatenate([np.pad(x, (0, rows - len(x))) for x in expert])


def draw_routing(routing, labels=None, group=0, title=None):
    """Draws the combine weights of a group: one row per token, one column per expert.

    Tokens without an expert have a red row if they were dropped, and a grey one if they
    are masked. (A `RouterMask` does not tell these apart: all are red.) The color scale
    is that of all groups of the routing.

    Args:
        routing: see `token_weights`.
        labels: list of strings, one per token of the group. Defaults to `None`, the
            tokens' positions.
        group: int, the group to draw. Defaults to 0.
        title: string. Defaults to the numbers of tokens, dropped and masked ones.

    Returns:
        A `matplotlib.figure.Figure`.

    Raises:
        ValueError: if the number of labels is not the number of tokens.

    Example:

    ```python
    layer = keras_moe.presets.switch(num_experts=4, d_ff=32)
    routing = layer.route(np.random.default_rng(0).normal(size=(2, 8, 16)))
    keras_moe.visualization.draw_routing(routing).savefig("routing.png")
    ```
    """
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch
    from matplotlib.ticker import MaxNLocator

    of_all = token_weights(routing)
    weights = of_all[group]
    tokens, experts = weights.shape
    if labels is not None and len(labels) != tokens:
        raise ValueError(
            f"`labels` must have one string for each of {tokens} tokens. "
            f"Received: {len(labels)}."
        )
    masked = np.zeros(tokens, bool)
    if hasattr(routing, "probs"):
        masked = ~np.any(ops.convert_to_numpy(routing.probs[group]) != 0, axis=-1)
    served = ops.convert_to_numpy(routing.slots_per_token)[group] > 0
    dropped = ~served & ~masked

    size = (min(3.5 + 0.3 * experts, 14), min(1.6 + 0.16 * tokens, 9))
    figure = Figure(figsize=size, dpi=100, layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(
        np.ma.masked_equal(weights, 0),
        cmap=WEIGHTS,
        vmin=0,
        vmax=of_all.max() or 1,
        aspect="auto",
    )
    for rows, color in ((dropped, DROPPED), (masked, MASKED)):
        for row in np.flatnonzero(rows):
            axes.axhspan(row - 0.5, row + 0.5, color=color, linewidth=0)
    axes.set(xlabel="expert", ylabel="token")
    counts = f"{tokens} tokens, {dropped.sum()} dropped, {masked.sum()} masked"
    axes.set_title(f"group {group}: {counts}" if title is None else title, fontsize=10)
    axes.xaxis.set_major_locator(MaxNLocator(16, integer=True))
    if labels is None:
        axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    else:
        axes.set_yticks(range(tokens), labels, fontsize=min(8, 450 / tokens))
    if tokens <= 64 and experts <= 64:  # Lines between cells, if these are visible.
        axes.set_xticks(np.arange(experts + 1) - 0.5, minor=True)
        axes.set_yticks(np.arange(tokens + 1) - 0.5, minor=True)
        axes.grid(which="minor", color="lightgrey", linewidth=0.5)
        axes.tick_params(which="minor", length=0)
    keys = [
        Patch(color=color, label=label)
        for rows, color, label in (
            (dropped, DROPPED, "dropped"),
            (masked, MASKED, "masked"),
        )
        if rows.any()
    ]
    if keys:
        figure.legend(handles=keys, loc="outside lower center", ncols=2, fontsize=8)
    figure.colorbar(image, label="combine weight")
    return figure


def draw_loads(records):
    """Draws the load of each layer's experts: a heat map over time, and the last one.

    Loads are relative to the mean load, so that 1 is balanced. All layers share one
    color scale.

    Args:
        records: list of dicts as in `RoutingMonitor.history`, of one phase.

    Returns:
        A `matplotlib.figure.Figure`.

    Raises:
        ValueError: if `records` is empty.

    Example:

    ```python
    records = [
        {"layer": "moe", "batch": None, "epoch": 0, "step": 9, "load": [0.3, 0.7]},
        {"layer": "moe", "batch": None, "epoch": 1, "step": 18, "load": [0.4, 0.6]},
    ]
    keras_moe.visualization.draw_loads(records).savefig("loads.png")
    ```
    """
    from matplotlib.colors import TwoSlopeNorm
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    if not records:
        raise ValueError("`records` must hold at least one record. Received: [].")
    layers = list(dict.fromkeys(record["layer"] for record in records))
    figure = Figure(
        figsize=(10, 0.8 + 2.6 * len(layers)), dpi=100, layout="constrained"
    )
    panels = figure.subplots(len(layers), 2, squeeze=False, width_ratios=(3, 1))
    norm = TwoSlopeNorm(vmin=0.0, vcenter=1.0, vmax=HIGHEST_LOAD)
    for layer, (over_time, last) in zip(layers, panels, strict=True):
        of_layer = [record for record in records if record["layer"] == layer]
        batches = [record for record in of_layer if record["batch"] is not None]
        drawn = batches or of_layer
        loads = np.array([record["load"] for record in drawn])
        experts = loads.shape[1]
        loads *= experts
        if batches:
            edges, unit = [0, *(record["step"] for record in batches)], "training step"
        else:
            edges = np.arange(len(loads) + 1) - 0.5
            unit = "evaluation" if drawn[-1]["epoch"] is None else "epoch"
        image = over_time.pcolormesh(
            edges, np.arange(experts + 1) - 0.5, loads.T, cmap=LOADS, norm=norm
        )
        over_time.set(title=layer, ylabel="expert", xlabel=unit)
        height = 0.8 if experts <= 32 else 1.0
        last.barh(range(experts), loads[-1], color="grey", height=height)
        last.axvline(1, color="black", linestyle="--", linewidth=1)
        when = f"step {drawn[-1]['step']}" if batches else f"{unit} {len(loads) - 1}"
        last.set(title=when, xlabel="load / mean load")
        last.set(ylim=(-0.5, experts - 0.5))
        for axis in (over_time.xaxis, over_time.yaxis, last.yaxis):
            axis.set_major_locator(MaxNLocator(8, integer=True))
    highest = max(last.get_xlim()[1] for last in panels[:, 1])
    for last in panels[:, 1]:
        last.set_xlim(0, highest)
    figure.colorbar(
        image, ax=panels[:, 0], label="load / mean load", extend="max", shrink=0.9
    )
    return figure
