"""Conversion of weights to and from the formats of other packages.

These tests do not need the packages; `tests/peers` converts their own layers.
"""

import json
import tracemalloc

import keras
import ml_dtypes
import numpy as np
import pytest
from keras import ops
from safetensors.numpy import save_file

import keras_moe
from keras_moe import presets
from keras_moe.convert import (
    FORMATS,
    decode_fp8,
    decode_mxfp4,
    from_pretrained,
    layer_from_config,
    load_weights,
    to_tensors,
)
from keras_moe.convert.families import ALIASES, FAMILIES
from keras_moe.convert.formats import EXPERT_BIAS, GATE, INNER, TensorSpec

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


# What a config of any family needs.
CONFIG = {
    "hidden_size": H,
    "num_layers": 1,
    **dict.fromkeys(("d_model", "head_dim"), H),
    **dict.fromkeys(("intermediate_size", "moe_intermediate_size", "d_ff"), F),
    **dict.fromkeys(("expert_ffn_hidden_size", "ffn_hidden_size"), F),
    **dict.fromkeys(("num_local_experts", "num_experts", "n_routed_experts"), E),
    **dict.fromkeys(("moe_num_experts", "moe_k", "top_k_experts"), 2),
    **dict.fromkeys(("num_experts_per_tok", "moe_topk", "moe_top_k"), 2),
    **dict.fromkeys(("n_shared_experts", "num_shared_experts"), 1),
    **dict.fromkeys(("n_group", "moe_num_shared_experts", "zero_expert_num"), 2),
    **dict.fromkeys(("shared_expert_intermediate_size", "moe_latent_size"), 5),
    **dict.fromkeys(("shared_intermediate_size", "encoder_ffn_dim"), 5),
    **dict.fromkeys(("first_k_dense_replace", "num_dense_layers"), 0),
    **dict.fromkeys(("moe_layer_start_index", "expert_layer_offset"), 0),
    **dict.fromkeys(("topk_group", "num_sparse_encoder_layers"), 1),
    "encoder_sparse_step": 1,
    "layers_block_type": ["moe"],
    "enable_moe_block": True,
    "num_hash_layers": 0,
}
OF_TRANSFORMERS = [*FAMILIES, *ALIASES]
# For each format of another package, a layer and the number of its tensors.
CASES = {
    "keras_hub_mixtral": (lambda: presets.mixtral(E, F), 4),
    "keras_hub_qwen_moe": (lambda: with_backbone(presets.mixtral(E, F), True), 7),
    "keras_hub_qwen3_moe": (lambda: presets.mixtral(E, F), 3),
    "keras_hub_qwen3_5_moe": (lambda: with_backbone(presets.mixtral(E, F), True), 7),
    "keras_hub_gpt_oss": (lambda: of_family("gpt_oss"), 6),
    "keras_hub_gemma4": (lambda: of_family("gemma4"), 6),
    "lucidrains": (hierarchical, 4),
    "tfm": (lambda: tfm(backbone=True), 10),
}


def of_family(name, **changes):
    return layer_from_config({**CONFIG, "model_type": name, **changes})


def test_every_format_has_a_case():
    assert {*CASES, *OF_TRANSFORMERS} == FORMATS.keys()


def make(name):
    layer = CASES[name][0]() if name in CASES else of_family(name)
    layer.build((None, 10, H))
    return layer


def randomize(layer, rng):
    for weight in layer.weights:
        weight.assign(rng.normal(size=weight.shape))


def values(layer):
    return [ops.convert_to_numpy(w).copy() for w in layer.weights]


def test_tensor_specs_table():
    """Tables that a reader can check: two experts, kernels from 1 to 2 units."""
    weights = {
        GATE: np.array([[[1, 2]], [[3, 4]]], "float32"),  # e h f
        INNER: np.array([[[5, 6]], [[7, 8]]], "float32"),
        EXPERT_BIAS: np.array([9, 10], "float32"),
    }
    both = (GATE, INNER)
    table = {
        TensorSpec("{expert}.w", (GATE,), transposed=True): {
            "0.w": [[1], [2]],
            "1.w": [[3], [4]],
        },
        TensorSpec("both", both): {"both": [[[1, 2, 5, 6]], [[3, 4, 7, 8]]]},
        TensorSpec("turned", both, transposed=True): {
            "turned": [[[1], [2], [5], [6]], [[3], [4], [7], [8]]]
        },
        TensorSpec("mixed", both, interleaved=True): {
            "mixed": [[[1, 5, 2, 6]], [[3, 7, 4, 8]]]
        },
        TensorSpec("flat", (GATE,), dropped=(1,)): {"flat": [[1, 2], [3, 4]]},
        TensorSpec("deep", (GATE,), levels=(1, 2)): {"deep": [[[[1, 2]], [[3, 4]]]]},
        TensorSpec("rows", (GATE,), merged=True): {"rows": [[1, 2], [3, 4]]},
        TensorSpec("more", (GATE,), num_rows=3): {
            "more": [[[1, 2]], [[3, 4]], [[0, 0]]]
        },
        TensorSpec("{expert}.more", (GATE,), num_rows=3): {
            "0.more": [[1, 2]],
            "1.more": [[3, 4]],
            "2.more": [[0, 0]],
        },
        TensorSpec("bias", (EXPERT_BIAS,), inserted=(0,)): {"bias": [[9, 10]]},
    }
    for spec, expected in table.items():
        exported = spec.export(weights)
        assert exported.keys() == expected.keys()
        for name, array in exported.items():
            assert array.shape == spec.shape(weights)
            np.testing.assert_array_equal(array, expected[name])
        for path in spec.paths:
            loaded = spec.read(exported, weights, path)
            np.testing.assert_array_equal(loaded, weights[path])


@pytest.mark.parametrize("stacked", [False, True])
@pytest.mark.parametrize("format", FORMATS)
def test_round_trip(format, stacked, rng):
    layer, other = make(format), make(format)
    randomize(layer, rng)
    tensors = to_tensors(layer, format, prefix="a.b.", stacked=stacked)
    if format in CASES:
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
    with pytest.raises(ValueError, match=r"only the format \['backbone_gate"):
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


def without_changes(call, message, error=ValueError, layer=None):
    """The call raises an error, and the layer has its weights of before."""
    layer = make("mixtral") if layer is None else layer
    before = values(layer)
    with pytest.raises(error, match=message):
        call(layer)
    for found, expected in zip(values(layer), before, strict=True):
        np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: a.tolist(), "w2.weight must be an array or a tensor.*not list"),
        (lambda a: a.astype(object), "w2.weight must be an array .*not ndarray"),
        (lambda a: a.astype(int), "w2.weight must have floats, not int64"),
        (lambda a: a.astype("complex64"), "w2.weight must have floats, not complex64"),
        (lambda a: a.astype(ml_dtypes.float8_e4m3fn), "w2.weight has no scale for its"),
    ],
)
def test_tensors_without_floats(change, message):
    """Although this tensor is the last one that is read."""

    def load(layer):
        tensors = {n: a + 1 for n, a in to_tensors(layer, "mixtral").items()}
        name = f"experts.{E - 1}.w2.weight"
        load_weights(layer, tensors | {name: change(tensors[name])}, "mixtral")

    without_changes(load, message)


def test_transposed_tensors_of_the_right_size():
    """Of `[e, h, 2f]` and `[e, 2f, h]`, where both shapes are the same."""
    layer = of_family("qwen3_moe", hidden_size=2 * F)
    layer.build((None, 10, 2 * F))
    tensors = to_tensors(layer, "qwen3_moe", stacked=True)
    turned = {n: np.swapaxes(a, -1, -2) for n, a in tensors.items() if "experts" in n}
    message = r"down_proj has shape \(4, 3, 6\) instead of \(4, 6, 3\), so it is trans"
    load = lambda layer: load_weights(layer, tensors | turned, "qwen3_moe")  # noqa: E731
    without_changes(load, message, layer=layer)
    # This family has them in both orders.
    vl = of_family("qwen3_vl_moe", hidden_size=2 * F)
    vl.build((None, 10, 2 * F))
    for found in (tensors, tensors | turned):
        load_weights(vl, found, "qwen3_vl_moe")
        for ours, expected in zip(values(vl), values(layer), strict=True):
            np.testing.assert_array_equal(ours, expected)


def settings(router=None, experts=None):
    router = {"num_selected_experts": 2, "normalize_weights": True, **(router or {})}
    experts = {"activation": "silu", "gated": True, **(experts or {})}
    layer = keras_moe.MoeLayer(
        keras_moe.FeedForwardExperts(E, F, use_bias=False, **experts),
        keras_moe.MaskedRouter(E, use_bias=False, **router),
        train_capacity_factor=None,
        eval_capacity_factor=None,
    )
    layer.build((None, 10, H))
    return layer


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (lambda: settings(experts={"activation": "relu"}), "`activation` .* 'relu'"),
        (
            lambda: settings({"mechanism": "sigmoid"}),
            "`mechanism` .* 'sigmoid' instead",
        ),
        (
            lambda: settings({"normalize_weights": False}),
            "`normalize_weights` .* False",
        ),
    ],
)
def test_a_layer_that_computes_something_else(layer, message):
    tensors = to_tensors(make("mixtral"), "mixtral")
    load = lambda layer: load_weights(layer, tensors, "mixtral")  # noqa: E731
    without_changes(load, message, layer=layer())
    with pytest.raises(ValueError, match=message):
        to_tensors(layer(), "mixtral")


def test_settings_of_a_config():
    """What a family leaves to its config is checked against it."""
    config = {**CONFIG, "model_type": "qwen3_moe"}
    layer = layer_from_config(config)
    layer.build((None, 10, H))
    tensors = to_tensors(layer, "qwen3_moe", config=config)
    load_weights(layer, tensors, "qwen3_moe", config=config)
    message = "`normalize_weights` of the router is False instead of True"
    config["norm_topk_prob"] = True
    without_changes(
        lambda layer: load_weights(layer, tensors, "qwen3_moe", config=config),
        message,
        layer=layer,
    )
    gelu = layer_from_config({**config, "hidden_act": "gelu_new"})
    gelu.build((None, 10, H))
    with pytest.raises(ValueError, match="'gelu_tanh' instead of 'silu'"):
        load_weights(gelu, tensors, "qwen3_moe")


def test_a_config_of_another_family(tmp_path):
    write_model(tmp_path, "qwen3_moe")
    without_changes(
        lambda layer: load_weights(layer, tmp_path, "mixtral", prefix=PREFIX),
        "The config is one of 'qwen3_moe', not of 'mixtral'",
    )


PREFIX = "model.layers.0.mlp."


def write_model(folder, name, index=True, **changes):
    """Writes a model of one layer in two shards; returns its tensors."""
    config = {**CONFIG, "model_type": name, **changes}
    config["d_model"] = config["hidden_size"]
    (folder / "config.json").write_text(json.dumps(config))
    layer = layer_from_config(config)
    layer.build((None, 10, config["hidden_size"]))
    randomize(layer, np.random.default_rng(3))
    tensors = to_tensors(layer, name, prefix=PREFIX, config=config)
    tensors = {n: np.ascontiguousarray(a) for n, a in tensors.items()}
    names = sorted(tensors)
    files = {}
    for i, part in enumerate((names[:4], names[4:])):
        file = f"model-{i}.safetensors"
        save_file({name: tensors[name] for name in part}, folder / file)
        files |= dict.fromkeys(part, file)
    if index:
        path = folder / "model.safetensors.index.json"
        path.write_text(json.dumps({"weight_map": files}))
    return tensors


def loaded_from(folder, **kwargs):
    layer = from_pretrained(folder, 0, **kwargs)
    return to_tensors(layer, "qwen3_moe", prefix=PREFIX)


def same(found, expected):
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        np.testing.assert_array_equal(found[name], array)


def test_shards_that_the_index_names(tmp_path):
    tensors = write_model(tmp_path, "qwen3_moe")
    stale = {name: array + 1 for name, array in tensors.items()}
    save_file(stale, tmp_path / "model-2.safetensors")
    same(loaded_from(tmp_path), tensors)
    layer = of_family("qwen3_moe")
    layer.build((None, 10, H))
    index = tmp_path / "model.safetensors.index.json"
    load_weights(layer, index, "qwen3_moe", prefix=PREFIX)
    same(to_tensors(layer, "qwen3_moe", prefix=PREFIX), tensors)
    index.unlink()
    with pytest.raises(ValueError, match=r"must be in one file.*model-0.*model-2"):
        loaded_from(tmp_path)


def test_missing_and_damaged_shards(tmp_path):
    tensors = write_model(tmp_path, "qwen3_moe")
    shard = tmp_path / "model-1.safetensors"
    data = shard.read_bytes()
    shard.write_bytes(data[:-1])
    with pytest.raises(ValueError, match=r"model-1.safetensors is damaged"):
        loaded_from(tmp_path)
    save_file({"other": np.zeros(3)}, shard)
    with pytest.raises(ValueError, match=r"model-1.safetensors must hold model.layers"):
        loaded_from(tmp_path)
    shard.unlink()
    with pytest.raises(ValueError, match=r"model-1.safetensors is missing"):
        loaded_from(tmp_path)
    shard.write_bytes(b'{"an": "index"}')
    with pytest.raises(ValueError, match="must be a safetensors file"):
        loaded_from(tmp_path)
    shard.write_bytes(data)
    same(loaded_from(tmp_path), tensors)
    with pytest.raises(ValueError, match=r"has 'layers.0.mlp.' in it"):
        write_model(tmp_path, "qwen3_moe")
        index = tmp_path / "model.safetensors.index.json"
        index.write_text(index.read_text().replace("layers.0", "layers.1"))
        loaded_from(tmp_path)


def test_loading_a_layer_takes_little_memory(tmp_path):
    """Numpy's arrays take at most half of the layer, besides the layer itself.

    On JAX they become the values of the layer.
    """
    write_model(tmp_path, "qwen3_moe", hidden_size=512, moe_intermediate_size=512)
    tracemalloc.start()
    layer = from_pretrained(tmp_path, 0)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    size = sum(4 * np.prod(weight.shape) for weight in layer.weights)
    assert peak < size * (1.5 if keras.backend.backend() == "jax" else 0.5)


def float8(array):
    return array.astype(ml_dtypes.float8_e4m3fn)


def test_fp8_files(tmp_path):
    """With a scale per block, of 128 x 128 or as the config says."""
    for sizes in ({}, {"quantization_config": {"weight_block_size": [2, 64]}}):
        tensors = write_model(
            tmp_path, "qwen3_moe", False, hidden_size=300, intermediate_size=3, **sizes
        )
        rows, columns = (2, 64) if sizes else (128, 128)
        expected = dict(tensors)
        for name, array in tensors.items():
            if "experts" in name:
                shape = (-(-array.shape[0] // rows), -(-array.shape[1] // columns))
                scale = 1 + np.arange(np.prod(shape)).reshape(shape).astype("float32")
                expected[name] = decode_fp8(float8(array), scale, (rows, columns))
                expected[f"{name}_scale_inv"] = scale
        scales = {n: a for n, a in expected.items() if n.endswith("_scale_inv")}
        stored = {
            n: float8(tensors[n]) if f"{n}_scale_inv" in scales else a
            for n, a in expected.items()
            if n not in scales
        }
        write_safetensors(tmp_path / "model-0.safetensors", stored | scales)
        (tmp_path / "model-1.safetensors").unlink()
        found = loaded_from(tmp_path)
        same(found, {n: a for n, a in expected.items() if n not in scales})
    wrong = {n: a[:, :1] for n, a in scales.items()}
    with pytest.raises(ValueError, match=r"has scales of shape \(2, 1\) instead of"):
        write_safetensors(tmp_path / "model-0.safetensors", stored | wrong)
        loaded_from(tmp_path)


def write_safetensors(path, arrays):
    """Writes a file with float8, which the library cannot take from numpy."""
    names = {"float8_e4m3fn": "F8_E4M3", "float32": "F32", "uint8": "U8"}
    header, data = {}, b""
    for name, array in arrays.items():
        start, data = len(data), data + np.ascontiguousarray(array).tobytes()
        header[name] = {
            "dtype": names[array.dtype.name],
            "shape": list(array.shape),
            "data_offsets": [start, len(data)],
        }
    header = json.dumps(header).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header + data)


def test_scales_beside_other_values():
    """Packed integers with a scale are not read as numbers."""
    layer = of_family("deepseek_v4")
    layer.build((None, 10, H))
    tensors = to_tensors(layer, "deepseek_v4")
    name = "experts.0.w1.weight"
    tensors[name] = tensors[name].astype("int8")
    tensors["experts.0.w1.scale"] = np.ones((1, 1), "float32")
    without_changes(
        lambda layer: load_weights(layer, tensors, "deepseek_v4"),
        "experts.0.w1.weight has a scale, but not float8 values: int8",
        layer=layer,
    )


def test_decoded_tables():
    weight = float8(np.array([[1, 2, 3], [4, 5, 6]], "float32"))
    scale = np.array([[0.5, 2.0]], "float32")
    found = decode_fp8(weight, scale, block_shape=(2, 2))
    np.testing.assert_array_equal(found, [[0.5, 1, 6], [2, 2.5, 12]])
    # The low bits come first; 0x72 is 1 and 6, 0xFA is -1 and -6.
    blocks = np.array([[[0x72, 0xFA] + [0] * 14], [[0x10] * 16]], "uint8")
    found = decode_mxfp4(blocks, np.array([[127], [130]], "uint8"))
    np.testing.assert_array_equal(found[0], [1, 6, -1, -6] + [0] * 28)
    np.testing.assert_array_equal(found[1], [0, 4] * 16)


def test_mxfp4_files(rng):
    """Of GPT-OSS: the rows of the transpose, 32 values for each scale."""
    layer = of_family("gpt_oss", hidden_size=64, intermediate_size=32)
    layer.build((None, 10, 64))
    tensors = to_tensors(layer, "gpt_oss")
    expected = dict(tensors)
    for name in ("experts.gate_up_proj", "experts.down_proj"):
        e, h, f = tensors.pop(name).shape
        blocks = rng.integers(256, size=(e, f, h // 32, 16)).astype("uint8")
        scales = rng.integers(120, 130, size=(e, f, h // 32)).astype("uint8")
        tensors |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
        expected[name] = np.swapaxes(decode_mxfp4(blocks, scales), -1, -2)
    load_weights(layer, tensors, "gpt_oss")
    same(to_tensors(layer, "gpt_oss"), expected)
    tensors["experts.down_proj_blocks"] = tensors["experts.down_proj_blocks"][..., :8]
    without_changes(
        lambda layer: load_weights(layer, tensors, "gpt_oss"),
        "down_proj has blocks of shape",
        layer=layer,
    )


def test_scales_of_deepseek_v4():
    """Their names end otherwise than those of other files."""
    layer = of_family("deepseek_v4")
    layer.build((None, 10, H))
    tensors = to_tensors(layer, "deepseek_v4")
    for name in [n for n in tensors if "experts" in n]:
        tensors[name] = float8(tensors[name])
        tensors[name.replace("weight", "scale")] = np.full((1, 1), 2, "float32")
    load_weights(layer, tensors, "deepseek_v4")
    found = to_tensors(layer, "deepseek_v4")
    for name, array in found.items():
        factor = 2 if "experts" in name else 1
        expected = factor * tensors[name].astype("float32")
        np.testing.assert_array_equal(array, expected)


def test_one_activation_under_two_names():
    layer = presets.gpt_oss(E, F, num_selected_experts=2)
    layer.build((None, 10, H))
    config = {**CONFIG, "model_type": "gpt_oss"}
    tensors = to_tensors(layer, "gpt_oss", config=config)
    load_weights(layer, tensors, "gpt_oss", config=config)
    with pytest.raises(ValueError, match=r"instead of ClampedSwiGLU\(limit=3.0, "):
        to_tensors(layer, "gpt_oss", config={**config, "swiglu_limit": 3.0})


def test_losses_that_a_config_names():
    """A config without one has none, whatever the default of the router."""
    for name in OF_TRANSFORMERS:
        layers = [of_family(name), of_family(name, router_aux_loss_coef=0.1)]
        without, with_loss = (getattr(layer, "moe", layer).router for layer in layers)
        assert without.load_balancing_loss_weight == 0
        weights = (0, 0.1 * with_loss.num_selected_experts)
        assert with_loss.load_balancing_loss_weight in weights


@pytest.mark.parametrize(
    ("name", "message"),
    [("qweight", "GPTQ or AWQ"), ("weight_packed", "compressed-tensors")],
)
def test_other_compressed_formats_are_refused(name, message):
    def load(layer):
        tensors = to_tensors(layer, "mixtral")
        packed = {f"experts.0.w1.{name}": np.zeros((F, H), "int32")}
        load_weights(layer, tensors | packed, "mixtral")

    without_changes(load, f"compressed by {message}.*experts.0.w1.{name}")


@pytest.mark.parametrize(
    ("config", "index", "message"),
    [
        ({"model_type": "gpt2"}, 0, "`model_type` must be one of .*'gpt2'"),
        ({}, 0, "`model_type` must be one of .*None"),
        ({"model_type": "mixtral"}, 0, "must have num_local_experts or"),
        ({**CONFIG, "model_type": "mixtral"}, 1, r"with experts, one of \[0\].*=1"),
        (
            {**CONFIG, "model_type": "deepseek_v3", "first_k_dense_replace": 3}
            | {"num_layers": 5, "layers_block_type": None},
            0,
            r"one of \[3, 4\]",
        ),
        (
            {**CONFIG, "model_type": "deepseek_v4", "num_hash_layers": 1},
            0,
            "by token id",
        ),
        ({**CONFIG, "model_type": "mixtral", "hidden_act": "x"}, 0, "hidden_act='x'"),
        ({**CONFIG, "model_type": "nemotron_h", "mlp_bias": True}, 0, "with a bias"),
        (
            {**CONFIG, "model_type": "nllb-moe", "second_expert_policy": "random"},
            0,
            "second_expert_policy",
        ),
        (
            {**CONFIG, "model_type": "dbrx", "moe_normalize_expert_weights": 2},
            0,
            "another norm",
        ),
    ],
)
def test_configs_that_have_no_layer(config, index, message):
    with pytest.raises(ValueError, match=message):
        layer_from_config(config, index)


def test_configs_of_other_types(tmp_path):
    with pytest.raises(TypeError, match="`config` must be"):
        layer_from_config(3)
    with pytest.raises(TypeError, match="`layer_index` must be an int"):
        layer_from_config({**CONFIG, "model_type": "mixtral"}, 0.5)
    write_model(tmp_path, "qwen3_moe")
    for path in (tmp_path, tmp_path / "config.json", str(tmp_path / "config.json")):
        assert layer_from_config(path).experts.num_experts == E


def test_further_arguments():
    """Those of the user come last."""
    layer = layer_from_config(
        {**CONFIG, "model_type": "qwen2_moe"},
        name="moe",
        eval_capacity_factor=2.0,
        router_kwargs={"num_selected_experts": 1},
        experts_kwargs={"inner_dropout": 0.5},
        dtype="mixed_bfloat16",
    )
    assert layer.name == "moe"
    assert layer.moe.router.num_selected_experts == 1
    assert layer.moe.experts.inner_dropout == 0.5
    assert layer.moe.eval_capacity_factor == 2.0
    assert layer.moe.train_capacity_factor is None
    parts = (layer, layer.moe, layer.moe.experts, layer.backbone)
    assert {part.compute_dtype for part in parts} == {"bfloat16"}
