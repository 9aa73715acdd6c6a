"""Accelerated models of keras-hub give the same results, on three backends."""

import gc

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
    "num_experts": E,
}
WIDE = {"intermediate_dim": 24, "top_k": K}
MODELS = {
    "Mixtral": WIDE,
    "QwenMoe": {
        **WIDE,
        "moe_intermediate_dim": 12,
        "shared_expert_intermediate_dim": 10,
        "norm_top_k_prob": False,
    },
    "Qwen3Moe": {
        **WIDE,
        "moe_intermediate_dim": 12,
        "norm_top_k_prob": True,
        "head_dim": 8,
    },
    "Qwen3_5Moe": {
        "top_k": K,
        "moe_intermediate_dim": 12,
        "shared_expert_intermediate_size": 10,
        "head_dim": 8,
        "layer_types": ["full_attention", "linear_attention"],
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 2,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
    },
    "GptOss": WIDE,
    "Gemma4": {
        "image_size": 16,
        "intermediate_dim": 24,
        "head_dim": 8,
        "enable_moe_block": True,
        "expert_intermediate_dim": 12,
        "num_experts_per_token": K,
    },
}
each_model = pytest.mark.parametrize("name", MODELS)


def make_backbone(name, **arguments):
    keras.utils.set_random_seed(2)
    arguments = {**SMALL, **MODELS[name], **arguments}
    backbone = getattr(keras_hub.models, f"{name}Backbone")(**arguments)
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
        "position_ids": np.broadcast_to(np.arange(T, dtype="int32"), (3, T)),
    }


def inputs_of(model, data):
    """Returns the inputs that a model has: only Gemma 4 has positions."""
    return {name: data[name] for name in model.input}


def predict(model, data):
    return model.predict_on_batch(inputs_of(model, data))


@each_model
def test_outputs_and_files(name, data, tmp_path):
    backbone = make_backbone(name)
    expected = predict(backbone, data)
    paths = [weight.path for weight in backbone.weights]
    assert accelerate(backbone) is backbone
    np.testing.assert_allclose(predict(backbone, data), expected, atol=1e-4)
    assert [weight.path for weight in backbone.weights] == paths
    backbone.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    np.testing.assert_allclose(predict(loaded, data), expected, atol=1e-4)
    np.testing.assert_allclose(predict(accelerate(loaded), data), expected, atol=1e-4)


def train(name, data, change):
    """Returns the losses of three steps, and the weights after them."""
    model = change(make_backbone(name, num_layers=1))
    model.compile(keras.optimizers.SGD(0.01), "mse")
    batch = inputs_of(model, data), np.ones((3, T, H), "float32")
    losses = [float(np.ravel(model.train_on_batch(*batch))[0]) for _ in range(3)]
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
    accelerate(model)
    assert model.generate_function is None  # It is compiled again.
    found = model.generate(data, stop_token_ids=None)
    np.testing.assert_array_equal(found["token_ids"], expected["token_ids"])
    assert not np.array_equal(found["token_ids"], data["token_ids"])


@pytest.fixture
def few_objects_to_collect():
    """Saves half a second per quantized layer, each of which collects garbage."""
    gc.freeze()
    yield
    gc.unfreeze()


def quantize_to_int8(model):
    model.quantize("int8")
    return model


def quantize_to_int4(model):
    model.quantize("int4")
    return model


def enable_lora(model):
    """Adapts the attention, the routers and the shared expert."""
    names = ["sparse_feedforward_gate_dense", "feedforward_gate_dense"]
    names += ["router_dense", "proj"]
    model.enable_lora(2, [*model.default_lora_layer_names(), *names])
    for weight in model.trainable_weights:
        if "lora" in weight.name:
            weight.assign(keras.random.normal(weight.shape, seed=3))
    return model


@pytest.mark.usefixtures("few_objects_to_collect")
@pytest.mark.parametrize("change", [quantize_to_int8, quantize_to_int4, enable_lora])
@pytest.mark.parametrize("name", ["QwenMoe", "GptOss", "Gemma4"])
def test_quantized_and_adapted_models(name, change, data):
    """Changes a model as it is, before and after acceleration."""

    def outputs(model):
        return ops.convert_to_numpy(model(inputs_of(model, data)))

    changed = change(make_backbone(name, num_layers=1))
    expected = outputs(changed)
    np.testing.assert_allclose(outputs(accelerate(changed)), expected, atol=1e-4)
    changed = change(accelerate(make_backbone(name, num_layers=1)))
    np.testing.assert_allclose(outputs(changed), expected, atol=1e-4)


def make_blocks(e=E, k=K, **arguments):
    mixtral, qwen, qwen3, qwen3_5, gpt_oss = (
        hub.block_class(name)
        for name in ("mixtral", "qwen_moe", "qwen3_moe", "qwen3_5_moe", "gpt_oss")
    )
    return {
        "mixtral": mixtral(H, 12, e, k, **arguments),
        "qwen_moe": qwen(H, 12, 10, e, k, False, **arguments),
        "qwen3_moe": qwen3(H, 12, e, k, True, **arguments),
        "qwen3_5_moe": qwen3_5(H, 12, 10, e, k, **arguments),
        "gpt_oss": gpt_oss(H, 12, e, k, **arguments),
        "gemma4": hub.Gemma4RouterAndExperts(H, 12, e, k, **arguments),
    }


# The rank of the attention mask of each block that has a balance loss.
MASKS = {"mixtral": 2, "qwen_moe": 3, "qwen3_moe": 3, "qwen3_5_moe": 2}


def make_block(kind, **arguments):
    """Returns a built block; all of its weights, such as biases, are random."""
    block = make_blocks(**arguments)[kind]
    block.build((None, None, H))
    for weight in block.weights:
        weight.assign(keras.random.normal(weight.shape, stddev=H**-0.5))
    return block


def check_block(block, atol, x, **arguments):
    """Compares outputs, logits and the balance loss."""

    def results():
        outputs = keras.tree.flatten(block(x, **arguments))
        return [
            ops.convert_to_numpy(ops.cast(y, "float32"))
            for y in (*outputs, *block.losses)
        ]

    expected = results()
    accelerate(block)
    for found, value in zip(results(), expected, strict=True):
        np.testing.assert_allclose(found, value, atol=atol)


@pytest.fixture
def x(rng):
    return ops.convert_to_tensor(rng.normal(size=(3, T, H)).astype("float32"))


@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("masked", [False, True])
def test_blocks(name, masked, x):
    mask = None
    if masked:
        valid = np.broadcast_to(np.arange(T) < np.array([[T], [7], [9]]), (3, T))
        if MASKS[name] == 3:
            valid = np.broadcast_to(valid[:, :, None], (3, T, T))
        mask = ops.convert_to_tensor(valid.copy())
    check_block(make_block(name), 1e-5, x, attention_mask=mask, training=True)


@pytest.mark.parametrize("name", ["gpt_oss", "gemma4"])
def test_blocks_without_a_balance_loss(name, x):
    check_block(make_block(name), 1e-4, 10 * x)


@pytest.mark.parametrize("name", [*MASKS, "gpt_oss", "gemma4"])
def test_bfloat16(name, rng):
    """With this many experts, tokens have equal probabilities for some of them."""
    x = ops.convert_to_tensor(rng.normal(size=(3, 100, H)).astype("float32"))
    check_block(make_block(name, e=128, k=8, dtype="bfloat16"), 0.05, x)


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
    quantized = make_block("qwen3_moe", dtype="int8_from_float32", name="quantized")
    with pytest.raises(ValueError, match="experts must not be quantized"):
        accelerate(quantized)
    experts = make_block("gemma4").moe_expert_bank
    with pytest.raises(ValueError, match="must be in a layer with its router"):
        accelerate(experts)
    # No block is changed if one of them is refused.
    model = keras.Sequential([make_block("gpt_oss"), quantized])
    with pytest.raises(ValueError, match="must not be quantized"):
        accelerate(model)
    assert "call" not in vars(model.layers[0])
