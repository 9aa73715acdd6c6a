"""Trains with a backup after each epoch: `resumable.py FOLDER EPOCHS`.

On JAX also as one of two processes with four devices each, on a mesh of two by four:
`resumable.py FOLDER EPOCHS PROCESS ADDRESSES`.
"""

import contextlib
import json
import os
import shutil
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

    def __init__(self, part):
        super().__init__()
        self.part = part
        rng = np.random.default_rng(0)
        shape = (STEPS, BATCH, LENGTH, HIDDEN)
        self.x = rng.normal(size=shape).astype("float32")
        # The target differs between tokens, so that experts can specialize.
        self.y = np.where(self.x[..., :1] > 0, np.tanh(self.x), self.x[..., ::-1])

    def __len__(self):
        return STEPS

    def __getitem__(self, index):
        step = np.random.default_rng(self.epoch).permutation(STEPS)[index]
        return self.x[step][self.part], self.y[step][self.part]


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


def train(epochs, backup, part=slice(None)):
    """Trains, and returns all weights."""
    keras.utils.set_random_seed(0)
    model, data = build_model(), Data(part)
    model.fit(
        data,
        epochs=2 * epochs,
        shuffle=False,
        verbose=0,
        callbacks=[
            Epochs(data, epochs),
            Backup(backup, double_checkpoint=True),
        ],
    )
    states = [*model.weights, *model.optimizer.variables]
    return [keras.ops.convert_to_numpy(x) for x in states]


def train_on_mesh(epochs, backup, process, addresses):
    """Trains as one of two processes, which continue from the backup of the first."""
    import jax

    if process > 0:
        # Keras creates variables when it saves, which all processes must do together:
        # each has a backup of its own. The first still waits in `initialize`.
        backup, first = f"{backup}-{process}", backup
        shutil.rmtree(backup, ignore_errors=True)
        with contextlib.suppress(FileNotFoundError):
            shutil.copytree(first, backup)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    keras.distribution.initialize(addresses, 2, process)
    mesh = keras.distribution.DeviceMesh((2, 4), ["batch", "expert"])
    keras.distribution.set_distribution(
        keras.distribution.ModelParallel(
            layout_map=keras_moe.distribution.expert_layout_map(mesh),
            batch_dim_name="batch",
            auto_shard_dataset=False,
        )
    )
    half = BATCH // 2
    return train(epochs, backup, slice(process * half, (process + 1) * half))


def main(folder, epochs, process="0", addresses=None):
    # Only Python prints to standard output; what Gloo prints there is in the way.
    sys.stdout = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    epochs, process, backup = int(epochs), int(process), f"{folder}/backup"
    if addresses is None:
        states = train(epochs, backup)
    else:
        states = train_on_mesh(epochs, backup, process, addresses)
    if process == 0:
        np.savez(f"{folder}/end.npz", *states)


if __name__ == "__main__":
    main(*sys.argv[1:])
