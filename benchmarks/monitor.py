"""What watching costs: `fit` without metrics, with them, and with a monitor.

    KERAS_BACKEND=jax python benchmarks/monitor.py

prints the medians of a step at the base point, of all ways in turn.
"""

import itertools
import time

import keras
import numpy as np
from subjects import Point

import keras_moe

STEPS, ROUNDS = 10, 5
# `export_metrics`, and the arguments of a monitor.
WAYS = {
    "no metrics": (False, None),
    "metrics": (True, None),
    "metrics, a monitor": (True, {}),
    "metrics, a monitor with every=10": (True, {"every": 10}),
    "metrics, a monitor with every=1": (True, {"every": 1}),
}


def main():
    x = Point().inputs()
    models = {name: make(x.shape[1:], metrics) for name, (metrics, _) in WAYS.items()}
    times = {name: [] for name in WAYS}
    for _ in range(ROUNDS + 1):
        for name, (_, monitor) in WAYS.items():
            times[name].append(milliseconds(models[name], x, monitor))
    for name, (_, *ms) in times.items():  # The first has compiled.
        ratios = np.divide(ms, times["metrics"][1:])
        print(f"{name:<36}{np.median(ms):>8.1f} ms{np.median(ratios):>8.3f}")


def make(shape, metrics):
    layer = keras_moe.MoeLayer(
        keras_moe.FeedForwardExperts(8, 1024),
        keras_moe.MaskedRouter(8, num_selected_experts=2, export_metrics=metrics),
        train_capacity_factor=2.0,
        eval_capacity_factor=2.0,
        examples_per_group=None,
    )
    inputs = keras.Input(shape)
    model = keras.Model(inputs, layer(inputs))
    model.compile("adam", "mse")
    return model


def milliseconds(model, x, monitor):
    """Of a step, in an epoch of some steps."""
    callbacks = []
    if monitor is not None:
        callbacks = [keras_moe.callbacks.RoutingMonitor(**monitor)]
    data = ((x, x) for _ in itertools.count())
    start = time.perf_counter()
    model.fit(data, steps_per_epoch=STEPS, callbacks=callbacks, verbose=0)
    return 1000 * (time.perf_counter() - start) / STEPS


if __name__ == "__main__":
    main()
