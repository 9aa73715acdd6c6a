"""Conversion of weights to and from the formats of other packages.

These tests do not need the packages; `tests/peers` converts their own layers.
"""

import ml_dtypes
import numpy as np
import pytest
from keras import ops
from safetensors.numpy import save_file

import keras_moe
from keras_moe import presets
from keras_moe.convert import FORMATS, load_weights, to_tensors
from keras_moe.convert.formats import TensorSpec

E, F, H = 4, 3, 2


def with_backbone(moe, gate):
    return keras_moe.MoeLayerWithBackbone(
        moe, 5, backbone_gate=gate, activation="silu", gated=True, use_bias=False
    )


def hierarchical():
    outer, inner = (
        keras_moe.Top2MaskedRouter(n, use_bias=False, name=name)
        for n, name in ((2, "groups"), (E // 2, "within"))
    )
    experts = keras_moe.FeedForwardExperts(E, F, use_bias=False)
    return keras_moe.HierarchicalMoeLayer(experts, outer, inner)


def tfm(backbone):
    moe = keras_moe.MoeLayer(
        keras_moe.FeedForwardExperts(E, F), keras_moe.ExpertsChooseMaskedRouter(E)
    )
    return keras_moe.MoeLayerWithBackbone(moe, 5) if backbone else moe


def deepseek():
    return presets.deepseek_v3(
        E, F, num_selected_experts=2, num_expert_groups=2, num_selected_groups=1
    )


# For each format, a layer and the number of its tensors.
CASES = {
    "mixtral": (lambda: presets.mixtral(E, F), 1 + 3 * E),
    "qwen2_moe": (lambda: with_backbone(presets.mixtral(E, F), True), 1 + 3 * E + 4),
    "qwen3_moe": (lambda: presets.qwen3_moe(E, F, num_selected_experts=2), 1 + 3 * E),
    "olmoe": (lambda: presets.olmoe(E, F, num_selected_experts=2), 1 + 3 * E),
    "deepseek_v3": (lambda: with_backbone(deepseek(), False), 2 + 3 * E + 3),
    "switch": (lambda: presets.switch(E, F), 1 + 2 * E),
    "keras_hub_mixtral": (lambda: presets.mixtral(E, F), 4),
    "keras_hub_qwen_moe": (lambda: with_backbone(presets.mixtral(E, F), True), 7),
    "keras_hub_qwen3_moe": (lambda: presets.mixtral(E, F), 3),
    "lucidrains": (hierarchical, 4),
    "tfm": (lambda: tfm(backbone=True), 10),
}


def test_every_format_has_a_case():
    assert CASES.keys() == FORMATS.keys()


def make(name):
    layer = CASES[name][0]()
    layer.build((None, 10, H))
    return layer


def randomize(layer, rng):
    for weight in layer.weights:
        weight.assign(rng.normal(size=weight.shape))


def values(layer):
    return [ops.convert_to_numpy(w).copy() for w in layer.weights]


def test_tensor_specs_table():
    """Tables that a reader can check: two experts, kernels from 1 to 2 units."""
    gate = np.array([[[1, 2]], [[3, 4]]])  # e h f
    inner = np.array([[[5, 6]], [[7, 8]]])
    weights = {"gate": gate, "inner": inner}
    linear = TensorSpec("{expert}.w", ("gate",), transposed=True)
    both = TensorSpec("both", ("gate", "inner"))
    turned = TensorSpec("turned", ("gate", "inner"), transposed=True)
    deep = TensorSpec("deep", ("gate",), levels=(1, 2))
    tables = {
        "0.w": [[1], [2]],
        "1.w": [[3], [4]],
        "both": [[[1, 2, 5, 6]], [[3, 4, 7, 8]]],
        "turned": [[[1], [2], [5], [6]], [[3], [4], [7], [8]]],
        "deep": [[[[1, 2]], [[3, 4]]]],
    }
    tables = {name: np.array(table) for name, table in tables.items()}
    found = {}
    for tensor in (linear, both, turned, deep):
        exported = tensor.export(weights)
        for array in exported.values():
            assert array.shape == tensor.shape(weights)
        loaded = tensor.load(exported, weights)
        for path in tensor.paths:
            np.testing.assert_array_equal(loaded[path], weights[path])
        found |= exported
    assert found.keys() == tables.keys()
    for name, table in tables.items():
        np.testing.assert_array_equal(found[name], table)


@pytest.mark.parametrize("stacked", [False, True])
@pytest.mark.parametrize("format", FORMATS)
def test_round_trip(format, stacked, rng):
    layer, other = make(format), make(format)
    randomize(layer, rng)
    tensors = to_tensors(layer, format, prefix="a.b.", stacked=stacked)
    if not stacked:
        assert len(tensors) == CASES[format][1]
    others = {"a.c": np.zeros(3), "b.gate.weight": np.zeros(3)}
    load_weights(other, tensors | others, format, prefix="a.b.")
    for found, expected in zip(values(other), values(layer), strict=True):
        np.testing.assert_array_equal(found, expected)


def test_files(rng, tmp_path):
    """Loads bfloat16 tensors from two files; tensors of other layers are ignored."""
    layer = make("mixtral")
    randomize(layer, rng)
    tensors = to_tensors(layer, "mixtral", prefix="moe.")
    tensors = {n: a.astype(ml_dtypes.bfloat16) for n, a in tensors.items()}
    names = sorted(tensors)
    for i, part in enumerate((names[:4], names[4:])):
        arrays = {name: np.ascontiguousarray(tensors[name]) for name in part}
        save_file(arrays | {f"other_{i}": np.zeros(3)}, tmp_path / f"{i}.safetensors")
    other = make("mixtral")
    load_weights(other, tmp_path, "mixtral", prefix="moe.")
    for found, expected in zip(values(other), values(layer), strict=True):
        rounded = expected.astype(ml_dtypes.bfloat16).astype("float32")
        np.testing.assert_array_equal(found, rounded)
    with pytest.raises(ValueError, match=r"w1\.weight is missing"):
        load_weights(other, tmp_path / "0.safetensors", "mixtral", prefix="moe.")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="no safetensors file"):
        load_weights(other, tmp_path / "empty", "mixtral")


def test_a_keras_layer_as_source(rng):
    layer, other = make("tfm"), make("tfm")
    randomize(layer, rng)
    moe, other = layer.moe, other.moe
    load_weights(other, moe, "tfm")
    for found, expected in zip(values(other), values(moe), strict=True):
        np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"gate.weight": None}, "gate.weight is missing"),
        ({"gate.weight": np.zeros((H, E))}, r"gate.weight has shape \(2, 4\) instead"),
        ({"gate.bias": np.zeros(E)}, "gate.bias is left over"),
        (
            {"experts.2.w1.weight": None, "experts.3.w2.weight": np.zeros(3)},
            r"experts.2.w1.weight is missing; experts.3.w2.weight has shape \(3,\)",
        ),
    ],
)
def test_mismatched_tensors_change_no_weights(change, message):
    layer = make("mixtral")
    tensors = {n: a + 1 for n, a in to_tensors(layer, "mixtral").items()} | change
    tensors = {name: array for name, array in tensors.items() if array is not None}
    before = values(layer)
    with pytest.raises(ValueError, match=message):
        load_weights(layer, tensors, "mixtral")
    for found, expected in zip(values(layer), before, strict=True):
        np.testing.assert_array_equal(found, expected)


def test_mismatched_layers_and_sources():
    layer = make("mixtral")
    with pytest.raises(ValueError, match=r"Only the layer has \[.*gate/kernel"):
        to_tensors(layer, "switch")
    with pytest.raises(ValueError, match=r"only the format \['backbone/gate"):
        to_tensors(layer, "qwen2_moe")
    with pytest.raises(ValueError, match="`format` must be one of"):
        to_tensors(layer, "unknown")
    with pytest.raises(ValueError, match="must be built"):
        to_tensors(presets.mixtral(E, F), "mixtral")
    with pytest.raises(TypeError, match=r"`layer` must be.*FeedForward\."):
        to_tensors(keras_moe.FeedForward(F), "mixtral")
    with pytest.raises(TypeError, match="`source` must be"):
        load_weights(layer, 3, "mixtral")
    layer.experts.output_layer.quantize("int8")
    with pytest.raises(ValueError, match="kernel_scale"):
        to_tensors(layer, "mixtral")


def test_the_error_for_a_wrong_prefix_lists_existing_ones():
    layer = make("mixtral")
    tensors = {
        **to_tensors(layer, "mixtral", prefix="model.layers.0.mlp."),
        **to_tensors(layer, "mixtral", prefix="model.layers.1.mlp."),
        "model.norm": np.zeros(3),
    }
    known = r"\['model\.layers\.0\.mlp\.', 'model\.layers\.1\.mlp\.'\]"
    with pytest.raises(ValueError, match=rf"the prefix 'layers.0.mlp'.*{known}"):
        load_weights(layer, tensors, "mixtral", prefix="layers.0.mlp")
    with pytest.raises(ValueError, match=r"first names are \['x'\]"):
        load_weights(layer, {"x": np.zeros(3)}, "mixtral")
