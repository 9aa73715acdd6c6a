"""The layers of each family of transformers, against the real blocks."""

import json

import families
import keras
import numpy as np
import pytest
import torch
from gradients import gradients
from keras import ops
from safetensors.numpy import load_file
from transformers.integrations.finegrained_fp8 import Fp8Dequantize
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from keras_moe import convert
from keras_moe.convert.configs import read_config
from keras_moe.convert.families import ALIASES
from keras_moe.convert.families import FAMILIES as OURS
from keras_moe.convert.sources import as_numpy

H, T = 8, 10
each = pytest.mark.parametrize("name", families.FAMILIES)


def test_every_family_has_a_model():
    tested = {ALIASES.get(name, name) for name in families.FAMILIES}
    assert tested == OURS.keys()


def made(name, **changes):
    """Returns `(config, model, block, layer)`; the layer has the block's weights."""
    config, model, block = families.make(name, **changes)
    index = families.FAMILIES[name].layer_index
    layer = convert.layer_from_config(config, index)
    layer.build((None, None, H))
    convert.load_weights(layer, block, name, config=config)
    return config, model, block, layer


def random_inputs(name, rng):
    """Returns the inputs of `families.forward`, and the arguments of our layer."""
    x = rng.normal(size=(2, 3, T, H)).astype("float32")
    theirs = torch.from_numpy(x)
    if name.startswith("gemma4"):
        return theirs, {"inputs": x[0], "router_inputs": x[1]}
    return theirs[0], {"inputs": x[0]}


def close(found, expected):
    found, expected = ops.convert_to_numpy(found), np.asarray(expected)
    np.testing.assert_allclose(found, expected, atol=1e-5 * np.abs(expected).max())


@each
def test_outputs_and_the_gradient_of_the_gate(name, rng):
    _, _, block, layer = made(name)
    theirs, ours = random_inputs(name, rng)
    expected = families.forward(block, theirs, name)
    assert expected.abs().max() > 0.1
    close(layer(**ours), expected.detach())
    direction = rng.normal(size=(3, T, H)).astype("float32")
    gate = next(
        p
        for n, p in block.named_parameters()
        if "router" in n or n.startswith(("gate", "router"))
        if p.ndim == 2 and "bias" not in n
    )
    (expected,) = torch.autograd.grad(
        (expected * torch.from_numpy(direction)).sum(), gate
    )
    kernel = getattr(layer, "moe", layer).router.router_weights.kernel

    def project(value):
        with keras.StatelessScope([(kernel, value)]):
            return ops.sum(layer(**ours) * direction)

    (found,) = gradients(project, kernel.numpy())
    close(found, expected.T)


@each
def test_training_mode(name, rng):
    """Where the real block draws nothing at random."""
    _, _, block, layer = made(name)
    theirs, ours = random_inputs(name, rng)
    if name in ("phimoe", "nllb_moe", "switch_transformers"):
        return
    expected = families.forward(block.train(), theirs, name)
    close(layer(**ours, training=True), expected.detach())


@each
def test_files(name, rng, tmp_path):
    """From a sharded folder in one line; there and back bit by bit."""
    _, model, block = families.make(name)
    model.save_pretrained(tmp_path, max_shard_size="3KB")
    assert (tmp_path / "model.safetensors.index.json").exists()
    index = families.FAMILIES[name].layer_index
    layer = convert.from_pretrained(tmp_path, index)
    theirs, ours = random_inputs(name, rng)
    close(layer(**ours), families.forward(block, theirs, name).detach())
    config = json.loads((tmp_path / "config.json").read_text())
    kind = config["model_type"]
    tensors = {}
    for file in tmp_path.glob("*.safetensors"):
        tensors |= load_file(file)
    prefix = prefix_of(tensors, convert.to_tensors(layer, kind, config=config))
    exported = convert.to_tensors(layer, kind, prefix=prefix, config=config)
    compare_bits(exported, {name: tensors[name] for name in exported}, kind)
    exported = convert.to_tensors(layer, kind, stacked=True, config=config)
    state = {name: tensor.numpy() for name, tensor in block.state_dict().items()}
    compare_bits(exported, {name: state[name] for name in exported}, kind)


def prefix_of(tensors, suffixes):
    """Returns the prefix of the last layer's tensors."""
    suffix = next(iter(suffixes))
    return max(name for name in tensors if name.endswith(f".{suffix}"))[: -len(suffix)]


def compare_bits(found, expected, kind):
    for name, array in found.items():
        value = expected[name]
        if kind == "longcat_flash" and "experts" in name:
            # An identity expert has no use for its weights.
            used = array != 0
            array, value = array[used], value[used]
        if kind == "qwen3_vl_moe" and array.shape != value.shape:
            # Files of the hub are transposed, those of transformers 5.24 are not.
            array = np.swapaxes(array, -1, -2)
        np.testing.assert_array_equal(array, value, name)


@each
def test_missing_settings_are_those_of_transformers(name):
    """Configs of the hub leave out what is a default of their class."""
    config, _, _ = families.make(name)
    if "text_config" in config.to_dict():
        config = config.text_config
    values = config.to_dict()
    for key in values.keys() - {"model_type", "ffn_config"}:
        rest = {k: v for k, v in values.items() if k != key}
        try:
            complete = type(config).from_dict(rest).to_dict()
        except Exception:  # transformers refuses it.
            continue
        try:
            found = settings_of(rest)
        except ValueError as error:  # A size, which has no default.
            assert key in str(error)
        else:
            assert found == settings_of(complete), key


def settings_of(values):
    """Returns the settings of the layers with experts, without the losses' weights.

    transformers adds no losses by default, and we add none that a config does not name.
    """
    config = read_config(values)
    parts = [config.settings(part) for part in ("router", "experts", "shared", "layer")]
    for name in ("load_balancing_loss_weight", "router_z_loss_weight"):
        parts[0].pop(name, None)
    return [config.family.is_sparse(config, i) for i in range(2)], parts


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        # Three slots for ten tokens, so that some are dropped.
        ("switch_transformers", {"expert_capacity": 3}),
        ("nemotron_h", {"moe_latent_size": 4}),
        ("deepseek_v2", {"topk_method": "greedy"}),
        ("deepseek_v3", {"norm_topk_prob": False}),
        ("cohere2_moe", {"expert_selection_fn": "softmax"}),
        ("cohere2_moe", {"shared_expert_combination_strategy": "sum"}),
        ("cohere2_moe", {"norm_topk_prob": False, "num_shared_experts": 0}),
        ("lfm2_moe", {"use_expert_bias": False, "norm_topk_prob": False}),
        ("ernie4_5_moe", {"use_bias": True}),
        ("granitemoe", {"hidden_act": "gelu_pytorch_tanh"}),
        ("llama4_text", {"num_experts_per_tok": 1}),
        ("longcat_flash", {"zero_expert_num": 3}),
    ],
)
def test_other_settings(name, changes, rng):
    _, _, block, layer = made(name, **changes)
    theirs, ours = random_inputs(name, rng)
    close(layer(**ours), families.forward(block, theirs, name).detach())


def test_decoders_of_transformers(rng):
    """The same values of FP8 with a scale per block, and of MXFP4."""
    weight = torch.from_numpy(rng.normal(size=(200, 300)).astype("float32"))
    weight = weight.to(torch.float8_e4m3fn)
    scale = torch.from_numpy(rng.uniform(size=(2, 3)).astype("float32"))
    blocks = torch.from_numpy(rng.integers(256, size=(2, 6, 4, 16)).astype("uint8"))
    scales = torch.from_numpy(rng.integers(100, 140, size=(2, 6, 4)).astype("uint8"))
    expected = convert_moe_packed_tensors(blocks, scales, dtype=torch.float32)
    found = convert.decode_mxfp4(blocks.numpy(), scales.numpy())
    np.testing.assert_array_equal(np.swapaxes(found, -1, -2), expected)
    # Theirs needs whole blocks.
    whole = torch.zeros((256, 384), dtype=torch.float8_e4m3fn)
    whole[:200, :300] = weight
    expected = Fp8Dequantize(None)._dequantize_one(whole, scale)[:200, :300]
    found = convert.decode_fp8(as_numpy(weight), scale.numpy())
    np.testing.assert_array_equal(found, expected)


def test_a_module_without_values():
    _, _, block, layer = made("mixtral")
    before = convert.to_tensors(layer, "mixtral")
    with pytest.raises(ValueError, match=r"gate.weight has no values, on the device"):
        convert.load_weights(layer, block.to("meta"), "mixtral")
    for name, array in convert.to_tensors(layer, "mixtral").items():
        np.testing.assert_array_equal(array, before[name])


def test_a_converted_layer_trains(rng):
    """A training step changes the loaded weights."""
    _, _, _, layer = made("mixtral")
    x = rng.normal(size=(3, T, H)).astype("float32")
    model = keras.Sequential([keras.Input((T, H)), layer])
    before = convert.to_tensors(layer, "mixtral")
    model.compile(keras.optimizers.SGD(0.1), "mse")
    model.train_on_batch(x, 2 * x)
    after = convert.to_tensors(layer, "mixtral")
    assert all((before[name] != after[name]).any() for name in before)
