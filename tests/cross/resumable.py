"""Trains with a backup after each epoch: `resumable.py FOLDER EPOCHS`."""

import contextlib
import json
import sys

import keras
import numpy as np

import keras_moe

if keras.backend.backend() == "tensorflow":
    import tensorflow as tf

    # On a CPU without XLA, weights may otherwise be updated before they are read.
    tf.config.optimizer.set_experimental_options({"dependency_optimization": False})

STEPS, BATCH, LENGTH, HIDDEN, EXPERTS = 10, 16, 8, 12, 8


class Data(keras.utils.PyDataset):
    """Batches in an order that depends on the epoch."""

    epoch = 0

    def __init__(self):
        super().__init__()
        rng = np.random.default_rng(0)
        shape = (STEPS, BATCH, LENGTH, HIDDEN)
        self.x = rng.normal(size=shape).astype("float32")
        # The target differs between tokens, so that experts can specialize.
        self.y = np.where(self.x[..., :1] > 0, np.tanh(self.x), self.x[..., ::-1])

    def __len__(self):
        return STEPS

    def __getitem__(self, index):
        step = np.random.default_rng(self.epoch).permutation(STEPS)[index]
        return self.x[step], self.y[step]


class Backup(keras.callbacks.BackupAndRestore):
    """Resumes even if the metadata file, which is written last, is damaged."""

    def on_train_begin(self, logs=None):
        with contextlib.suppress(json.JSONDecodeError):
            super().on_train_begin(logs)


class Epochs(keras.callbacks.Callback):
    """Derives the epoch from the optimizer's steps, which are saved with the weights.

    `BackupAndRestore` writes its epoch to a second file, after the weights. If the
    process is killed in between, the weights are of a later epoch than that file.
    """

    def __init__(self, data, epochs):
        super().__init__()
        self.data, self.epochs = data, epochs

    def on_epoch_begin(self, epoch, logs=None):
        self.data.epoch = int(self.model.optimizer.iterations) // STEPS
        print(f"epoch {self.data.epoch}", flush=True)

    def on_epoch_end(self, epoch, logs=None):
        if int(self.model.optimizer.iterations) >= self.epochs * STEPS:
            self.model.stop_training = True


def build_model():
    inputs = keras.Input((LENGTH, HIDDEN))
    moe = keras_moe.MoeLayer(
        keras_moe.FeedForwardExperts(EXPERTS, 16, kernel_initializer="he_normal"),
        keras_moe.BiasBalancedMaskedRouter(EXPERTS),
        train_capacity_factor=None,
        eval_capacity_factor=None,
    )
    model = keras.Model(inputs, keras.layers.Dense(HIDDEN)(inputs + moe(inputs)))
    model.compile(keras.optimizers.Adam(0.01), "mse")
    return model


def train(folder, epochs):
    keras.utils.set_random_seed(0)
    model, data = build_model(), Data()
    model.fit(
        data,
        epochs=2 * epochs,
        shuffle=False,
        verbose=0,
        callbacks=[
            Epochs(data, epochs),
            Backup(f"{folder}/backup", double_checkpoint=True),
        ],
    )
    states = [*model.weights, *model.optimizer.variables]
    np.savez(f"{folder}/end.npz", *map(keras.ops.convert_to_numpy, states))


if __name__ == "__main__":
    train(sys.argv[1], int(sys.argv[2]))
