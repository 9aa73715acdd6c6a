"""Accelerated models of keras-hub give the same results, on three backends."""

import hub
import keras
import keras_hub
import numpy as np
import pytest
from keras import ops

from keras_moe import accelerate

E, H, K, T = 8, 16, 2, 12
SMALL = {
    "vocabulary_size": 30,
    "num_layers": 2,
    "num_query_heads": 2,
    "num_key_value_heads": 2,
    "hidden_dim": H,
    "intermediate_dim": 24,
    "num_experts": E,
    "top_k": K,
}
NARROW = {"moe_intermediate_dim": 12, "norm_top_k_prob": True}
MODELS = {
    "Mixtral": {},
    "QwenMoe": {
        "moe_intermediate_dim": 12,
        "shared_expert_intermediate_dim": 10,
        "norm_top_k_prob": False,
    },
    "Qwen3Moe": {**NARROW, "head_dim": 8},
}
each_model = pytest.mark.parametrize("name", MODELS)


def make_backbone(name):
    keras.utils.set_random_seed(2)
    backbone = getattr(keras_hub.models, f"{name}Backbone")(**SMALL, **MODELS[name])
    for weight in backbone.weights:  # Large enough for the experts to differ.
        if len(weight.shape) > 1:
            weight.assign(
                keras.random.normal(weight.shape, stddev=weight.shape[-2] ** -0.5)
            )
    return backbone


@pytest.fixture
def data(rng):
    mask = np.arange(T) < np.array([T, 7, 9])[:, None]
    return {
        "token_ids": rng.integers(3, 30, size=(3, T)).astype("int32"),
        "padding_mask": mask.astype("int32"),
    }


@each_model
def test_outputs_and_files(name, data, tmp_path):
    backbone = make_backbone(name)
    expected = backbone.predict_on_batch(data)
    paths = [weight.path for weight in backbone.weights]
    assert accelerate(backbone) is backbone
    np.testing.assert_allclose(backbone.predict_on_batch(data), expected, atol=1e-4)
    assert [weight.path for weight in backbone.weights] == paths
    backbone.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    np.testing.assert_allclose(loaded.predict_on_batch(data), expected, atol=1e-4)
    np.testing.assert_allclose(
        accelerate(loaded).predict_on_batch(data), expected, atol=1e-4
    )


def train(name, data, change):
    """Returns the losses of three steps, and the weights after them."""
    model = change(make_backbone(name))
    model.compile(keras.optimizers.SGD(0.01), "mse")
    target = np.ones((3, T, H), "float32")
    losses = [float(np.ravel(model.train_on_batch(data, target))[0]) for _ in range(3)]
    return losses, [ops.convert_to_numpy(w) for w in model.weights]


@each_model
def test_training_and_the_balance_loss(name, data):
    losses, weights = train(name, data, accelerate)
    expected_losses, expected = train(name, data, lambda model: model)
    np.testing.assert_allclose(losses, expected_losses, rtol=1e-4)
    for found, weight in zip(weights, expected, strict=True):
        np.testing.assert_allclose(found, weight, atol=1e-4)


@each_model
def test_generation(name, data):
    task = getattr(keras_hub.models, f"{name}CausalLM")
    model = task(backbone=make_backbone(name), preprocessor=None)
    model.compile(sampler="greedy")
    expected = model.generate(data, stop_token_ids=None)
    found = accelerate(model).generate(data, stop_token_ids=None)
    np.testing.assert_array_equal(found["token_ids"], expected["token_ids"])
    assert not np.array_equal(found["token_ids"], data["token_ids"])


def make_blocks():
    mixtral, qwen, qwen3, qwen3_5 = (
        hub.block_class(name)
        for name in ("mixtral", "qwen_moe", "qwen3_moe", "qwen3_5_moe")
    )
    return {
        "mixtral": mixtral(H, 12, E, K),
        "qwen_moe": qwen(H, 12, 10, E, K, False),
        "qwen3_moe": qwen3(H, 12, E, K, True),
        "qwen3_5_moe": qwen3_5(H, 12, 10, E, K),
    }


# The rank of the attention mask of each block.
MASKS = {"mixtral": 2, "qwen_moe": 3, "qwen3_moe": 3, "qwen3_5_moe": 2}


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("name", MASKS)
def test_blocks(name, masked, rng):
    """Compares outputs, logits and the balance loss."""
    block = make_blocks()[name]
    block.build((None, None, H))
    x = ops.convert_to_tensor(rng.normal(size=(3, T, H)).astype("float32"))
    mask = None
    if masked:
        valid = np.broadcast_to(np.arange(T) < np.array([[T], [7], [9]]), (3, T))
        if MASKS[name] == 3:
            valid = np.broadcast_to(valid[:, :, None], (3, T, T))
        mask = ops.convert_to_tensor(valid.copy())

    def results():
        outputs, logits = block(x, attention_mask=mask, training=True)
        return [ops.convert_to_numpy(y) for y in (outputs, logits, block.losses[0])]

    expected = results()
    accelerate(block)
    for found, value in zip(results(), expected, strict=True):
        np.testing.assert_allclose(found, value, atol=1e-5)


def test_unsupported_models():
    with pytest.raises(ValueError, match="must contain blocks of keras-hub"):
        accelerate(keras.Sequential([keras.Input((3,)), keras.layers.Dense(2)]))
    block = make_blocks()["mixtral"]
    with pytest.raises(ValueError, match="must be built"):
        accelerate(block)
    block.build((None, None, H))
    block.router_jitter_noise = 0.1
    with pytest.raises(ValueError, match=r"router_jitter_noise=0\.1"):
        accelerate(block)
    backbone = make_backbone("Mixtral")
    backbone.quantize("int8")
    with pytest.raises(ValueError, match="must not be quantized"):
        accelerate(backbone)
