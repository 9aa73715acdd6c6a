"""A trained dense language model grows experts, and goes on learning.

The dense model of `char_lm.py` is trained. Then it goes on in two ways, for as
many steps on the same batches: as it is, and with eight experts in place of each
feed-forward layer that all start as copies of it, so that at first nothing changes.

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
    parser.add_argument("--dense-steps", type=int, default=400, help="before")
    parser.add_argument("--steps", type=int, default=200, help="in each of two ways")
    parser.add_argument("--output", type=pathlib.Path, default="runs/upcycling")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    text, held_out_text, alphabet = char_lm.read_text()
    held_out = char_lm.examples(held_out_text)

    print("Training the dense model")
    keras.utils.set_random_seed(options.seed)
    dense = char_lm.build_model(char_lm.dense_layer, len(alphabet))
    before = char_lm.train(dense, text, held_out, options.dense_steps, options.seed)

    results = {"dense": dense_again(dense), "upcycled": upcycled(dense)}
    for name, model in results.items():
        start = measure(model, held_out)
        print(f"\n{name}: {start:.4f} bits before it goes on")
        if abs(start - before["bits"][-1]) > 1e-3:
            raise SystemExit(f"The dense model had {before['bits'][-1]:.4f}.")
        result = char_lm.train(model, text, held_out, options.steps, options.seed + 1)
        results[name] = {**result, "start": start}
    print_table(results)
    options.output.mkdir(parents=True, exist_ok=True)
    draw(before, results, options.output / "upcycling.png")
    print(f"upcycling.png is in {options.output}.")


def dense_again(dense):
    """A copy of the model."""
    copy = keras.models.clone_model(uncompiled(dense))
    copy.set_weights(dense.get_weights())
    return copy


def uncompiled(model):
    """The same model without its metrics, which a clone would have to find."""
    return keras.Model(model.input, model.output)


def upcycled(dense):
    """The model with experts in place of its feed-forward layers."""

    def grow(layer):
        if not isinstance(layer, keras_moe.FeedForward):
            return type(layer).from_config(layer.get_config())
        router = keras_moe.MaskedRouter(
            EXPERTS,
            num_selected_experts=EXPERTS_PER_TOKEN,
            normalize_weights=True,  # 1 in sum: copies then answer as the original
            load_balancing_loss_weight=0.01,
            export_metrics=("load_balancing_loss",),
        )
        return keras_moe.upcycle(
            layer,
            router,
            noise=NOISE,
            train_capacity_factor=None,
            eval_capacity_factor=None,
        )

    model = keras.models.clone_model(uncompiled(dense), clone_function=grow)
    for layer in dense.layers:
        if layer.weights and not isinstance(layer, keras_moe.FeedForward):
            model.get_layer(layer.name).set_weights(layer.get_weights())
    return model


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
        style, colour = styles[name]
        steps = [first, *(first + np.array(x["steps"]))]
        found = [x["start"], *x["bits"]]
        label = f"{name}: {found[-1]:.3f} at the end"
        axes.plot(steps, found, style, color=colour, label=label)
    axes.set(title="Held-out text", xlabel="step", ylabel="bits per character")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(file)


if __name__ == "__main__":
    main()
