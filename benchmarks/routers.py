"""Comparison of routers in a small language model.

    python benchmarks/routers.py [--steps 500] [--seeds 3] [--only BiasBalanced]
        [--output docs/benchmarks/routers.json]

Trains the model of `examples/char_lm.py` with each router, with the same text, batches
and seeds, and prints a Markdown table of means over the seeds, with the standard
deviation of the bits, and of the time of the fastest seed. Only the MoE layers differ.
With `--output`, the results of each run are added to a file, and runs that it contains
are not repeated.
"""

import argparse
import importlib.util
import json
import pathlib

import keras
import numpy as np

import keras_moe

SCRIPT = pathlib.Path(__file__).parents[1] / "examples" / "char_lm.py"
spec = importlib.util.spec_from_file_location("char_lm", SCRIPT)
char_lm = importlib.util.module_from_spec(spec)
spec.loader.exec_module(char_lm)

METRICS = ("load_balancing_loss", "max_load", "fraction_tokens_left_behind")
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
    '`MaskedRouter(balance_scope="batch")`, dropless': moe_layer_with(
        keras_moe.MaskedRouter, None, None, balance_scope="batch"
    ),
    '`MaskedRouter(priority="random")`': moe_layer_with(
        keras_moe.MaskedRouter, priority="random"
    ),
    '`MaskedRouter(noise_std="learned")`': moe_layer_with(
        keras_moe.MaskedRouter, noise_std="learned"
    ),
    "`MaskedRouter`, k = 2": moe_layer_with(
        keras_moe.MaskedRouter, 2.5, 4.0, num_selected_experts=2, priority="token"
    ),
    "`MaskedRouter`, k = 2, noisy top-k gating": moe_layer_with(
        keras_moe.MaskedRouter,
        2.5,
        4.0,
        num_selected_experts=2,
        priority="token",
        normalize_weights=True,
        noise_std="learned",
        load_balancing_loss_weight=0.0,
        importance_loss_weight=0.1,
        load_loss_weight=0.1,
    ),
    "`Top2MaskedRouter`, not causal": moe_layer_with(keras_moe.Top2MaskedRouter),
    "`BiasBalancedMaskedRouter`": moe_layer_with(
        keras_moe.BiasBalancedMaskedRouter, bias_update_rate=0.01
    ),
    "`BiasBalancedMaskedRouter`, dropless": moe_layer_with(
        keras_moe.BiasBalancedMaskedRouter, None, None, bias_update_rate=0.01
    ),
    "`SparseMixerRouter`, k = 1": moe_layer_with(
        keras_moe.SparseMixerRouter, num_selected_experts=1
    ),
    "`TopPMaskedRouter`, at most 2, dropless": moe_layer_with(
        keras_moe.TopPMaskedRouter, None, None, max_selected_experts=2
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
    parser.add_argument("--seeds", type=int, default=3, help="runs of each router")
    parser.add_argument("--only", default="", help="a part of the names of rows")
    parser.add_argument("--output", type=pathlib.Path, help="a file for the results")
    options = parser.parse_args()
    char_lm.EPOCHS = 1
    text, held_out, alphabet = char_lm.read_text()
    held_out = char_lm.examples(held_out)
    names = [name for name in MODELS if options.only in name]
    results = {}
    if options.output and options.output.exists():
        results = json.loads(options.output.read_text())
    # One seed after the other: a change of the machine's speed affects all rows.
    for seed in range(options.seeds):
        for name in names:
            runs = results.setdefault(name, {})
            if str(seed) in runs:
                continue
            print(f"\n{name}, seed {seed}")
            keras.backend.clear_session()
            keras.utils.set_random_seed(seed)
            model = char_lm.build_model(MODELS[name], len(alphabet))
            trained = char_lm.train(model, text, held_out, options.steps, seed=seed)
            logs = model.evaluate(*held_out, batch_size=16, return_dict=True, verbose=0)
            runs[str(seed)] = {
                "bits": logs["bits"],
                **{metric: mean_over_layers(logs, metric) for metric in METRICS},
                "milliseconds": trained["milliseconds"],
            }
            if options.output:
                options.output.write_text(json.dumps(results, indent=1) + "\n")
    print("\n| router | held-out bits | balance loss | max load | dropped | ms |")
    print("|---|---|---|---|---|---|")
    for name in names:
        print(f"| {name} | {' | '.join(cells(results[name].values()))} |")


def cells(runs):
    """Yields the cells of a row, from the results of all seeds."""
    bits = [run["bits"] for run in runs]
    yield f"{np.mean(bits):.3f} ± {np.std(bits, ddof=1) if len(bits) > 1 else 0:.3f}"
    for metric in METRICS:
        values = [run[metric] for run in runs]
        yield "" if None in values else f"{np.mean(values):.3f}"
    # Other jobs slow a run, and do not make it faster.
    yield f"{min(run['milliseconds'] for run in runs):.0f}"


def mean_over_layers(logs, metric):
    """Returns the mean of a metric over all layers that have it, or `None`."""
    values = [value for name, value in logs.items() if name.endswith(metric)]
    return float(np.mean(values)) if values else None


if __name__ == "__main__":
    main()
