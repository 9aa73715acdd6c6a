"""Tables and pictures of what `bench.py` and `acceleration.py` measured.

    python benchmarks/report.py [docs/benchmarks]

reads `<backend>.json` and `<backend>_accelerated.json`, and writes `tables.md`,
`base.png` and `axes.png` there.
"""

import json
import pathlib
import sys

import numpy as np
from matplotlib.figure import Figure

BACKENDS = {"tensorflow": "TensorFlow", "jax": "JAX", "torch": "PyTorch"}
COLOURS = {"tensorflow": "darkorange", "jax": "navy", "torch": "crimson"}
STYLES = {"capacity": "s-", "dropless": "o--"}
AXES = {
    "experts": "experts",
    "examples": "tokens",
    "group": "tokens in a group",
    "k": "experts per token",
    "width": "width h",
    "share": "share of tokens on one expert",
}
TOKENS = 512  # of an example


def main():
    folder = pathlib.Path(*sys.argv[1:2] or ["docs/benchmarks"])
    results = {
        backend: json.loads((folder / f"{backend}.json").read_text())
        for backend in BACKENDS
        if (folder / f"{backend}.json").exists()
    }
    for backend, result in results.items():
        file = folder / f"{backend}_accelerated.json"
        result["accelerated"] = json.loads(file.read_text()) if file.exists() else {}
    parts = [base_table, parts_table, peers_table, accelerated_table]
    parts += [axes_table, decoding_table, machines]
    (folder / "tables.md").write_text(
        "# Measurements\n\nWritten by `make bench` and `make bench-hub`; "
        "[Performance](../performance.md) explains them.\n\n"
        + "\n\n".join("\n".join(part(results)) for part in parts)
        + "\n"
    )
    draw_base(results, folder / "base.png")
    draw_axes(results, folder / "axes.png")


def median(timed):
    return float(np.median(timed["ms"]))


def ratio(timed, limit):
    """Median and quartiles of the rounds' ratios: `(low, middle, high)`."""
    return np.percentile(np.divide(timed["ms"], limit["ms"]), [25, 50, 75])


def with_spread(timed, limit):
    low, middle, high = ratio(timed, limit)
    return f"{middle:.2f} ({low:.2f} to {high:.2f})"


def table(header, rows):
    yield f"| {' | '.join(header)} |"
    yield f"|{'---|' * len(header)}"
    for row in rows:
        yield f"| {' | '.join(map(str, row))} |"


def value_of(axis, value):
    """An axis's value as it is shown: tokens rather than examples."""
    return value * TOKENS if axis in ("examples", "group") else value


# Tables


def base_table(results):
    yield "## The base point"
    yield ""
    yield "8 × 512 tokens, one group, h 256, f 1024, k 2, float32; the dense layer has"
    yield "f 2048. Medians; in brackets the quartiles of the rounds' ratios. The peak"
    yield "is what a step adds to the memory that the process holds, which is next to"
    yield "nothing where an allocator keeps what it once had, as TensorFlow's does."
    for backend, result in results.items():
        base = result["base"]
        yield f"\n### {BACKENDS[backend]}\n"
        yield from table(
            ("", "forward, ms", "over dense", "step, ms", "over dense", "peak, MB"),
            (
                (
                    name,
                    f"{median(x['forward']):.0f}",
                    with_spread(x["forward"], base["dense"]["forward"]),
                    f"{median(x['step']):.0f}",
                    with_spread(x["step"], base["dense"]["step"]),
                    x["step"]["peak_mb"],
                )
                for name, x in base.items()
            ),
        )


def peers_table(results):
    yield "## Other packages"
    yield ""
    yield "Equal weights and, to the difference that is given, equal outputs. Ratios"
    yield "are theirs over ours: above 1 ours is faster."
    yield ""
    yield from table(
        ("", "on", "difference", "forward", "step", "peak of a step, MB"),
        (
            (
                name,
                BACKENDS[backend],
                f"{x['difference']:.0e}",
                with_spread(x["theirs"]["forward"], x["ours"]["forward"]),
                with_spread(x["theirs"]["step"], x["ours"]["step"]),
                f"{x['theirs']['step']['peak_mb']}, {x['ours']['step']['peak_mb']}",
            )
            for backend, result in results.items()
            for name, x in result["peers"].items()
        ),
    )


def parts_table(results):
    yield "## Where the time goes"
    yield ""
    yield "A training step of the layer, and of its parts alone, in ms and over the"
    yield "dense layer's. Each has its own model, loss and optimizer around it, so that"
    yield "they add up to a little more than the whole."
    points = zip(*(result["parts"] for result in results.values()), strict=True)
    for at_backends in points:
        experts, width = at_backends[0]["experts"], at_backends[0]["width"]
        yield f"\n### {experts} experts, h {width}\n"
        yield from table(
            ("", *(BACKENDS[backend] for backend in results)),
            (
                (name, *(over_dense(point, name) for point in at_backends))
                for name in at_backends[0]
                if name not in ("experts", "width")
            ),
        )


def over_dense(point, name):
    timed, dense = point[name]["step"], point["dense"]["step"]
    return f"{median(timed):.0f}: {ratio(timed, dense)[1]:.2f}"


def accelerated_table(results):
    yield "## Models of keras-hub, accelerated"
    yield ""
    yield "Two layers, h 256, four texts of 256 tokens; `generate` writes 32 more after"
    yield "224. Times of the model as it is over those after `accelerate`; the largest"
    yield "difference of their logits; and whether they wrote the same text."
    yield ""
    yield from table(
        ("", "on", "difference", "same text", "forward", "step", "generate"),
        (
            (
                name,
                BACKENDS[backend],
                f"{x['difference']:.0e}",
                "yes" if x["same_text"] else "no",
                *(
                    with_spread(x["plain"][kind], x["accelerated"][kind])
                    for kind in ("forward", "step", "generate")
                ),
            )
            for backend, result in results.items()
            for name, x in result["accelerated"].items()
        ),
    )


def axes_table(results):
    yield "## One axis at a time"
    yield ""
    yield "A training step, in ms and over the dense layer with the same active"
    yield "FLOPs, with a capacity factor of k and dropless. All else is as at the base"
    yield "point, but for groups (up to 32 × 512 tokens) and the share on one expert"
    yield "(k 1)."
    for axis, label in AXES.items():
        yield f"\n### {label}\n"
        columns = ("dense, ms", "capacity", "dropless")
        yield from table(
            ("", *(f"{BACKENDS[x]}: {c}" for x in results for c in columns)),
            rows_of(results, axis),
        )


def rows_of(results, axis):
    points = zip(*(result["axes"][axis] for result in results.values()), strict=True)
    for at_backends in points:
        row = [value_of(axis, at_backends[0][axis])]
        for point in at_backends:
            row.append(f"{median(point['dense']['step']):.0f}")
            row.extend(over_dense(point, kind) for kind in STYLES)
        yield row


def decoding_table(results):
    yield "## One token"
    yield ""
    yield "The forward pass of one token, in ms: what writing costs a layer."
    yield ""
    yield from table(
        ("experts", "on", "dense", "capacity", "dropless"),
        (
            (
                point["experts"],
                BACKENDS[backend],
                *(
                    f"{median(point[kind]['forward']):.1f}"
                    for kind in ("dense", *STYLES)
                ),
            )
            for backend, result in results.items()
            for point in result["decoding"]
        ),
    )


def machines(results):
    yield "## The machine"
    yield ""
    for backend, result in results.items():
        facts = ", ".join(f"{name} {x}" for name, x in result["machine"].items())
        yield f"- {BACKENDS[backend]}: {facts}"


# Pictures


def draw_base(results, file):
    figure = Figure(figsize=(10, 4.5), dpi=120, layout="constrained")
    axes = figure.subplots(1, len(results), sharey=True, squeeze=False)[0]
    for axis, (backend, result) in zip(axes, results.items(), strict=True):
        base = {n: x for n, x in result["base"].items() if "XLA" not in n}
        names = list(base)[::-1]
        ratios = [ratio(base[n]["step"], base["dense"]["step"]) for n in names]
        low, middle, high = np.transpose(ratios)
        error = [middle - low, high - middle]
        axis.barh(names, middle, xerr=error, color=COLOURS[backend], alpha=0.7)
        axis.axvline(1, color="black", linestyle="--", linewidth=1)
        axis.set(title=BACKENDS[backend], xlabel="training step over dense")
        axis.grid(axis="x", alpha=0.3)
    figure.savefig(file)


def draw_axes(results, file):
    figure = Figure(figsize=(10, 6.5), dpi=120, layout="constrained")
    for axis, panel in zip(AXES, figure.subplots(2, 3).flat, strict=True):
        for backend, result in results.items():
            points = result["axes"][axis]
            values = [value_of(axis, point[axis]) for point in points]
            for kind, style in STYLES.items():
                ratios = [ratio(p[kind]["step"], p["dense"]["step"])[1] for p in points]
                label = f"{BACKENDS[backend]}, {kind}"
                panel.plot(values, ratios, style, color=COLOURS[backend], label=label)
        panel.axhline(1, color="black", linestyle=":", linewidth=1)
        panel.set(xlabel=AXES[axis], ylim=(0, None))
        if axis != "share":
            panel.set_xscale("log", base=2)
            panel.set_xticks(values, [f"{v:,}" for v in values])
        panel.grid(alpha=0.3)
    figure.supylabel("training step over dense")
    handles, labels = panel.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=3)
    figure.savefig(file)


if __name__ == "__main__":
    main()
