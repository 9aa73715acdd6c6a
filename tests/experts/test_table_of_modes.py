"""The table of modes in the documentation says what is so."""

import pathlib

import keras
import numpy as np
import pytest
import versions
from keras import ops

import keras_moe

PAGE = pathlib.Path(__file__).parents[2] / "docs" / "fine-tuning.md"
E, F, H, T = 4, 8, 6, 12
if versions.KERAS < versions.WITH_QUANTIZATION:
    pytest.skip(versions.SKIPPED, allow_module_level=True)

quantizers = keras.quantizers
# The arguments of `quantize` that the rows name.
ARGUMENTS = {
    '`"int8"`': {"mode": "int8"},
    "`Int8QuantizationConfig(activation_quantizer=None)`": {
        "config": quantizers.Int8QuantizationConfig(activation_quantizer=None)
    },
    '`"int4"`': {"mode": "int4"},
    "`Int4QuantizationConfig(block_size=None)`": {
        "config": quantizers.Int4QuantizationConfig(block_size=None)
    },
    '`"float8"`': {"mode": "float8"},
    '`"gptq"`': {
        "config": quantizers.GPTQConfig(dataset=["text"], tokenizer=str.split)
    },
    '`"awq"`': {"config": quantizers.AWQConfig(dataset=["text"], tokenizer=str.split)},
    "a `weight_quantizer` with another axis than 0": {
        "config": quantizers.Int8QuantizationConfig(
            weight_quantizer=quantizers.AbsMaxQuantizer(axis=1)
        )
    },
}
COLUMNS = ("with a capacity", "dropless", "with adapters")


def table():
    """Returns the rows of the table as dicts, by their names."""
    lines = PAGE.read_text(encoding="utf-8").splitlines()
    header = next(i for i, x in enumerate(lines) if "with a capacity | dropless" in x)
    rows = {}
    for line in lines[header + 2 :]:
        if not line.startswith("|"):
            break
        name, *cells = (cell.strip() for cell in line.strip("|").split("|"))
        rows[name] = dict(zip(COLUMNS, cells, strict=True))
    return rows


def make_layer(factor):
    layer = keras_moe.MoeLayer(
        keras_moe.FeedForwardExperts(E, F, kernel_initializer="he_normal"),
        keras_moe.MaskedRouter(E),
        train_capacity_factor=factor,
        eval_capacity_factor=factor,
    )
    layer.build((None, T, H))
    return layer


def with_float_kernels(layer):
    """Returns a layer with the values of the quantized kernels, as floats."""
    config = layer.get_config()
    del config["experts"]["config"]["quantization"]
    copy = type(layer).from_config(config)
    copy.build((None, T, H))
    for ours, source in zip(
        copy.experts.dense_layers, layer.experts.dense_layers, strict=True
    ):
        ours.kernel.assign(np.stack([source.kernel_of_expert(i) for i in range(E)]))
        ours.bias.assign(source.bias)
    copy.router.set_weights(layer.router.get_weights())
    return copy


def test_every_row_is_tested():
    assert table().keys() == ARGUMENTS.keys()


@pytest.mark.parametrize("column", COLUMNS)
@pytest.mark.parametrize("row", ARGUMENTS)
def test_table(row, column, rng):
    says = table()[row][column]
    layer = make_layer(None if column == "dropless" else float(E))
    x = rng.normal(size=(3, T, H)).astype("float32")
    if column == "with adapters":
        layer.enable_lora(2)
    before = ops.convert_to_numpy(layer(x))
    names = [weight.path for weight in layer.weights]
    if says == "refused":
        with pytest.raises(ValueError, match=r"[Qq]uantized"):
            layer.quantize(**ARGUMENTS[row])
        assert [weight.path for weight in layer.weights] == names
        np.testing.assert_array_equal(ops.convert_to_numpy(layer(x)), before)
        return
    layer.quantize(**ARGUMENTS[row])
    found = ops.convert_to_numpy(layer(x))
    error = np.abs(found - before).mean() / np.abs(before).mean()
    assert 0 < error < 0.2
    if says.startswith("weights"):
        exact = ops.convert_to_numpy(with_float_kernels(layer)(x))
        inputs_are_exact = np.allclose(found, exact, atol=1e-5)
        assert inputs_are_exact == (says == "weights only")
    else:
        assert says in ("works", "as in Keras")
