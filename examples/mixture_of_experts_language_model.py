"""
Title: A language model with Mixture-of-Experts layers
Author: The keras_moe project
Date created: 2026/11/22
Last modified: 2026/11/29
Description: Replace a Transformer's feed-forward layers by experts, train, monitor the routing, save and load.
Accelerator: None
"""

"""
## Introduction

A Mixture-of-Experts layer holds several feed-forward networks, the *experts*, and a
*router* that dispatches each token to a few of them. A model gets many more parameters
for about the same compute per token
([Shazeer et al., 2017](https://arxiv.org/abs/1701.06538);
[Fedus et al., 2021](https://arxiv.org/abs/2101.03961)).

In this example we train two small character-level Transformers on Python's own
documentation. They differ in their feed-forward layers only: in one these are dense, in
the other each token uses two of sixteen experts, each half as wide as the dense layer.
Then we look at the routing, save the model, load it, and generate text.

The layers are those of `keras_moe`, on TensorFlow, JAX or PyTorch.
"""

"""
## Setup

```shell
pip install keras-moe
```
"""

import os

os.environ.setdefault("KERAS_BACKEND", "jax")  # or "tensorflow", or "torch"

from pydoc_data.topics import topics

import keras
import numpy as np
from keras import layers, ops

import keras_moe

length = 128  # Characters of an input.
batch_size = 16
steps = 1500
num_experts = 16
experts_per_token = 2
width = 128

"""
## The data

Python comes with some 500,000 characters of reference documentation. We keep one copy of
each paragraph, train on the first nine tenths, and hold out the rest.
"""

paragraphs = (p.strip() for topic in topics.values() for p in topic.split("\n\n"))
text = "\n\n".join(dict.fromkeys(paragraphs))
alphabet, characters = np.unique(list(text), return_inverse=True)
split = len(text) * 9 // 10
train_text, held_out_text = characters[:split], characters[split:]


def windows(text, starts):
    """Returns characters, and the next one of each."""
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

A pre-norm Transformer, with its feed-forward layer as an argument.
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
First the dense layer, then the experts. `MaskedRouter` selects the two best experts of
each token, and divides their weights by their sum. With capacity factors of `None` no
token is dropped. The router adds its balance loss, which prevents it from using few
experts, to the model's loss.
"""


def dense(name):
    return keras_moe.FeedForward(
        4 * width, kernel_initializer="glorot_uniform", name=name
    )


def mixture(name):
    return keras_moe.MoeLayer(
        keras_moe.FeedForwardExperts(
            num_experts,
            4 * width // experts_per_token,
            kernel_initializer="glorot_uniform",
        ),
        keras_moe.MaskedRouter(
            num_experts,
            num_selected_experts=experts_per_token,
            normalize_weights=True,
            load_balancing_loss_weight=0.01,
            export_metrics=(),
        ),
        train_capacity_factor=None,
        eval_capacity_factor=None,
        name=name,
    )


"""
## Training

`RoutingMonitor` records the load of each expert.
"""


def bits(targets, logits):
    """Returns the cross-entropy in bits per character."""
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
The parameters that process one token, and the cost of the layers:
"""

keras_moe.summary(moe_model, tokens_per_group=length)

"""
## The routing

The load of each expert, relative to the mean load: 1 is balanced.
"""

for record in monitor.history[-6:]:
    if record["phase"] == "validation":
        print(record["layer"], np.round(num_experts * record["load"], 2))

"""
## Saving, loading, generating

The model is saved as any Keras model. Without a capacity, the output of a character does
not depend on later ones, so the model generates text as it was trained.
"""

moe_model.save("mixture.keras")
model = keras.models.load_model("mixture.keras", compile=False)


def generate(model, prompt, number, temperature=0.7):
    rng = np.random.default_rng(0)
    text = list(prompt)
    for _ in range(number):
        window = np.array([text[-length:]], dtype="int32")
        logits = model.predict_on_batch(window)[0, -1]
        # The largest of logits with Gumbel noise is a sample of their softmax.
        noise = rng.gumbel(size=logits.shape)
        text.append(int(np.argmax(logits / temperature + noise)))
    return "".join(alphabet[text[len(prompt) :]])


print(generate(model, held_out_text[:length], 200))

"""
## Where to go from here

Try another router, such as `BiasBalancedMaskedRouter`, which balances the load without a
loss, or `ExpertsChooseMaskedRouter` (for encoders, since experts see later tokens).
`keras_moe.upcycle_model` turns a trained dense model into one with experts, and
`keras_moe.convert` loads weights of Mixtral, Qwen-MoE and others.
"""
