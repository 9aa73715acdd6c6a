"""What `keras_moe.accelerate` does for keras-hub's models.

    KERAS_BACKEND=jax python benchmarks/acceleration.py [--output docs/benchmarks]

measures small whole models as they are and accelerated, in turn, and writes
`<backend>_accelerated.json`.
"""

import argparse
import json
import pathlib
import statistics

import keras
import keras_hub
import numpy as np
from timing import measure

import keras_moe

BATCH, LENGTH, PROMPT = 4, 256, 224
SMALL = {
    "vocabulary_size": 1000,
    "num_layers": 2,
    "num_query_heads": 4,
    "num_key_value_heads": 4,
    "hidden_dim": 256,
}
# The name of the model, and what is its own.
MODELS = {
    "Mixtral, 8 experts, k 2": (
        "Mixtral",
        {"num_experts": 8, "top_k": 2, "intermediate_dim": 1024},
    ),
    "Qwen-MoE, 64 experts, k 4": (
        "QwenMoe",
        {
            "num_experts": 64,
            "top_k": 4,
            "norm_top_k_prob": False,
            "intermediate_dim": 1024,
            "moe_intermediate_dim": 256,
            "shared_expert_intermediate_dim": 512,
        },
    ),
    "Qwen3-MoE, 128 experts, k 8": (
        "Qwen3Moe",
        {
            "num_experts": 128,
            "top_k": 8,
            "norm_top_k_prob": True,
            "intermediate_dim": 1024,
            "moe_intermediate_dim": 256,
            "head_dim": 64,
        },
    ),
}


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--output", type=pathlib.Path, default="docs/benchmarks")
    folder = parser.parse_args().output
    results = {name: compare(*model) for name, model in MODELS.items()}
    file = folder / f"{keras.backend.backend()}_accelerated.json"
    file.write_text(json.dumps(results, indent=1) + "\n")
    print(f"{file} is written.")


def compare(kind, arguments):
    """Times of both, and the largest difference of their outputs."""
    plain, fast = (make(kind, arguments) for _ in range(2))
    keras_moe.accelerate(fast)
    for model in (plain, fast):
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        model.compile(keras.optimizers.SGD(1e-3), loss, sampler="greedy")
    subjects = {"plain": Calls(plain), "accelerated": Calls(fast)}
    expected, found = (np.asarray(s.forward()) for s in subjects.values())
    generated = [s.generate()["token_ids"] for s in subjects.values()]
    result = {
        "difference": float(np.abs(found - expected).max()),
        "same_text": bool(np.array_equal(*map(np.asarray, generated))),
        **measure(subjects, ("forward", "step", "generate"), rounds=5, seconds=30.0),
    }
    for name in subjects:
        medians = {k: statistics.median(x["ms"]) for k, x in result[name].items()}
        print(kind, name, medians, flush=True)
    keras.backend.clear_session()
    return result


def make(kind, arguments):
    keras.utils.set_random_seed(0)
    backbone = getattr(keras_hub.models, f"{kind}Backbone")(**SMALL, **arguments)
    return getattr(keras_hub.models, f"{kind}CausalLM")(
        backbone=backbone, preprocessor=None
    )


class Calls:
    """What is timed: outputs of a batch, a training step, and 32 new tokens."""

    def __init__(self, model):
        self.model = model
        rng = np.random.default_rng(0)
        shape = (BATCH, LENGTH)
        self.tokens = rng.integers(1, 1000, size=shape).astype("int32")
        self.all = np.ones(shape, "int32")
        self.known = np.broadcast_to(np.arange(LENGTH) < PROMPT, shape).astype("int32")

    def forward(self):
        return self.model.predict_on_batch(self._inputs(self.all))

    def step(self):
        return self.model.train_on_batch(self._inputs(self.all), self.tokens)

    def generate(self):
        return self.model.generate(self._inputs(self.known), stop_token_ids=None)

    def _inputs(self, mask):
        return {"token_ids": self.tokens, "padding_mask": mask}


if __name__ == "__main__":
    main()
