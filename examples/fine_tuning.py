"""Fine-tuning: a trained mixture is adapted to new text, quantized and with adapters.

The MoE model of `char_lm.py` is trained on Python's documentation and saved. Then it is
loaded and adapted to Python programs in four ways, on the same batches: all weights;
adapters (LoRA) of the experts alone; and adapters on experts of 8 and of 4 bits. The
adapters are merged, and the models are saved and loaded again.

    python examples/fine_tuning.py [--base-steps 400] [--steps 200]
        [--output runs/fine_tuning] [--seed 0]
"""

import argparse
import importlib
import inspect
import pathlib

import char_lm
import keras
import numpy as np
from matplotlib.figure import Figure

import keras_moe

RANK = 8
ADAPTER_LEARNING_RATE = 5e-3  # adapters begin at 0, and need a larger one
# Programs of the standard library to train on, and to hold out.
PROGRAMS = ("argparse", "tarfile", "pathlib", "statistics", "doctest", "typing")
HELD_OUT_PROGRAMS = ("configparser", "textwrap")
# The mode of quantization, and whether adapters are trained instead of all weights.
WAYS = {
    "all weights": (None, False),
    "adapters": (None, True),
    "int8 + adapters": ("int8", True),
    "int4 + adapters": ("int4", True),
}


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--base-steps", type=int, default=400, help="steps before")
    parser.add_argument("--steps", type=int, default=200, help="steps of each way")
    parser.add_argument("--output", type=pathlib.Path, default="runs/fine_tuning")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--small", action="store_true", help="a tiny model, to try it")
    options = parser.parse_args(arguments)
    if options.small:
        char_lm.shrink()
    options.output.mkdir(parents=True, exist_ok=True)
    base = options.output / "base.keras"
    text, held_out_text, alphabet = char_lm.read_text()

    print("Training the model on documentation")
    keras.utils.set_random_seed(options.seed)
    model = char_lm.build_model(char_lm.moe_layer, len(alphabet))
    held_out = char_lm.examples(held_out_text)
    char_lm.train(model, text, held_out, options.base_steps, options.seed)
    save(model, base)

    number = 1 if options.small else None
    programs = read_programs(PROGRAMS[:number], alphabet)
    held_out = read_programs(HELD_OUT_PROGRAMS[:number], alphabet)
    held_out = char_lm.examples(held_out)
    start = measure(base, held_out)
    print(f"\n{start:.3f} bits per character of programs, before adaptation")
    results = {}
    for name, (mode, adapters) in WAYS.items():
        print(f"\nAdapting: {name}")
        model = prepared(base, mode, adapters)
        rate = ADAPTER_LEARNING_RATE if adapters else char_lm.LEARNING_RATE
        trained = char_lm.train(
            model, programs, held_out, options.steps, options.seed, rate
        )
        file = options.output / f"{name.replace(' + ', '_').replace(' ', '_')}.keras"
        results[name] = {
            "memory": megabytes(model),
            "trained": trained["bits"][-1],
            "milliseconds": trained["milliseconds"],
            **saved(model, file, held_out),
        }
    print_table(start, results)
    draw(start, results, options.output / "fine_tuning.png")
    print(f"The files are in {options.output}.")


def read_programs(names, alphabet):
    """Returns the source of modules as indices; unknown characters are spaces."""
    modules = (importlib.import_module(name) for name in names)
    text = np.array(list("\n\n".join(inspect.getsource(x) for x in modules)))
    found = np.minimum(np.searchsorted(alphabet, text), len(alphabet) - 1)
    space = np.searchsorted(alphabet, " ")
    return np.where(alphabet[found] == text, found, space).astype("int32")


def prepared(base, mode, adapters):
    """Loads the model, with quantized experts, and all but their adapters frozen."""
    model = keras.models.load_model(base)
    if mode:
        keras_moe.quantize_experts(model, mode)
    if adapters:
        for layer in model.layers:
            if isinstance(layer, keras_moe.MoeLayer):
                layer.enable_lora(RANK)
                layer.router.trainable = False
            else:
                layer.trainable = False
    return model


def saved(model, file, held_out):
    """Merges adapters, and returns the bits of the models that files hold.

    A quantized model can be saved with its adapters. Merged into its kernels, they are
    rounded to 8 or 4 bits.
    """
    save(model, file)
    found = {"loaded": measure(file, held_out)}
    for layer in char_lm.moe_layers(model):
        if any("lora" in weight.name for weight in layer.weights):
            layer.merge_lora()
    merged = file.with_stem(f"{file.stem}_merged")
    save(model, merged)
    return {**found, "merged": measure(merged, held_out)}


def save(model, file):
    """Saves a model without the custom metric of `compile`."""
    keras.Model(model.input, model.output).save(file)


def measure(file, held_out):
    model = keras.models.load_model(file)
    char_lm.compile_model(model)
    found = model.evaluate(
        *held_out, batch_size=char_lm.BATCH, verbose=0, return_dict=True
    )
    return found["bits"]


def megabytes(model):
    """Returns the memory of the weights, their gradients and the optimizer's state."""
    trained = model.trainable_weights
    held = [*model.weights, *trained, *model.optimizer.variables]
    return sum(keras.ops.convert_to_numpy(x).nbytes for x in held) / 1e6


def print_table(start, results):
    print(
        "\n                  MB in training   ms per step   bits after   saved   merged"
    )
    for name, x in results.items():
        print(
            f"{name:18}{x['memory']:14.1f}{x['milliseconds']:14.0f}{x['trained']:13.3f}"
            f"{x['loaded']:8.3f}{x['merged']:9.3f}"
        )
    print(f"Before adaptation: {start:.3f} bits.")


def draw(start, results, file):
    figure = Figure(figsize=(9, 4), dpi=120, layout="constrained")
    memory, loss = figure.subplots(1, 2)
    names = list(results)
    bars = memory.bar(names, [x["memory"] for x in results.values()], color="navy")
    memory.bar_label(bars, fmt="%.1f")
    memory.set(title="Weights, gradients, optimizer", ylabel="MB")
    places = np.arange(len(names))
    for offset, key, color in ((-0.2, "loaded", "navy"), (0.2, "merged", "darkorange")):
        found = [x[key] for x in results.values()]
        label = {"loaded": "saved as trained", "merged": "adapters merged"}[key]
        bars = loss.bar(places + offset, found, 0.4, color=color, label=label)
        loss.bar_label(bars, fmt="%.2f", fontsize=8)
    loss.axhline(start, color="grey", linestyle="--", label="before")
    loss.set(title="Held-out programs", ylabel="bits per character")
    loss.set_xticks(places, names)
    loss.set_ylim(0, 1.3 * start)
    loss.legend(loc="upper right", fontsize=8)
    for axis in (memory, loss):
        axis.tick_params("x", labelrotation=20)
    figure.savefig(file)


if __name__ == "__main__":
    main()
