"""A small vision transformer with expert choice.

Handwritten digits of 8 x 8 pixels are split into 16 patches. In each block every expert
selects the patches of an image with the highest router probability. That is for
encoders, where outputs may depend on all patches. The picture shows the selection.

    python examples/digits_vit.py [--epochs 15] [--output runs/digits_vit]
"""

import argparse
import pathlib

import keras
import numpy as np
from keras import ops
from matplotlib.figure import Figure
from sklearn.datasets import load_digits

import keras_moe

SIDE, PATCH = 8, 2  # pixels
PATCHES = (SIDE // PATCH) ** 2
WIDTH, HEADS, BLOCKS = 64, 4, 2
EXPERTS, D_FF = 4, 128
CAPACITY = 1.0  # each expert selects 16 / 4 patches


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=15)
    parser.add_argument("--output", type=pathlib.Path, default="runs/digits_vit")
    options = parser.parse_args(arguments)
    keras.utils.set_random_seed(0)
    images, labels = read_digits()
    train, test = slice(300, None), slice(300)
    model = build_model()
    model.compile("adam", "sparse_categorical_crossentropy", metrics=["accuracy"])
    model.fit(
        to_patches(images[train]),
        labels[train],
        batch_size=32,
        epochs=options.epochs,
        validation_data=(to_patches(images[test]), labels[test]),
        verbose=2,
    )
    options.output.mkdir(parents=True, exist_ok=True)
    # One test image of each of eight digits.
    shown = [np.flatnonzero(labels[test] == digit)[0] for digit in range(8)]
    draw(model, images[test][shown], options.output / "digits_vit.png")
    print(f"digits_vit.png is in {options.output}.")


def read_digits():
    """Returns images `[n, 8, 8]` in [0, 1] and their digits, in random order."""
    digits = load_digits()
    order = np.random.default_rng(0).permutation(len(digits.target))
    return digits.images[order].astype("float32") / 16, digits.target[order]


def to_patches(images):
    """Splits images `[n, 8, 8]` into patches `[n, 16, 4]`, row by row."""
    n = SIDE // PATCH
    patches = images.reshape(-1, n, PATCH, n, PATCH).swapaxes(2, 3)
    return patches.reshape(-1, PATCHES, PATCH * PATCH)


def build_model():
    patches = keras.Input((PATCHES, PATCH * PATCH))
    positions = ops.cumsum(ops.ones_like(patches[..., 0], dtype="int32"), axis=1) - 1
    x = keras.layers.Dense(WIDTH)(patches)
    x += keras.layers.Embedding(PATCHES, WIDTH)(positions)
    for block in range(BLOCKS):
        y = keras.layers.LayerNormalization()(x)
        x += keras.layers.MultiHeadAttention(HEADS, WIDTH // HEADS)(y, y)
        y = keras.layers.LayerNormalization()(x)
        x += moe_layer(f"moe_{block}")(y)
    x = keras.layers.GlobalAveragePooling1D()(keras.layers.LayerNormalization()(x))
    return keras.Model(patches, keras.layers.Dense(10, activation="softmax")(x))


def moe_layer(name):
    return keras_moe.MoeLayer(
        keras_moe.FeedForwardExperts(
            EXPERTS, D_FF, kernel_initializer="glorot_uniform"
        ),
        keras_moe.ExpertsChooseMaskedRouter(
            EXPERTS, kernel_initializer="glorot_uniform", export_metrics=()
        ),
        train_capacity_factor=CAPACITY,
        eval_capacity_factor=CAPACITY,
        name=name,
    )


def selected_pixels(model, images, name):
    """Returns bool `[n, e, 8, 8]`, true for the pixels of selected patches."""
    routing = keras_moe.route(model, to_patches(images))[name]
    selected = keras_moe.visualization.token_weights(routing) > 0  # n t e
    n = SIDE // PATCH
    selected = np.moveaxis(selected.reshape(-1, n, n, EXPERTS), -1, 1)
    return selected.repeat(PATCH, axis=2).repeat(PATCH, axis=3)


def draw(model, images, file):
    """Draws images, and below each the patches that the last block's experts select."""
    selected = selected_pixels(model, images, f"moe_{BLOCKS - 1}")
    figure = Figure(figsize=(len(images), EXPERTS + 1.4), dpi=120, layout="constrained")
    panels = figure.subplots(EXPERTS + 1, len(images))
    for column, image in zip(panels.T, images, strict=True):
        column[0].imshow(image, cmap="Greys", vmin=0, vmax=1)
    for i in range(EXPERTS):
        for axes, image, of_image in zip(panels[i + 1], images, selected, strict=True):
            # Other patches are greyed out.
            axes.imshow(image, cmap="Greys", vmin=0, vmax=1)
            grey = np.ma.masked_array(np.ones_like(image), of_image[i])
            axes.imshow(grey, cmap="Greys", vmin=0, vmax=3, alpha=0.75)
    for axes in panels.flat:
        axes.set(xticks=[], yticks=[])
    for axes, name in zip(
        panels[:, 0], ["image", *(f"expert {i}" for i in range(EXPERTS))], strict=True
    ):
        axes.set_ylabel(name)
    figure.suptitle("Patches selected by each expert of the last block")
    figure.savefig(file)


if __name__ == "__main__":
    main()
