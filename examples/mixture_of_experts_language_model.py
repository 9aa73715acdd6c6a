"""
Title: A language model with Mixture-of-Experts layers
Author: The keras_moe project
Date created: 2026/11/22
Last modified: 2026/11/22
Description: Swap a Transformer's feed-forward layers for experts, train, watch the routers, save and load.
Accelerator: None
"""

"""
## Introduction

A Mixture-of-Experts layer holds many feed-forward networks, the *experts*, and a
*router* that sends each token to a few of them. A model gets many more parameters
for about the same work per token
([Shazeer et al., 2017](https://arxiv.org/abs/1701.06538);
[Fedus et al., 2021](https://arxiv.org/abs/2101.03961)).

In this example we train two small character-level Transformers on Python's own
documentation. They differ in their feed-forward layers only: in one they are dense,
in the other a token goes to one of eight experts, each as large as the dense layer.
We then look at what the routers do, save the model, load it, and let it write.

The layers come from `keras_moe`, and run on TensorFlow, JAX and PyTorch.
"""

"""
## Setup
"""

import os

os.environ.setdefault("KERAS_BACKEND", "jax")  # or "tensorflow", or "torch"

from pydoc_data.topics import topics

import keras
import numpy as np
from keras import layers, ops

import keras_moe

length = 128  # Characters that the model sees.
batch_size = 16
steps = 1500
num_experts = 8
width = 128

"""
## The data

Some 500,000 characters of reference documentation ship with Python. We keep each
paragraph once, train on the first nine tenths and hold the rest out.
"""

paragraphs = (p.strip() for topic in topics.values() for p in topic.split("\n\n"))
text = "\n\n".join(dict.fromkeys(paragraphs))
alphabet, characters = np.unique(list(text), return_inverse=True)
split = len(text) * 9 // 10
train_text, held_out_text = characters[:split], characters[split:]


def windows(text, starts):
    """Characters, and for each of them the next one."""
    window = text[starts[:, None] + np.arange(length + 1)]
    return window[:, :-1], window[:, 1:]


def random_batches():
    rng = np.random.default_rng(0)
    while True:
        starts = rng.integers(len(train_text) - length, size=batch_size)
        yield windows(train_text, starts)


count = (len(held_out_text) - 1) // (batch_size * length) * batch_size
held_out = windows(held_out_text, length * np.arange(count))
print(f"{len(text):,} characters, {len(alphabet)} different ones.")

"""
## The models

A pre-norm Transformer. What stands after the attention is an argument.
"""


def build_model(make_feed_forward):
    keras.utils.set_random_seed(0)
    inputs = keras.Input((length,), dtype="int32")
    positions = ops.cumsum(ops.ones_like(inputs), axis=1) - 1
    x = layers.Embedding(len(alphabet), width)(inputs)
    x += layers.Embedding(length, width)(positions)
    for block in range(3):
        y = layers.LayerNormalization()(x)
        y = layers.MultiHeadAttention(4, width // 4)(y, y, use_causal_mask=True)
        x += y
        y = layers.LayerNormalization()(x)
        x += make_feed_forward(f"block_{block}")(y)
    x = layers.LayerNormalization()(x)
    return keras.Model(inputs, layers.Dense(len(alphabet))(x))


"""
The dense layer first. Then the experts: `MaskedRouter` sends each token to its best
expert. In training an expert has room for 1.25 times its even share of the tokens;
what finds no room passes by on the residual connection. In evaluation there is no
capacity, so that no token is dropped. The router's balance loss, which keeps tokens
from crowding on a few experts, is added to the model's loss.
"""


def dense(name):
    return keras_moe.FeedForward(
        4 * width, kernel_initializer="glorot_uniform", name=name
    )


def mixture(name):
    return keras_moe.MoeLayer(
        keras_moe.FeedForwardExperts(
            num_experts, 4 * width, kernel_initializer="glorot_uniform"
        ),
        keras_moe.MaskedRouter(
            num_experts, load_balancing_loss_weight=0.01, export_metrics=()
        ),
        train_capacity_factor=1.25,
        eval_capacity_factor=None,
        name=name,
    )


"""
## Training

`RoutingMonitor` writes down how much each expert has to do.
"""


def bits(targets, logits):
    """Cross-entropy in bits per character."""
    nats = ops.sparse_categorical_crossentropy(targets, logits, from_logits=True)
    return nats / np.log(2)


def train(model, callbacks=()):
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.Adam(1e-3), loss, metrics=[bits])
    history = model.fit(
        random_batches(),
        steps_per_epoch=steps // 5,
        epochs=5,
        validation_data=held_out,
        validation_batch_size=batch_size,
        callbacks=list(callbacks),
        verbose=2,
    )
    return history.history["val_bits"][-1]


dense_model, moe_model = build_model(dense), build_model(mixture)
monitor = keras_moe.callbacks.RoutingMonitor()
dense_bits = train(dense_model)
moe_bits = train(moe_model, [monitor])

print(f"dense: {dense_model.count_params():,} parameters, {dense_bits:.3f} bits")
print(f"experts: {moe_model.count_params():,} parameters, {moe_bits:.3f} bits")

"""
What of the parameters does a token meet, and what does it cost?
"""

keras_moe.summary(moe_model, tokens_per_group=length)

"""
## Looking at the routers

The load of each expert, in units of the mean: 1 is balance.
"""

for record in monitor.history[-6:]:
    if record["phase"] == "validation":
        print(record["layer"], np.round(num_experts * record["load"], 2))

"""
## Saving, loading, writing

The model is saved as any Keras model is. Without a capacity a character's result
depends on nothing that comes after it, so that the model writes as it was trained.
"""

moe_model.save("mixture.keras")
model = keras.models.load_model("mixture.keras", compile=False)


def write(model, prompt, number, temperature=0.7):
    rng = np.random.default_rng(0)
    written = list(prompt)
    for _ in range(number):
        window = np.array([written[-length:]], dtype="int32")
        logits = model.predict_on_batch(window)[0, -1]
        # The largest of logits with Gumbel noise is a draw from their softmax.
        noise = rng.gumbel(size=logits.shape)
        written.append(int(np.argmax(logits / temperature + noise)))
    return "".join(alphabet[written[len(prompt) :]])


print(write(model, held_out_text[:length], 200))

"""
## Where to go from here

Raise `num_selected_experts` to 2, or let experts choose their tokens with
`ExpertsChooseMaskedRouter` (for encoders: it looks at later tokens). A trained dense
model can be turned into one with experts by `keras_moe.upcycle`, and weights of
Mixtral, Qwen-MoE and others come over with `keras_moe.convert`.
"""
