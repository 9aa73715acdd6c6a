"""A small model and its data, the same on one device and on many."""

import keras
import numpy as np

import keras_moe

if keras.backend.backend() == "tensorflow":
    import tensorflow as tf

    # With it, an update of weights may overtake a read, on a CPU without XLA.
    tf.config.optimizer.set_experimental_options({"dependency_optimization": False})

BATCH, LENGTH, HIDDEN, EXPERTS = 16, 8, 12, 8
TOP_2 = {"num_selected_experts": 2, "load_balancing_loss_weight": 0.01}
# Each with a capacity factor.
ROUTERS = {
    "tokens choose": (keras_moe.MaskedRouter, TOP_2, 2.0),
    "dropless": (keras_moe.MaskedRouter, TOP_2, None),
    "experts choose": (keras_moe.ExpertsChooseMaskedRouter, {}, 2.0),
}


def data():
    """A task that wants other experts for other tokens, and some padding."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(BATCH, LENGTH, HIDDEN)).astype("float32")
    y = targets(x)
    # As much in each half of a batch: losses are means over what a replica holds.
    x[1 :: BATCH // 2, 5:] = 0
    return x, y


def targets(x):
    return np.where(x[..., :1] > 0, np.tanh(x), x[..., ::-1])


def model(kind):
    keras.utils.set_random_seed(0)
    router, arguments, factor = ROUTERS[kind]
    return model_with(router(EXPERTS, **arguments), factor)


def model_with(router, factor=None):
    inputs = keras.Input((LENGTH, HIDDEN))
    moe = keras_moe.MoeLayer(
        keras_moe.FeedForwardExperts(EXPERTS, 16, kernel_initializer="he_normal"),
        router,
        train_capacity_factor=factor,
        eval_capacity_factor=factor,
        name="moe",
    )
    masked = keras.layers.Masking()(inputs)
    outputs = keras.layers.Dense(HIDDEN)(masked + moe(masked))
    result = keras.Model(inputs, outputs)
    result.compile(keras.optimizers.Adam(0.01), "mse")
    return result


def train(model, x, y, epochs=20):
    """What training says and what it leaves, as numpy."""
    logs = model.fit(x, y, batch_size=BATCH, epochs=epochs, shuffle=False, verbose=0)
    return logs.history, model.get_weights()
