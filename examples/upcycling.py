"""Upcycling: a trained dense language model is continued with experts.

The dense model of `char_lm.py` is trained. Then training continues in two ways, on the
same batches: as it is, and with eight experts in place of each feed-forward layer.
These start as copies of it, so the outputs of the model do not change at first.

    python examples/upcycling.py [--dense-steps 400] [--steps 200]
        [--output runs/upcycling] [--seed 0]
"""

import argparse
import pathlib

import char_lm
import keras
import numpy as np
from matplotlib.figure import Figure

import keras_moe

EXPERTS = 8
EXPERTS_PER_TOKEN = 2
NOISE = 0.0


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dense-steps", type=int, default=400, help="steps before")
    parser.add_argument("--steps", type=int, default=200, help="steps after, each way")
    parser.add_argument("--output", type=pathlib.Path, default="runs/upcycling")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--small", action="store_true", help="a tiny model, to try it")
    options = parser.parse_args(arguments)
    if options.small:
        char_lm.shrink()
    text, held_out_text, alphabet = char_lm.read_text()
    held_out = char_lm.examples(held_out_text)

    print("Training the dense model")
    keras.utils.set_random_seed(options.seed)
    dense = char_lm.build_model(char_lm.dense_layer, len(alphabet))
    before = char_lm.train(dense, text, held_out, options.dense_steps, options.seed)

    results = {"dense": copy(dense), "upcycled": upcycled(dense)}
    for name, model in results.items():
        start = measure(model, held_out)
        print(f"\n{name}: {start:.4f} bits at the start")
        if abs(start - before["bits"][-1]) > 1e-3:
            raise SystemExit(f"The dense model had {before['bits'][-1]:.4f}.")
        result = char_lm.train(model, text, held_out, options.steps, options.seed + 1)
        results[name] = {**result, "start": start}
    print_table(results)
    options.output.mkdir(parents=True, exist_ok=True)
    draw(before, results, options.output / "upcycling.png")
    print(f"upcycling.png is in {options.output}.")


def copy(dense):
    """Returns a copy of a model."""
    return keras_moe.replace_layers(uncompiled(dense), lambda layer: None)


def upcycled(dense):
    """Returns a copy with experts in place of the feed-forward layers."""

    def make_router():
        return keras_moe.MaskedRouter(
            EXPERTS,
            num_selected_experts=EXPERTS_PER_TOKEN,
            normalize_weights=True,  # combine weights sum to 1, as copies need
            export_metrics=("load_balancing_loss",),
        )

    return keras_moe.upcycle_model(uncompiled(dense), make_router, noise=NOISE)


def uncompiled(model):
    """Returns the same model without the custom metric of `compile`."""
    return keras.Model(model.input, model.output)


def measure(model, held_out):
    char_lm.compile_model(model)
    found = model.evaluate(
        *held_out, batch_size=char_lm.BATCH, verbose=0, return_dict=True
    )
    return found["bits"]


def print_table(results):
    print("\n           parameters   ms per step   bits before   bits after")
    for name, x in results.items():
        total, pace = x["model"].count_params(), x["milliseconds"]
        print(f"{name:9}{total:12,}{pace:14.0f}{x['start']:14.3f}{x['bits'][-1]:13.3f}")


def draw(before, results, file):
    figure = Figure(figsize=(7, 4), dpi=120, layout="constrained")
    axes = figure.subplots()
    axes.plot(before["steps"], before["bits"], "o-", color="grey", label="dense, first")
    first = before["steps"][-1]
    styles = {"dense": ("o--", "darkorange"), "upcycled": ("s-", "navy")}
    for name, x in results.items():
        style, color = styles[name]
        steps = [first, *(first + np.array(x["steps"]))]
        found = [x["start"], *x["bits"]]
        label = f"{name}: {found[-1]:.3f} at the end"
        axes.plot(steps, found, style, color=color, label=label)
    axes.set(title="Held-out text", xlabel="step", ylabel="bits per character")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(file)


if __name__ == "__main__":
    main()
