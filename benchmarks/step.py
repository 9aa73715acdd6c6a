"""The MoE layer against a dense feed-forward layer with the same active FLOPs.

Both train inside a Keras model, through `train_on_batch`, in turn in one
process; what counts is the ratio of the medians. Run it for a backend with

    KERAS_BACKEND=jax python benchmarks/step.py
"""

import argparse
import statistics
import time

import keras
import numpy as np

import keras_moe

BATCH, LENGTH, HIDDEN, D_FF, K = 8, 512, 256, 1024, 2


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--experts", type=int, nargs="+", default=[8, 64])
    parser.add_argument("--xla", action="store_true", help="compile with XLA")
    arguments = parser.parse_args()
    jit_compile = True if arguments.xla else "auto"
    models = {"dense": make_model(make_dense(), jit_compile)}
    for experts in arguments.experts:
        for name, router, factor in (
            ("tokens choose", choose(experts), float(K)),
            ("tokens choose, dropless", choose(experts), None),
            ("experts choose", keras_moe.ExpertsChooseMaskedRouter(experts), float(K)),
        ):
            moe = make_moe(experts, router, factor)
            models[f"{name}, {experts} experts"] = make_model(moe, jit_compile)
    times = measure(models, arguments.repeats)
    report(times)


def make_dense():
    """K experts' worth of inner width."""
    return keras_moe.FeedForward(K * D_FF)


def choose(experts):
    return keras_moe.MaskedRouter(experts, num_selected_experts=K)


def make_moe(experts, router, factor):
    """One group of all tokens; with a factor of K, K slots a token."""
    return keras_moe.MoeLayer(
        keras_moe.FeedForwardExperts(experts, D_FF),
        router,
        train_capacity_factor=factor,
        eval_capacity_factor=factor,
        examples_per_group=BATCH,
    )


def make_model(layer, jit_compile):
    inputs = keras.Input((LENGTH, HIDDEN))
    model = keras.Model(inputs, layer(inputs))
    model.compile(keras.optimizers.SGD(1e-3), "mse", jit_compile=jit_compile)
    return model


def measure(models, repeats):
    """Seconds a step of each model, taken in turn."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(BATCH, LENGTH, HIDDEN)).astype("float32")
    times = {name: [] for name in models}
    for repeat in range(repeats + 3):
        for name, model in models.items():
            start = time.perf_counter()
            model.train_on_batch(x, x)
            if repeat >= 3:
                times[name].append(time.perf_counter() - start)
    return times


def report(times):
    print(f"\n{keras.backend.backend()}, Keras {keras.version()}")
    print(f"{BATCH} x {LENGTH} tokens, h {HIDDEN}, f {D_FF}, k {K}\n")
    row = "{:<36}{:>10}{:>10}{:>10}{:>8}"
    print(row.format("training step, ms", "median", "min", "max", "ratio"))
    dense = statistics.median(times["dense"])
    for name, seconds in times.items():
        median = statistics.median(seconds)
        figures = [f"{1000 * s:.1f}" for s in (median, min(seconds), max(seconds))]
        print(row.format(name, *figures, f"{median / dense:.2f}"))


if __name__ == "__main__":
    main()
