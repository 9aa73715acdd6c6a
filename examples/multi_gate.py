"""A multi-gate mixture of experts: two tasks share experts, each with its own gate.

The data are tabular, with two targets, whose correlation is an argument. If it is low,
a model with one shared layer for both tasks is worse than one with a gate per task,
which weighs the experts for its task. Model and data are those of Ma et al., 2018
(https://doi.org/10.1145/3219819.3220007).

    python examples/multi_gate.py [--epochs 30] [--correlation 0.2]
"""

import argparse

import keras
import numpy as np

import keras_moe

COLUMNS, WIDTH = 32, 24
EXPERTS = 6
ROWS = 6000


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--correlation", type=float, default=0.2)
    options = parser.parse_args(arguments)
    x, targets = read_table(options.correlation)
    train, test = slice(1000, None), slice(1000)
    correlation = np.corrcoef(*targets.T)[0, 1]
    print(f"The correlation of the two targets is {correlation:.2f}.")
    for name, build in (("shared bottom", shared_bottom), ("multi-gate", multi_gate)):
        keras.utils.set_random_seed(0)
        model = build()
        model.compile(keras.optimizers.Adam(3e-3), "mse")
        first, second = targets.T
        model.fit(
            x[train],
            [first[train], second[train]],
            batch_size=64,
            epochs=options.epochs,
            verbose=0,
        )
        found = model.predict(x[test], verbose=0)
        errors = [
            np.mean((y[:, 0] - target[test]) ** 2)
            for y, target in zip(found, (first, second), strict=True)
        ]
        print(
            f"{name:14}{model.count_params():8,} parameters, mean squared errors "
            f"{errors[0]:.3f} and {errors[1]:.3f} (variance 1)"
        )


def read_table(correlation):
    """Returns columns `[n, 32]` and two targets `[n, 2]`, each with variance 1.

    Each target is the same sum of sines along a direction in the space of columns. The
    two directions have the given correlation.
    """
    rng = np.random.default_rng(0)
    basis, _ = np.linalg.qr(rng.normal(size=(COLUMNS, 2)))
    second = correlation * basis[:, 0] + np.sqrt(1 - correlation**2) * basis[:, 1]
    x = rng.normal(size=(ROWS, COLUMNS)).astype("float32")
    on_line = x @ np.stack([basis[:, 0], second], axis=1)
    targets = on_line + np.sin(3 * on_line) + np.sin(5 * on_line + 1)
    targets += 0.1 * rng.normal(size=targets.shape)
    return x, ((targets - targets.mean(0)) / targets.std(0)).astype("float32")


def expert():
    return keras.Sequential(
        [
            keras.layers.Dense(2 * WIDTH, activation="relu"),
            keras.layers.Dense(WIDTH),
        ]
    )


def towers(hidden):
    return [
        keras.layers.Dense(1, name=f"task_{i}")(
            keras.layers.Dense(WIDTH, activation="relu")(x)
        )
        for i, x in enumerate(hidden)
    ]


def shared_bottom():
    """Creates a model with as many units as all experts, shared by both tasks."""
    columns = keras.Input((COLUMNS,))
    x = keras.layers.Dense(2 * WIDTH * EXPERTS, activation="relu")(
        keras.layers.Dense(WIDTH)(columns)
    )
    x = keras.layers.Dense(WIDTH)(x)
    return keras.Model(columns, towers([x, x]))


def multi_gate():
    columns = keras.Input((COLUMNS,))
    x = keras.layers.Dense(WIDTH)(columns)
    experts = keras_moe.HeterogeneousExperts([expert() for _ in range(EXPERTS)])
    mixtures = keras_moe.MultiGateMoeLayer(experts, num_tasks=2)(x)
    return keras.Model(columns, towers(mixtures))


if __name__ == "__main__":
    main()
