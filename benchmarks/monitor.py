"""What watching costs: `fit` without metrics, with them, and with a monitor.

    KERAS_BACKEND=jax python benchmarks/monitor.py

prints the medians of a step of a small layer, of all ways in turn, and what each
takes more than metrics alone, in milliseconds.
"""

import itertools
import time

import keras
import numpy as np
from subjects import Point

import keras_moe

# A small layer, next to which the cost of watching can be seen.
POINT = Point(examples=1, width=64)
STEPS, ROUNDS = 100, 9
# `export_metrics`, and the arguments of a monitor.
WAYS = {
    "no metrics": (False, None),
    "metrics": (True, None),
    "metrics, a monitor": (True, {}),
    "metrics, a monitor with every=10": (True, {"every": 10}),
    "metrics, a monitor with every=1": (True, {"every": 1}),
}


def main():
    x = POINT.inputs()
    models = {name: make(x.shape[1:], metrics) for name, (metrics, _) in WAYS.items()}
    times = {name: [] for name in WAYS}
    for _ in range(ROUNDS + 1):
        for name, (_, monitor) in WAYS.items():
            times[name].append(milliseconds(models[name], x, monitor))
    for name, (_, *ms) in times.items():  # The first has compiled.
        more = np.subtract(ms, times["metrics"][1:])
        print(f"{name:<36}{np.median(ms):>8.2f} ms{np.median(more):>+8.2f}")


def make(shape, metrics):
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
