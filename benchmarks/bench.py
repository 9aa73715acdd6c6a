"""Benchmark of MoE layers: compared with a dense layer and with other packages.

    KERAS_BACKEND=jax python benchmarks/bench.py [--quick] [--output docs/benchmarks]

The layers of `subjects.py` run through `train_on_batch` and `predict_on_batch`, with
interleaved timing. Results are written to `<backend>.json`, from which `report.py`
creates tables and figures. With `--quick`, only the layers at the base point are
measured, and their training steps are printed.
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
from subjects import Point, demo, keras_subject, peers
from timing import measure

import keras_moe

BASE = Point()
# One parameter at a time.
PARAMETERS = {
    "experts": [Point(experts=n) for n in (8, 32, 256)],
    "examples": [Point(examples=n) for n in (8, 16, 128)],
    "group": [Point(group=1), Point(examples=32, group=32)],
    "k": [Point(k=n) for n in (2, 8)],
    "width": [Point(width=n) for n in (256, 512)],
    "share": [Point(k=1, share=n) for n in (0.125, 1.0)],
}
# Where the time goes. The wide layer has fewer tokens, to save time: only its ratios
# are of interest.
PARTS = [BASE, Point(experts=64), Point(width=1024, examples=2)]
# The forward pass of one token, as in decoding.
DECODING = [Point(experts=n, examples=1, length=1) for n in (8, 64, 256)]


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="only the base point")
    parser.add_argument(
        "--output",
        type=pathlib.Path,
        default="docs/benchmarks",
        help="the folder of the results",
    )
    options = parser.parse_args()
    if options.quick:
        print_table(measure_base())
        return
    results = {
        "machine": machine(),
        "base": measure_base(),
        "parts": [measure_parts(point) for point in PARTS],
        "demo": report_medians("The demo", measure(demo())),
        "peers": {
            name: compare_with_peer(name, make) for name, make in peers().items()
        },
        "axes": {
            parameter: [measure_point(point, parameter) for point in points]
            for parameter, points in PARAMETERS.items()
        },
        "decoding": [
            measure_point(point, "experts", ("forward",)) for point in DECODING
        ],
    }
    if keras_moe.keep_freed_memory():
        results["kept"] = measure_base()
    options.output.mkdir(parents=True, exist_ok=True)
    file = options.output / f"{keras.backend.backend()}.json"
    file.write_text(json.dumps(results, indent=1) + "\n")
    print(f"Wrote {file}.")


def measure_base():
    """Measures layers with 8 and 64 experts; on TensorFlow, some also with XLA."""
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
    subjects = {name: keras_subject(layer, x) for name, layer in layers.items()}
    if keras.backend.backend() == "tensorflow":
        compiled = {
            "dense, XLA": BASE.dense(),
            "tokens choose, 8 experts, XLA": BASE.tokens_choose(2.0),
            "tokens choose, 64 experts, XLA": many.tokens_choose(2.0),
        }
        for name, layer in compiled.items():
            subjects[name] = keras_subject(layer, x, jit_compile=True)
    return report_medians("The base point", measure(subjects))


def compare_with_peer(name, make):
    """Measures a layer of another package and ours, with equal weights.

    Args:
        name: string, the name of the comparison.
        make: function that creates the two subjects, `(theirs, ours)`.

    Returns:
        A dict of the times of `"theirs"` and `"ours"`, and of the `"difference"` of
        their outputs, relative to the largest output.
    """
    theirs, ours = make()
    expected, actual = (np.asarray(s.forward()) for s in (theirs, ours))
    difference = float(np.abs(actual - expected).max() / np.abs(expected).max())
    times = measure({"theirs": theirs, "ours": ours})
    return report_medians(name, {"difference": difference, **times})


def measure_point(point, parameter, kinds=("step",)):
    """Measures the models of a point, and records the value of its parameter."""
    value = getattr(point, parameter)
    return report_medians(
        f"{parameter} {value}", {parameter: value, **measure_models(point, kinds)}
    )


@functools.cache
def measure_models(point, kinds):
    """Measures the models of a point, once if several parameters include the point."""
    return measure(point.models(), kinds, rounds=3, seconds=3.0)


def measure_parts(point):
    """Measures the models of a point and their parts, each trained alone."""
    name = f"Parts: {point.experts} experts, h {point.width}"
    times = measure({**point.models(), **point.experts_alone()}, ("step",), seconds=3.0)
    # In rounds of their own: after a long step, a short one takes twice as long.
    times |= measure(point.without_experts(), ("step",), rounds=31)
    return report_medians(
        name, {"experts": point.experts, "width": point.width, **times}
    )


def report_medians(name, results):
    """Prints the medians of a measurement, frees its models and returns its results."""
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
    """Returns the processor and the versions of the software."""
    backend = keras.backend.backend()
    return {
        "processor": processor(),
        "cores": os.cpu_count(),
        "Python": platform.python_version(),
        "Keras": keras.version(),
        backend: importlib.import_module(backend).__version__,
    }


def processor():
    """Returns the model name of the processor."""
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next(x.split(":")[1].strip() for x in lines if x.startswith("model name"))


def print_table(results):
    """Prints the training steps of `measure_base`, with ratios to the dense layer."""
    row = "{:<40}{:>10}{:>10}{:>10}{:>8}"
    print(row.format("training step, ms", "median", "min", "max", "ratio"))
    dense = statistics.median(results["dense"]["step"]["ms"])
    for name, result in results.items():
        ms = result["step"]["ms"]
        median = statistics.median(ms)
        times = [f"{x:.1f}" for x in (median, min(ms), max(ms))]
        print(row.format(name, *times, f"{median / dense:.2f}"))


if __name__ == "__main__":
    main()
