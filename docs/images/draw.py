"""Draws load.png and routing.png with the MoE model of examples/char_lm.py.

PYTHONPATH=examples python docs/images/draw.py [--steps 500]
"""

import argparse
import pathlib

import char_lm
import keras
import numpy as np

import keras_moe

FOLDER = pathlib.Path(__file__).parent


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=500)
    options = parser.parse_args()
    text, held_out, alphabet = char_lm.read_text()
    keras.utils.set_random_seed(0)
    model = char_lm.build_model(char_lm.moe_layer, len(alphabet))
    char_lm.compile_model(model)
    monitor = keras_moe.callbacks.RoutingMonitor(every=10)
    batches = char_lm.batches(text, seed=0)
    model.fit(batches, steps_per_epoch=options.steps, callbacks=[monitor], verbose=2)
    monitor.plot().savefig(FOLDER / "load.png")

    # With a capacity, and a quarter of the text per group, to show dropped tokens.
    layer = model.get_layer("block_1")
    layer.eval_capacity_factor = float(char_lm.EXPERTS_PER_TOKEN)
    layer.examples_per_group = 1 / 4
    characters, _ = char_lm.windows(held_out, np.array([0]))
    routing = keras_moe.route(model, characters)["block_1"]
    characters = alphabet[characters[0, : char_lm.LENGTH // 4]]
    labels = [repr(str(c))[1:-1] for c in characters]
    figure = keras_moe.visualization.draw_routing(routing, labels)
    figure.savefig(FOLDER / "routing.png")


if __name__ == "__main__":
    main()
