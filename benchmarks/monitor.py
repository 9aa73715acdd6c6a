"""Benchmark of `RoutingMonitor` and of metrics: the time of a training step.

    KERAS_BACKEND=jax python benchmarks/monitor.py

Trains a small layer without metrics, with metrics, and with a monitor, with
interleaved timing. For each of these it prints the median time of a training step, and
the median of the differences to metrics alone, in milliseconds.
"""

import itertools
import time

import keras
import numpy as np
from subjects import Point

import keras_moe

# A small layer, so that the cost of monitoring is visible.
POINT = Point(examples=1, width=64)
STEPS, ROUNDS = 100, 9
# `export_metrics`, and the arguments of the monitor (`None` for no monitor).
CONFIGURATIONS = {
    "no metrics": (False, None),
    "metrics": (True, None),
    "metrics, monitor": (True, {}),
    "metrics, monitor with every=10": (True, {"every": 10}),
    "metrics, monitor with every=1": (True, {"every": 1}),
}


def main():
    x = POINT.inputs()
    models = {
        name: build_model(x.shape[1:], metrics)
        for name, (metrics, _) in CONFIGURATIONS.items()
    }
    times = {name: [] for name in CONFIGURATIONS}
    for _ in range(ROUNDS + 1):
        for name, (_, monitor) in CONFIGURATIONS.items():
            times[name].append(step_milliseconds(models[name], x, monitor))
    for name, (_, *ms) in times.items():  # The first epoch includes compilation.
        difference = np.subtract(ms, times["metrics"][1:])
        print(f"{name:<36}{np.median(ms):>8.2f} ms{np.median(difference):>+8.2f}")


def build_model(shape, metrics):
    """Creates a compiled model of one MoE layer, with or without metrics."""
    layer = keras_moe.MoeLayer(
        keras_moe.FeedForwardExperts(POINT.experts, POINT.d_ff),
        keras_moe.MaskedRouter(
            POINT.experts, num_selected_experts=2, export_metrics=metrics
        ),
        train_capacity_factor=2.0,
        eval_capacity_factor=2.0,
        examples_per_group=None,
    )
    inputs = keras.Input(shape)
    model = keras.Model(inputs, layer(inputs))
    model.compile("adam", "mse")
    return model


def step_milliseconds(model, x, monitor):
    """Returns the mean time of a training step in one epoch, in milliseconds."""
    callbacks = []
    if monitor is not None:
        callbacks = [keras_moe.callbacks.RoutingMonitor(**monitor)]
    data = ((x, x) for _ in itertools.count())
    start = time.perf_counter()
    model.fit(data, steps_per_epoch=STEPS, callbacks=callbacks, verbose=0)
    return 1000 * (time.perf_counter() - start) / STEPS


if __name__ == "__main__":
    main()
