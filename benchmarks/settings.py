"""Fraction of dropped tokens of a text classifier, with different settings.

    KERAS_BACKEND=tensorflow python benchmarks/settings.py [--only dropless]

Trains a small Transformer with two MoE layers on paragraphs of Python's documentation,
once with each of the settings, and prints a Markdown table. Values are those of the
last epoch, one for each layer; `load_balancing_loss` and `max_load` are those of
training. All models have the same data and seed.
"""

import argparse
import re
from pydoc_data.topics import topics

import keras
import numpy as np

import keras_moe

LENGTH, WORDS = 64, 4000
WIDTH, HEADS, D_FF, EXPERTS = 64, 4, 128, 8
BATCH, EPOCHS = 32, 3
BLOCKS = ("block_0", "block_1")

# The number of experts per token, and the arguments of `MoeLayer`.
SETTINGS = {
    "k = 1, factors 1.25 and 2, groups of one example": (
        1,
        {"train_capacity_factor": 1.25, "eval_capacity_factor": 2.0},
    ),
    "k = 1, factors 1.25 and 2, `examples_per_group=None`": (
        1,
        {
            "train_capacity_factor": 1.25,
            "eval_capacity_factor": 2.0,
            "examples_per_group": None,
        },
    ),
    "k = 2, dropless": (
        2,
        {"train_capacity_factor": None, "eval_capacity_factor": None},
    ),
    "k = 1, factors 1.25 and `None`, `examples_per_group=None`": (
        1,
        {
            "train_capacity_factor": 1.25,
            "eval_capacity_factor": None,
            "examples_per_group": None,
        },
    ),
    "k = 2, factors 2.5 and `None`, `examples_per_group=None`": (
        2,
        {
            "train_capacity_factor": 2.5,
            "eval_capacity_factor": None,
            "examples_per_group": None,
        },
    ),
}
COLUMNS = (
    "settings",
    "dropped in training per layer",
    "dropped in evaluation per layer",
    "`load_balancing_loss`",
    "`max_load`",
    "held-out accuracy",
)


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--only", default="", help="a part of the names of rows")
    options = parser.parse_args()
    x, y, num_words, num_classes = read_data()
    split = len(x) * 9 // 10
    train, held_out = (x[:split], y[:split]), (x[split:], y[split:])
    print(f"{len(x)} paragraphs, {num_classes} classes\n")
    print(f"| {' | '.join(COLUMNS)} |")
    print(f"|{'---|' * len(COLUMNS)}")
    for name, (k, arguments) in SETTINGS.items():
        if options.only in name:
            model = build_model(k, arguments, num_words, num_classes)
            logs = fit(model, train, held_out)
            print(f"| {name} | {' | '.join(cells(logs))} |", flush=True)


def read_data():
    """Returns padded paragraphs, their topics, and the numbers of words and topics.

    Paragraphs are cut to `LENGTH` words. A word is an index: 0 is padding, 1 is a word
    that is not among the `WORDS` most frequent ones.
    """
    texts, labels = [], []
    for label, name in enumerate(sorted(topics)):
        for paragraph in topics[name].split("\n\n"):
            words = re.findall(r"\w+|[^\w\s]", paragraph)
            if len(words) >= 8:
                texts.append(words)
                labels.append(label)
    indices = word_indices(texts)
    x = np.zeros((len(texts), LENGTH), "int32")
    for row, words in zip(x, texts, strict=True):
        ids = [indices.get(word, 1) for word in words[:LENGTH]]
        row[: len(ids)] = ids
    order = np.random.default_rng(0).permutation(len(x))
    return x[order], np.array(labels)[order], len(indices) + 2, len(topics)


def word_indices(texts):
    """Returns the indices of the most frequent words, from 2 on."""
    counts = {}
    for words in texts:
        for word in words:
            counts[word] = counts.get(word, 0) + 1
    # Words of equal frequency keep the order of their first occurrence.
    frequent = sorted(counts, key=lambda word: -counts[word])[:WORDS]
    return {word: index for index, word in enumerate(frequent, start=2)}


def build_model(k, arguments, num_words, num_classes):
    """Creates a compiled classifier with two Transformer blocks.

    Args:
        k: int, the number of experts per token.
        arguments: dict, arguments of `MoeLayer`.
        num_words: int, the number of word indices.
        num_classes: int.

    Returns:
        A `keras.Model`.
    """
    keras.utils.set_random_seed(0)
    inputs = keras.Input((LENGTH,), dtype="int32")
    x = keras.layers.Embedding(num_words, WIDTH, mask_zero=True)(inputs)
    for name in BLOCKS:
        attention = keras.layers.MultiHeadAttention(HEADS, WIDTH // HEADS)(x, x)
        x = keras.layers.Add()([x, attention])
        x = keras.layers.LayerNormalization()(x)
        moe = moe_layer(k, arguments, name)(x)
        x = keras.layers.Add()([x, moe])
        x = keras.layers.LayerNormalization()(x)
    x = keras.layers.GlobalAveragePooling1D()(x)
    model = keras.Model(inputs, keras.layers.Dense(num_classes)(x))
    model.compile(
        keras.optimizers.Adam(2e-3),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
    )
    return model


def moe_layer(k, arguments, name):
    """Creates a MoE layer that selects `k` experts per token."""
    return keras_moe.MoeLayer(
        keras_moe.FeedForwardExperts(EXPERTS, D_FF),
        keras_moe.MaskedRouter(
            EXPERTS, num_selected_experts=k, normalize_weights=k > 1
        ),
        name=name,
        **arguments,
    )


def fit(model, train, held_out):
    """Trains a model, and returns the logs of the last epoch.

    `RoutingMonitor` adds `max_load`, and warns of dropped tokens.
    """
    history = model.fit(
        *train,
        batch_size=BATCH,
        epochs=EPOCHS,
        validation_data=held_out,
        callbacks=[keras_moe.callbacks.RoutingMonitor()],
        verbose=0,
    ).history
    return {name: values[-1] for name, values in history.items()}


def cells(logs):
    """Yields the cells of a table row, with one value per layer."""
    dropped = "fraction_tokens_left_behind"
    for prefix in ("", "val_"):
        yield ", ".join(f"{logs[f'{prefix}{x}/{dropped}']:.1%}" for x in BLOCKS)
    yield ", ".join(f"{logs[f'{x}/load_balancing_loss']:.3f}" for x in BLOCKS)
    yield ", ".join(f"{logs[f'{x}/max_load']:.3f}" for x in BLOCKS)
    yield f"{logs['val_accuracy']:.3f}"


if __name__ == "__main__":
    main()
