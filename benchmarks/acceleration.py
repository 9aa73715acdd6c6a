"""Benchmark of `keras_moe.accelerate` on models of keras-hub.

    KERAS_BACKEND=jax python benchmarks/acceleration.py [--output docs/benchmarks]
        [--models GptOss Gemma4]

Measures small models with and without acceleration, with interleaved timing, and
writes `<backend>_accelerated.json`. With `--models`, the results of the other models
stay as they are in the file.
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
# Arguments of all backbones.
SMALL = {
    "vocabulary_size": 1000,
    "num_layers": 2,
    "num_query_heads": 4,
    "num_key_value_heads": 4,
    "hidden_dim": 256,
}
# The name of each model, and the other arguments of its backbone.
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
    "Qwen3.5-MoE, 128 experts, k 8": (
        "Qwen3_5Moe",
        {
            "num_experts": 128,
            "top_k": 8,
            "moe_intermediate_dim": 256,
            "shared_expert_intermediate_size": 256,
            "head_dim": 64,
            "layer_types": ["linear_attention", "full_attention"],
            "linear_num_key_heads": 4,
            "linear_num_value_heads": 4,
            "linear_key_head_dim": 64,
            "linear_value_head_dim": 64,
        },
    ),
    "GPT-OSS, 32 experts, k 4": (
        "GptOss",
        {"num_experts": 32, "top_k": 4, "intermediate_dim": 256},
    ),
    "Gemma 4, 128 experts, k 8": (
        "Gemma4",
        {
            "enable_moe_block": True,
            "num_experts": 128,
            "num_experts_per_token": 8,
            "expert_intermediate_dim": 256,
            "intermediate_dim": 1024,
            "head_dim": 64,
            "image_size": 896,
        },
    ),
}


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--output",
        type=pathlib.Path,
        default="docs/benchmarks",
        help="the folder of the results",
    )
    kinds = [kind for kind, _ in MODELS.values()]
    parser.add_argument(
        "--models",
        nargs="+",
        choices=kinds,
        default=kinds,
        help="the models to measure",
    )
    arguments = parser.parse_args()
    file = arguments.output / f"{keras.backend.backend()}_accelerated.json"
    results = json.loads(file.read_text()) if file.exists() else {}
    for name, (kind, sizes) in MODELS.items():
        if kind in arguments.models:
            results[name] = compare(kind, sizes)
    results = {name: results[name] for name in MODELS if name in results}
    file.write_text(json.dumps(results, indent=1) + "\n")
    print(f"Wrote {file}.")


def compare(kind, arguments):
    """Measures a model with and without acceleration.

    Args:
        kind: string, the prefix of the classes in keras-hub.
        arguments: dict, arguments of the backbone.

    Returns:
        A dict of the times of `"plain"` and `"accelerated"`, the largest
        `"difference"` of their outputs, and whether they generate the `"same_text"`.
    """
    plain, accelerated = (build_model(kind, arguments) for _ in range(2))
    keras_moe.accelerate(accelerated)
    for model in (plain, accelerated):
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        model.compile(keras.optimizers.SGD(1e-3), loss, sampler="greedy")
    subjects = {"plain": Subject(plain), "accelerated": Subject(accelerated)}
    expected, actual = (np.asarray(s.forward()) for s in subjects.values())
    generated = [s.generate()["token_ids"] for s in subjects.values()]
    result = {
        "difference": float(np.abs(actual - expected).max()),
        "same_text": bool(np.array_equal(*map(np.asarray, generated))),
        **measure(subjects, ("forward", "step", "generate"), rounds=5, seconds=30.0),
    }
    for name in subjects:
        medians = {k: statistics.median(x["ms"]) for k, x in result[name].items()}
        print(kind, name, medians, flush=True)
    keras.backend.clear_session()
    return result


def build_model(kind, arguments):
    """Creates a language model with random weights, always with the same seed."""
    keras.utils.set_random_seed(0)
    backbone = getattr(keras_hub.models, f"{kind}Backbone")(**SMALL, **arguments)
    for weight in backbone.weights:
        if len(weight.shape) == 3 and not weight.numpy().any():
            # The experts of Gemma 4, which keras-hub creates as zeros.
            weight.assign(keras.random.normal(weight.shape, stddev=0.02))
    return getattr(keras_hub.models, f"{kind}CausalLM")(
        backbone=backbone, preprocessor=None
    )


class Subject:
    """A model to measure: its forward pass, training step and text generation."""

    def __init__(self, model):
        self.model = model
        rng = np.random.default_rng(0)
        shape = (BATCH, LENGTH)
        self.tokens = rng.integers(1, 1000, size=shape).astype("int32")
        self.positions = np.broadcast_to(np.arange(LENGTH, dtype="int32"), shape)
        self.full_mask = np.ones(shape, "int32")
        in_prompt = np.arange(LENGTH) < PROMPT
        self.prompt_mask = np.broadcast_to(in_prompt, shape).astype("int32")

    def forward(self):
        """Returns the logits of a batch."""
        return self.model.predict_on_batch(self._inputs(self.full_mask))

    def step(self):
        """Runs a training step."""
        return self.model.train_on_batch(self._inputs(self.full_mask), self.tokens)

    def generate(self):
        """Returns the prompts, completed to `LENGTH` tokens."""
        return self.model.generate(self._inputs(self.prompt_mask), stop_token_ids=None)

    def _inputs(self, mask):
        inputs = {
            "token_ids": self.tokens,
            "padding_mask": mask,
            "position_ids": self.positions,
        }
        return {name: inputs[name] for name in self.model.input}


if __name__ == "__main__":
    main()
