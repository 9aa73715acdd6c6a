"""Comparison of routers in a small language model.

    python benchmarks/routers.py [--steps 500] [--only BiasBalanced]

Trains the model of `examples/char_lm.py` with each router, with the same text, batches
and seed, and prints a Markdown table. Only the MoE layers differ.
"""

import argparse
import importlib.util
import pathlib

import keras
import numpy as np

import keras_moe

SCRIPT = pathlib.Path(__file__).parents[1] / "examples" / "char_lm.py"
spec = importlib.util.spec_from_file_location("char_lm", SCRIPT)
char_lm = importlib.util.module_from_spec(spec)
spec.loader.exec_module(char_lm)

METRICS = ("load_balancing_loss", "fraction_tokens_left_behind")
EXPERTS = 8  # each as wide as the dense layer


def experts():
    """Creates the experts of one layer."""
    return keras_moe.FeedForwardExperts(
        EXPERTS, char_lm.D_FF, kernel_initializer=char_lm.INITIALIZER
    )


def moe_layer_with(router, train=1.25, evaluation=2.0, **arguments):
    """Returns a function that creates a `MoeLayer` with a router.

    Args:
        router: subclass of `keras_moe.Router`.
        train: float, the capacity factor in training, or `None`. Defaults to 1.25.
        evaluation: float, the capacity factor in inference, or `None`. Defaults to 2.
        **arguments: forwarded to `router`.

    Returns:
        A function of the layer's name.
    """

    def make(name):
        return keras_moe.MoeLayer(
            experts(),
            router(EXPERTS, export_metrics=METRICS, **arguments),
            train_capacity_factor=train,
            eval_capacity_factor=evaluation,
            name=name,
        )

    return make


def hierarchical_layer(name):
    """Creates a `HierarchicalMoeLayer` with two groups of experts."""
    outer, inner = (
        keras_moe.Top2MaskedRouter(n, name=level, export_metrics=METRICS)
        for n, level in ((2, "outer"), (EXPERTS // 2, "inner"))
    )
    return keras_moe.HierarchicalMoeLayer(experts(), outer, inner, name=name)


def soft_layer(name):
    """Creates a `SoftMoeLayer` with as many slots as tokens."""
    slots = char_lm.LENGTH // EXPERTS
    return keras_moe.SoftMoeLayer(experts(), slots_per_expert=slots, name=name)


MODELS = {
    "dense": char_lm.dense_layer,
    "`MaskedRouter`": moe_layer_with(keras_moe.MaskedRouter),
    "`MaskedRouter`, dropless": moe_layer_with(keras_moe.MaskedRouter, None, None),
    '`MaskedRouter(priority="probability")`, not causal': moe_layer_with(
        keras_moe.MaskedRouter, priority="probability"
    ),
    '`MaskedRouter(overflow="next_best")`': moe_layer_with(
        keras_moe.MaskedRouter, priority="token", overflow="next_best"
    ),
    "`MaskedRouter`, k = 2": moe_layer_with(
        keras_moe.MaskedRouter, 2.5, 4.0, num_selected_experts=2, priority="token"
    ),
    "`Top2MaskedRouter`, not causal": moe_layer_with(keras_moe.Top2MaskedRouter),
    "`BiasBalancedMaskedRouter`": moe_layer_with(
        keras_moe.BiasBalancedMaskedRouter, bias_update_rate=0.01
    ),
    "`ExpertsChooseMaskedRouter`, not causal": moe_layer_with(
        keras_moe.ExpertsChooseMaskedRouter, 1.0, 1.0
    ),
    "`HierarchicalMoeLayer`, not causal": hierarchical_layer,
    "`SoftMoeLayer`, not causal": soft_layer,
}


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--steps", type=int, default=500, help="training steps")
    parser.add_argument("--only", default="", help="a part of the names of rows")
    options = parser.parse_args()
    char_lm.EPOCHS = 1
    text, held_out, alphabet = char_lm.read_text()
    held_out = char_lm.examples(held_out)
    rows = []
    for name in (name for name in MODELS if options.only in name):
        print(f"\n{name}")
        keras.utils.set_random_seed(0)
        model = char_lm.build_model(MODELS[name], len(alphabet))
        results = char_lm.train(model, text, held_out, options.steps, seed=0)
        logs = model.evaluate(*held_out, batch_size=16, return_dict=True, verbose=0)
        values = [logs["bits"], *(mean_over_layers(logs, x) for x in METRICS)]
        cells = ["" if value is None else f"{value:.3f}" for value in values]
        cells.append(f"{results['milliseconds']:.0f}")
        rows.append(f"| {name} | {' | '.join(cells)} |")
    print("\n| router | held-out bits | balance loss | dropped | ms per step |")
    print("|---|---|---|---|---|")
    print("\n".join(rows))


def mean_over_layers(logs, metric):
    """Returns the mean of a metric over all layers that have it, or `None`."""
    values = [value for name, value in logs.items() if name.endswith(metric)]
    return np.mean(values) if values else None


if __name__ == "__main__":
    main()
