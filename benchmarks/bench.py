"""What a layer costs: against a dense one, against other packages', on each axis.

    KERAS_BACKEND=jax python benchmarks/bench.py [--quick] [--output docs/benchmarks]

measures the layers of `subjects.py` through `train_on_batch` and
`predict_on_batch`, in turn, and writes `<backend>.json`; `report.py` makes tables
and pictures of it. With `--quick` it prints the base point's training step.
"""

import argparse
import dataclasses
import functools
import gc
import importlib
import json
import os
import pathlib
import platform
import statistics

import keras
import numpy as np
from subjects import Point, of_layer, peers
from timing import measure

BASE = Point()
AXES = {
    "experts": [Point(experts=n) for n in (8, 32, 256)],
    "examples": [Point(examples=n) for n in (8, 16, 128)],
    "group": [Point(group=1), Point(examples=32, group=32)],
    "k": [Point(k=n) for n in (2, 8)],
    "width": [Point(width=n) for n in (256, 512)],
    "share": [Point(k=1, share=n) for n in (0.125, 1.0)],
}
# Where the time goes.
# In the wide layer with fewer tokens, as shares are what it is for.
PARTS = [Point(experts=64), Point(width=1024, examples=2)]
# One token, k = 2: the forward pass of a model that writes.
DECODING = [Point(experts=n, examples=1, length=1) for n in (8, 64, 256)]


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="the base point alone")
    parser.add_argument("--output", type=pathlib.Path, default="docs/benchmarks")
    options = parser.parse_args()
    if options.quick:
        print_table(base_point())
        return
    results = {
        "machine": machine(),
        "base": base_point(),
        "parts": [parts(point) for point in PARTS],
        "peers": {name: against(name, make) for name, make in peers().items()},
        "axes": {
            axis: [at(point, axis) for point in points] for axis, points in AXES.items()
        },
        "decoding": [at(point, "experts", ("forward",)) for point in DECODING],
    }
    options.output.mkdir(parents=True, exist_ok=True)
    file = options.output / f"{keras.backend.backend()}.json"
    file.write_text(json.dumps(results, indent=1) + "\n")
    print(f"{file} is written.")


def base_point():
    """With 8 and 64 experts, on TensorFlow with XLA too."""
    x = BASE.inputs()
    layers = {"dense": BASE.dense()}
    many = dataclasses.replace(BASE, experts=64)
    for point in (BASE, many):
        experts = point.experts
        layers[f"tokens choose, {experts} experts"] = point.tokens_choose(2.0)
        layers[f"tokens choose, dropless, {experts} experts"] = point.tokens_choose(
            None
        )
        layers[f"experts choose, {experts} experts"] = point.experts_choose()
    layers["only updating the weights of 64 experts"] = many.weights()
    subjects = {name: of_layer(layer, x) for name, layer in layers.items()}
    if keras.backend.backend() == "tensorflow":
        compiled = {
            "dense, XLA": BASE.dense(),
            "tokens choose, 8 experts, XLA": BASE.tokens_choose(2.0),
            "tokens choose, 64 experts, XLA": many.tokens_choose(2.0),
        }
        for name, layer in compiled.items():
            subjects[name] = of_layer(layer, x, jit_compile=True)
    return said("The base point", measure(subjects))


def against(name, make):
    """A peer and ours, on equal weights, with the difference of their outputs."""
    theirs, ours = make()
    expected, found = (np.asarray(s.forward()) for s in (theirs, ours))
    difference = float(np.abs(found - expected).max() / np.abs(expected).max())
    times = measure({"theirs": theirs, "ours": ours})
    return said(name, {"difference": difference, **times})


def at(point, axis, kinds=("step",)):
    value = getattr(point, axis)
    return said(f"{axis} {value}", {axis: value, **times_at(point, kinds)})


@functools.cache
def times_at(point, kinds):
    """Once for a point that lies on several axes."""
    return measure(point.models(), kinds, rounds=3, seconds=3.0)


def parts(point):
    """The layer beside its parts."""
    subjects = {**point.models(), **point.parts()}
    times = measure(subjects, ("step",), seconds=3.0)
    name = f"Parts: {point.experts} experts, h {point.width}"
    return said(name, {"experts": point.experts, "width": point.width, **times})


def said(name, results):
    """Prints the medians on the way, and clears what the models left behind."""
    print(f"\n{name}")
    for subject, kinds in results.items():
        if isinstance(kinds, dict):
            medians = (
                f"{k} {statistics.median(x['ms']):.0f}" for k, x in kinds.items()
            )
            print(f"{subject}: {', '.join(medians)} ms", flush=True)
    keras.backend.clear_session()
    gc.collect()
    return results


def machine():
    backend = keras.backend.backend()
    return {
        "processor": processor(),
        "cores": os.cpu_count(),
        "Python": platform.python_version(),
        "Keras": keras.version(),
        backend: importlib.import_module(backend).__version__,
    }


def processor():
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next(x.split(":")[1].strip() for x in lines if x.startswith("model name"))


def print_table(results):
    row = "{:<40}{:>10}{:>10}{:>10}{:>8}"
    print(row.format("training step, ms", "median", "min", "max", "ratio"))
    dense = statistics.median(results["dense"]["step"]["ms"])
    for name, result in results.items():
        ms = result["step"]["ms"]
        median = statistics.median(ms)
        figures = [f"{x:.1f}" for x in (median, min(ms), max(ms))]
        print(row.format(name, *figures, f"{median / dense:.2f}"))


if __name__ == "__main__":
    main()
