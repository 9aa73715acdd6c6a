"""Two small language models with the same FLOPs per token: dense, and MoE.

Both are character-level Transformers, trained on Python's own documentation. They
differ in their feed-forward layers only. In the MoE model each token uses two of
sixteen experts, each half as wide as the dense layer. So the model has more
parameters but, except for the small gate, the same FLOPs per token.

    python examples/char_lm.py [--steps 500] [--output runs/demo] [--seed 0]
"""

import argparse
import pathlib
import re
import subprocess
import sys
import time
from pydoc_data.topics import topics

import keras
import numpy as np
from keras import ops
from matplotlib.figure import Figure

import keras_moe

# Both models
LENGTH = 128  # characters of an input
BLOCKS = 3
WIDTH = 128
HEADS = 4
D_FF = 512  # of the dense layer, and of the experts of a token together
INITIALIZER = "glorot_uniform"  # of the feed-forward layers

# Experts
EXPERTS = 16
EXPERTS_PER_TOKEN = 2

# Training
BATCH = 16
LEARNING_RATE = 1e-3
EPOCHS = 5  # after each, the loss on held-out text is measured
HELD_OUT = 0.1  # the last part of the text

# Generation
CHARACTERS = 300
TEMPERATURE = 0.7


def main(arguments=None):
    options = parse(arguments)
    if options.evaluate:
        evaluate(options.evaluate, options.seed)
        return
    text, held_out_text, alphabet = read_text()
    held_out = examples(held_out_text)

    results = {}
    for name, feed_forward in (("dense", dense_layer), ("MoE", moe_layer)):
        print(f"\nTraining the {name} model")
        keras.utils.set_random_seed(options.seed)
        model = build_model(feed_forward, len(alphabet))
        results[name] = train(model, text, held_out, options.steps, options.seed)
    print_table(results)

    options.output.mkdir(parents=True, exist_ok=True)
    moe = results["MoE"]
    moe["model"].save(options.output / "moe.keras")
    file = options.output / "moe.keras"
    evaluate_in_new_process(file, options.seed, moe["bits"][-1])
    load = expert_loads(moe["model"], held_out[0])
    draw(results, load, options.output / "char_lm.png")
    print(f"The files moe.keras and char_lm.png are in {options.output}.")


def shrink():
    """Makes the models so small that an example runs quickly, and learns little."""
    global BLOCKS, WIDTH, HEADS, D_FF
    BLOCKS, WIDTH, HEADS, D_FF = 1, 16, 2, 32


def parse(arguments):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=500, help="training steps")
    parser.add_argument("--output", type=pathlib.Path, default="runs/demo")
    parser.add_argument("--seed", type=int, default=0)
    help_text = "evaluate this model, and generate text, without training"
    parser.add_argument("--evaluate", metavar="FILE", help=help_text)
    return parser.parse_args(arguments)


# Text


def read_text():
    """Returns training text and held-out text, both as indices, and the alphabet.

    Topics quote each other. Only the first copy of a paragraph is kept, so that none is
    in both parts.
    """
    paragraphs = (p.strip("\n") for t in topics.values() for p in t.split("\n\n"))
    text = "\n\n".join(dict.fromkeys(paragraphs))
    split = text.index("\n\n", int(len(text) * (1 - HELD_OUT))) + 2
    alphabet, indices = np.unique(list(text), return_inverse=True)
    indices = indices.astype("int32")
    return indices[:split], indices[split:], alphabet


def batches(text, seed):
    """Yields batches of windows of the text at random positions."""
    rng = np.random.default_rng(seed)
    while True:
        yield windows(text, rng.integers(len(text) - LENGTH, size=BATCH))


def examples(text):
    """Returns the text as consecutive windows, without a last partial batch."""
    batches = (len(text) - 1) // (BATCH * LENGTH)
    return windows(text, LENGTH * np.arange(batches * BATCH))


def windows(text, starts):
    """Returns characters, and the next one of each."""
    window = text[starts[:, None] + np.arange(LENGTH + 1)]
    return window[:, :-1], window[:, 1:]


# Models


def dense_layer(name):
    return keras_moe.FeedForward(D_FF, kernel_initializer=INITIALIZER, name=name)


def moe_layer(name):
    return keras_moe.MoeLayer(
        keras_moe.FeedForwardExperts(
            EXPERTS, D_FF // EXPERTS_PER_TOKEN, kernel_initializer=INITIALIZER
        ),
        keras_moe.MaskedRouter(
            EXPERTS,
            num_selected_experts=EXPERTS_PER_TOKEN,
            normalize_weights=True,
            # One of seven metrics, since those of three layers flood the progress bar.
            export_metrics=("expert_usage",),
        ),
        train_capacity_factor=None,  # dropless
        eval_capacity_factor=None,
        name=name,
    )


def build_model(feed_forward, alphabet_size):
    """Creates a pre-norm Transformer from characters to logits of the next ones."""
    characters = keras.Input((LENGTH,), dtype="int32")
    positions = ops.cumsum(ops.ones_like(characters), axis=1) - 1
    x = keras.layers.Embedding(alphabet_size, WIDTH)(characters)
    x += keras.layers.Embedding(LENGTH, WIDTH)(positions)
    for block in range(BLOCKS):
        y = keras.layers.LayerNormalization()(x)
        attention = keras.layers.MultiHeadAttention(HEADS, WIDTH // HEADS)
        x += attention(y, y, use_causal_mask=True)
        y = keras.layers.LayerNormalization()(x)
        x += feed_forward(f"block_{block}")(y)
    x = keras.layers.LayerNormalization()(x)
    return keras.Model(characters, keras.layers.Dense(alphabet_size)(x))


def bits(targets, logits):
    """Returns the cross-entropy in bits per character, without auxiliary losses."""
    nats = ops.sparse_categorical_crossentropy(targets, logits, from_logits=True)
    return nats / np.log(2)


def compile_model(model, learning_rate=LEARNING_RATE):
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.Adam(learning_rate), loss, metrics=[bits])


def moe_layers(model):
    return [x for x in model.layers if isinstance(x, keras_moe.MoeLayer)]


def active_parameters(model):
    """Returns the number of parameters that process one token."""
    experts = sum(x.experts.count_params() for x in moe_layers(model))
    return model.count_params() - experts + experts * EXPERTS_PER_TOKEN // EXPERTS


def expert_loads(model, characters):
    """Returns the load of each MoE layer's experts, as fractions, by layer."""
    routings = keras_moe.route(model, characters)
    return {
        name: ops.convert_to_numpy(routing.load).mean(axis=0)
        for name, routing in routings.items()
    }


# Training


def train(model, text, held_out, steps, seed, learning_rate=LEARNING_RATE):
    """Trains a model, and returns it with its learning curve and speed."""
    compile_model(model, learning_rate)
    times = []
    watch = keras.callbacks.LambdaCallback(
        on_train_batch_end=lambda batch, logs: times.append(time.perf_counter())
    )
    epochs = min(EPOCHS, steps)
    history = model.fit(
        batches(text, seed),
        epochs=epochs,
        steps_per_epoch=steps // epochs,
        validation_data=held_out,
        validation_batch_size=BATCH,
        callbacks=[watch],
        shuffle=False,  # the batches are random
        verbose=1 if sys.stdout.isatty() else 2,
    ).history
    return {
        "model": model,
        "steps": steps // epochs * np.arange(1, epochs + 1),
        "bits": history["val_bits"],
        # The median ignores compilation and evaluation.
        "milliseconds": 1000 * np.median(np.diff(times)),
    }


def print_table(results):
    print("\n       parameters    active  ms per step  held-out bits per character")
    for name, x in results.items():
        total, active = x["model"].count_params(), active_parameters(x["model"])
        pace, found = x["milliseconds"], x["bits"][-1]
        print(f"{name:7}{total:10,}{active:10,}{pace:13.0f}{found:30.3f}")


# The saved model


def evaluate_in_new_process(file, seed, expected):
    """Runs `evaluate` in a new process, and compares its result."""
    print(f"\nLoading {file} in a new process")
    command = [sys.executable, __file__, "--evaluate", file, "--seed", str(seed)]
    output = subprocess.run(
        command, check=True, stdout=subprocess.PIPE, text=True
    ).stdout
    print(output)
    found = float(re.search(r"([\d.]+) bits per character", output)[1])
    if abs(found - expected) > 1e-3:
        raise SystemExit(f"{found:.4f} bits after loading, {expected:.4f} before.")
    print(f"The result is the same as before saving: {expected:.4f} bits.\n")


def evaluate(file, seed):
    """Loads a model, evaluates it on held-out text, and generates text."""
    _, text, alphabet = read_text()
    model = keras.models.load_model(file, compile=False)
    compile_model(model)
    x, y = examples(text)
    found = model.evaluate(x, y, batch_size=BATCH, verbose=0, return_dict=True)
    print(f"{found['bits']:.4f} bits per character of held-out text.")
    prompt = text[:LENGTH]
    generated = generate(model, prompt, CHARACTERS, seed)
    print("\nHeld-out text |and generated text:\n")
    print("".join(alphabet[prompt]), "".join(alphabet[generated]), sep="|")


def generate(model, prompt, characters, seed):
    """Samples characters one by one, from the last `LENGTH` characters."""
    rng = np.random.default_rng(seed)
    text = list(prompt)
    for _ in range(characters):
        window = np.array([text[-LENGTH:]], "int32")
        logits = ops.convert_to_numpy(model.predict_on_batch(window))[0, -1]
        # The largest of logits with Gumbel noise is a sample of their softmax.
        noise = rng.gumbel(size=logits.shape)
        text.append(np.argmax(logits / TEMPERATURE + noise))
    return np.array(text[len(prompt) :])


# The picture


def draw(results, load, file):
    """Draws the learning curves, and the load of each MoE layer's experts."""
    top = 1.5 * max(share.max() for share in load.values())
    figure = Figure(figsize=(10, 5), dpi=120, layout="constrained")
    curves, *bars = figure.subplot_mosaic([["curves", x] for x in load]).values()
    for (name, x), style in zip(results.items(), ("o--", "s-"), strict=True):
        label = f"{name}: {x['bits'][-1]:.3f} at the end"
        color = {"dense": "darkorange", "MoE": "navy"}[name]
        curves.plot(x["steps"], x["bits"], style, color=color, label=label)
    curves.set(title="Held-out text", xlabel="step", ylabel="bits per character")
    curves.grid(alpha=0.3)
    curves.legend()
    for axis, (layer, share) in zip(bars, load.items(), strict=True):
        axis.bar(range(EXPERTS), share, color="cornflowerblue")
        axis.axhline(1 / EXPERTS, color="black", linestyle="--", label="balanced load")
        axis.set(title=f"{layer}: expert load on held-out text", ylim=(0, top))
        axis.set_xticks(range(EXPERTS))
    bars[-1].set_xlabel("expert")
    bars[0].legend(loc="upper right")
    figure.savefig(file)


if __name__ == "__main__":
    main()
