"""Trains with a backup after each epoch: `resumable.py FOLDER EPOCHS`."""

import sys

import keras
import numpy as np
import small_model

import keras_moe

STEPS = 20


class Data(keras.utils.PyDataset):
    """Batches in an order that follows from the epoch."""

    epoch = 0

    def __init__(self):
        super().__init__()
        rng = np.random.default_rng(0)
        shape = (STEPS, small_model.BATCH, small_model.LENGTH, small_model.HIDDEN)
        self.x = rng.normal(size=shape).astype("float32")

    def __len__(self):
        return STEPS

    def __getitem__(self, index):
        order = np.random.default_rng(self.epoch).permutation(STEPS)
        x = self.x[order[index]]
        return x, small_model.targets(x)


class Epochs(keras.callbacks.Callback):
    """Counts epochs by the optimizer's steps, which lie in a file with the weights.

    `BackupAndRestore` writes the epoch into a second file, afterwards: between the
    two, a process that is killed leaves the weights of one epoch more.
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


def train(folder, epochs):
    keras.utils.set_random_seed(0)
    router = keras_moe.BiasBalancedMaskedRouter(small_model.EXPERTS)
    model, data = small_model.model_with(router), Data()
    model.fit(
        data,
        epochs=2 * epochs,
        shuffle=False,
        verbose=0,
        callbacks=[
            Epochs(data, epochs),
            keras.callbacks.BackupAndRestore(
                f"{folder}/backup", double_checkpoint=True
            ),
        ],
    )
    states = [*model.weights, *model.optimizer.variables]
    np.savez(f"{folder}/end.npz", *map(keras.ops.convert_to_numpy, states))


if __name__ == "__main__":
    train(sys.argv[1], int(sys.argv[2]))
