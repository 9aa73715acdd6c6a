"""The demo's model with each router: what it learns in a few steps, and how.

    python benchmarks/routers.py [--steps 500] [--only BiasBalanced]

prints a Markdown table. The models are those of `examples/char_lm.py`, with the
same text, batches and seed; only the MoE layers differ.
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
E = char_lm.EXPERTS


def experts():
    return keras_moe.FeedForwardExperts(
        E, char_lm.D_FF, kernel_initializer=char_lm.INITIALIZER
    )


def routed(router, train=1.25, evaluation=2.0, **arguments):
    def make(name):
        return keras_moe.MoeLayer(
            experts(),
            router(E, export_metrics=METRICS, **arguments),
            train_capacity_factor=train,
            eval_capacity_factor=evaluation,
            name=name,
        )

    return make


def hierarchical(name):
    outer, inner = (
        keras_moe.Top2MaskedRouter(n, name=level, export_metrics=METRICS)
        for n, level in ((2, "outer"), (E // 2, "inner"))
    )
    return keras_moe.HierarchicalMoeLayer(experts(), outer, inner, name=name)


def soft(name):
    slots = char_lm.LENGTH // E
    return keras_moe.SoftMoeLayer(experts(), slots_per_expert=slots, name=name)


MODELS = {
    "dense": char_lm.dense_layer,
    "`MaskedRouter`": routed(keras_moe.MaskedRouter),
    "`MaskedRouter`, dropless": routed(keras_moe.MaskedRouter, None, None),
    '`MaskedRouter(priority="probability")`, not causal': routed(
        keras_moe.MaskedRouter, priority="probability"
    ),
    '`MaskedRouter(overflow="next_best")`': routed(
        keras_moe.MaskedRouter, priority="token", overflow="next_best"
    ),
    "`MaskedRouter`, k = 2": routed(
        keras_moe.MaskedRouter, 2.5, 4.0, num_selected_experts=2, priority="token"
    ),
    "`Top2MaskedRouter`, not causal": routed(keras_moe.Top2MaskedRouter),
    "`BiasBalancedMaskedRouter`": routed(
        keras_moe.BiasBalancedMaskedRouter, bias_update_rate=0.01
    ),
    "`ExpertsChooseMaskedRouter`, not causal": routed(
        keras_moe.ExpertsChooseMaskedRouter, 1.0, 1.0
    ),
    "`HierarchicalMoeLayer`, not causal": hierarchical,
    "`SoftMoeLayer`, not causal": soft,
}


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--only", default="", help="a part of a row's name")
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
        figures = [logs["bits"], *(mean_of(logs, metric) for metric in METRICS)]
        cells = ["" if f is None else f"{f:.3f}" for f in figures]
        cells.append(f"{results['milliseconds']:.0f}")
        rows.append(f"| {name} | {' | '.join(cells)} |")
    print("\n| router | held-out bits | balance loss | left behind | ms per step |")
    print("|---|---|---|---|---|")
    print("\n".join(rows))


def mean_of(logs, metric):
    """Over the layers; `None` where there is none."""
    found = [value for name, value in logs.items() if name.endswith(metric)]
    return np.mean(found) if found else None


if __name__ == "__main__":
    main()
