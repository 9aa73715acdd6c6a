"""Pictures of routings. They need matplotlib."""

import numpy as np
from keras import ops
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from keras_moe.routing import RouterMask, Rows, check_routing

# Readable in grey: the more, the lighter.
COLOURS = "viridis"
# Loads above look alike: one peak would leave all else dark.
HIGHEST = 3.0


def token_weights(routing):
    """With what weight each token goes to each expert.

    Args:
        routing: `Slots`, `Rows` or `RouterMask`, of `layer.route(inputs)` or a
            call with `return_routing`.

    Returns:
        numpy `[g, t, e]`, 0 where the token does not go.
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
    """numpy `[p·a]`: each row's expert; what comes last, of none, has weight 0."""
    sizes = ops.convert_to_numpy(routing.group_sizes).reshape(-1, experts)
    rows = np.size(ops.convert_to_numpy(routing.token_index)) // len(sizes)
    expert = [np.repeat(np.arange(experts), n) for n in sizes]
    return np.concatenate([np.pad(x, (0, rows - len(x))) for x in expert])


def draw_routing(routing, labels=None, group=0):
    """Draws which token went to which expert: a row a token, the more the darker.

    Args:
        routing: see `token_weights`.
        labels: a list of strings, one for each token of the group, or `None`.
        group: int, the group to draw.

    Returns:
        A `matplotlib.figure.Figure`.

    Raises:
        ValueError: for another number of labels.
    """
    weights = token_weights(routing)[group]
    tokens, experts = weights.shape
    if labels is not None and len(labels) != tokens:
        raise ValueError(
            f"`labels` must be one for each of {tokens} tokens. "
            f"Received: {len(labels)}."
        )
    size = (min(3 + 0.3 * experts, 14), min(1.5 + 0.2 * tokens, 14))
    figure = Figure(figsize=size, dpi=120, layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(weights, cmap="Greys", vmin=0, aspect="auto")
    axes.set(xlabel="expert", ylabel="token")
    axes.xaxis.set_major_locator(MaxNLocator(16, integer=True))
    if labels is None:
        axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    else:
        axes.set_yticks(range(tokens), labels, fontsize=8)
    if tokens <= 64 and experts <= 64:  # Lines between cells, as long as they are.
        axes.set_xticks(np.arange(experts + 1) - 0.5, minor=True)
        axes.set_yticks(np.arange(tokens + 1) - 0.5, minor=True)
        axes.grid(which="minor", color="lightgrey", linewidth=0.5)
        axes.tick_params(which="minor", length=0)
    figure.colorbar(image, label="weight")
    return figure


def draw_loads(records):
    """Draws the load of experts: over time as a heat map, and the last as bars.

    Args:
        records: a list of dicts as of `RoutingMonitor.history`, of one phase.

    Returns:
        A `matplotlib.figure.Figure`.

    Raises:
        ValueError: if there is no record.
    """
    if not records:
        raise ValueError("There is no record to draw. Train with the monitor first.")
    layers = list(dict.fromkeys(record["layer"] for record in records))
    figure = Figure(figsize=(10, 0.5 + 3 * len(layers)), dpi=120, layout="constrained")
    panels = figure.subplots(len(layers), 2, squeeze=False, width_ratios=(3, 1))
    for layer, (over_time, last) in zip(layers, panels, strict=True):
        of_layer = [record for record in records if record["layer"] == layer]
        batches = [record for record in of_layer if record["batch"] is not None]
        loads = np.array([record["load"] for record in batches or of_layer])
        experts = loads.shape[1]
        loads *= experts
        if batches:
            edges = [0, *(record["step"] for record in batches)]
        else:
            edges = np.arange(len(loads) + 1) - 0.5
        image = over_time.pcolormesh(
            edges,
            np.arange(experts + 1) - 0.5,
            loads.T,
            cmap=COLOURS,
            vmin=0,
            vmax=min(loads.max(), HIGHEST),
        )
        over_time.set(title=layer, ylabel="expert")
        over_time.set_xlabel("training step" if batches else "epoch")
        extend = "max" if loads.max() > HIGHEST else "neither"
        figure.colorbar(image, label="load (1: mean)", extend=extend)
        height = 0.8 if experts <= 32 else 1.0
        last.barh(range(experts), loads[-1], color="grey", height=height)
        last.axvline(1, color="black", linestyle="--", linewidth=1)
        last.set(title="now", xlabel="load (1: mean)", ylim=(-0.5, experts - 0.5))
        for axis in (over_time.xaxis, over_time.yaxis, last.yaxis):
            axis.set_major_locator(MaxNLocator(8, integer=True))
    return figure
