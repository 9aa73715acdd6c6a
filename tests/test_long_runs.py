"""Memory and the number of compiled programs do not grow during training."""

import gc
import os
import pathlib

import keras
import numpy as np
import pytest

import keras_moe

STEPS = int(os.environ.get("STEPS", "200"))
EPOCHS = 5
BATCH_SIZES = 4, 1, 3, 7, 2


class CallCounter(keras.layers.Layer):
    """Counts its calls, which are traces if the backend compiles."""

    count = 0

    def call(self, inputs):
        self.count += 1
        return inputs


def megabytes():
    """Returns the resident memory of this process."""
    gc.collect()
    pages = int(pathlib.Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def batches():
    rng = np.random.default_rng(0)
    while True:
        for size in BATCH_SIZES:
            x = rng.normal(size=(size, 6, 4)).astype("float32")
            yield x, np.tanh(x)


@pytest.mark.thorough
@pytest.mark.filterwarnings("ignore:__array__")  # Each step stores one.
@pytest.mark.skipif(not pathlib.Path("/proc/self/statm").exists(), reason="Linux only")
def test_memory_and_traces_do_not_grow(record_property):
    inputs = keras.Input((6, 4))
    calls = CallCounter()
    x = calls(inputs)
    for factor in (1.0, None):
        x += keras_moe.MoeLayer(
            keras_moe.FeedForwardExperts(3, 8),
            keras_moe.BiasBalancedMaskedRouter(3, router_z_loss_weight=0.01),
            train_capacity_factor=factor,
        )(x)
    model = keras.Model(inputs, x)
    model.compile("adam", "mse")
    measurements = []

    class Measure(keras.callbacks.Callback):
        def on_epoch_end(self, epoch, logs=None):
            measurements.append((megabytes(), calls.count))

    model.fit(
        batches(),
        steps_per_epoch=STEPS // EPOCHS,
        epochs=EPOCHS,
        verbose=0,
        callbacks=[Measure()],
    )
    memory, traces = zip(*measurements, strict=True)
    print(f"after each of {EPOCHS} times {STEPS // EPOCHS} steps: {measurements}")
    record_property("memory and traces", measurements)
    assert memory[-1] - memory[0] < 10
    if keras.backend.backend() != "torch":
        assert traces[-1] == traces[0] <= 1 + 2 * len(BATCH_SIZES)
