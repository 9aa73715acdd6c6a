"""Memory and time of training steps with adapters, on kernels of each kind.

    KERAS_BACKEND=tensorflow python benchmarks/adapters.py

Prints a Markdown table: 64 dropless experts (h 1024, f 2048), 512 tokens, Adam. The
memory of the kernels is what the model holds; that of a step is what the first two
steps add to it at their peak, compilation included. Each row is a process of its own.
"""

import argparse
import subprocess
import sys

EXPERTS, HIDDEN, D_FF, TOKENS, RANK = 64, 1024, 2048, 512, 8
# The mode of quantization, and whether adapters are trained instead of all weights.
ROWS = {
    "all weights": (None, False),
    "float, adapters": (None, True),
    "int8, adapters": ("int8", True),
    "int4, adapters": ("int4", True),
}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--row", choices=ROWS, help="measure this row only")
    row = parser.parse_args().row
    if row:
        print(f"| {row} | {' | '.join(measure(*ROWS[row]))} |", flush=True)
        return
    print("| trained | kernels, MiB | added by a step, MiB | ms per step |")
    print("|---|---|---|---|", flush=True)
    for row in ROWS:
        subprocess.run([sys.executable, __file__, "--row", row], check=True)


def measure(mode, adapters):
    import keras
    import numpy as np
    from timing import measure, peak_megabytes

    import keras_moe

    inputs = keras.Input((TOKENS, HIDDEN))
    layer = keras_moe.MoeLayer(
        keras_moe.FeedForwardExperts(EXPERTS, D_FF),
        keras_moe.MaskedRouter(EXPERTS, num_selected_experts=2, trainable=False),
        train_capacity_factor=None,
        eval_capacity_factor=None,
    )
    model = keras.Model(inputs, layer(inputs))
    if mode:
        keras_moe.quantize_experts(model, mode)
    if adapters:
        layer.enable_lora(RANK)
    model.compile("adam", "mse")
    x = np.random.default_rng(0).normal(size=(1, TOKENS, HIDDEN)).astype("float32")

    class Step:
        def step(self):
            model.train_on_batch(x, x)

    kernels = sum(
        np.prod(w.shape) * (1 if "int8" in w.dtype else 4)
        for w in layer.experts.weights
        if "kernel" in w.name and "lora" not in w.name
    )
    for weight in model.weights:
        float(keras.ops.max(weight))  # JAX may still be at work on it.
    added = peak_megabytes(lambda: [Step().step() for _ in range(2)])
    times = measure({"model": Step()}, kinds=("step",), rounds=5)["model"]["step"]["ms"]
    return f"{kernels / 2**20:.0f}", str(added), f"{np.median(times):.0f}"


if __name__ == "__main__":
    main()
