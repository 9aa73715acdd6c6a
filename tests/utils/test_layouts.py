"""The layouts of experts' weights, by the layers that create them."""

import keras
import numpy as np
import pytest

import keras_moe

on_jax = pytest.mark.skipif(
    keras.backend.backend() != "jax", reason="`keras.distribution` needs JAX"
)
E, H, F = 4, 6, 8


@pytest.fixture
def layout_map():
    """That of a mesh of one device."""
    devices = keras.distribution.list_devices()[:1]
    mesh = keras.distribution.DeviceMesh((1, 1), ["batch", "expert"], devices)
    layout_map = keras_moe.distribution.expert_layout_map(mesh)
    distribution = keras.distribution.ModelParallel(
        layout_map=layout_map, batch_dim_name="batch"
    )
    with distribution.scope():
        yield layout_map


def split_weights(layer, layout_map):
    """Returns the names of the weights that are split, all along the first axis."""
    found = []
    for weight in layer.weights:
        layout = layout_map[weight.path]
        if layout is not None:
            assert layout.axes == ("expert", *[None] * (len(weight.shape) - 1))
            assert weight.shape[0] == E
            found.append(weight.path)
    return found


@on_jax
@pytest.mark.parametrize("change", [None, "lora", "int8", "int4", "lora, then int8"])
def test_all_weights_of_experts_are_split(layout_map, change, rng):
    experts = keras_moe.FeedForwardExperts(E, F, gated=True, name="ffn")
    layer = keras_moe.MoeLayer(experts, keras_moe.MaskedRouter(E), name="moe")
    x = rng.normal(size=(2, 5, H)).astype("float32")
    layer(x)
    if change and "lora" in change:
        layer.enable_lora(2)
    if change and "int" in change:
        layer.quantize(change[-4:])
    expected = [w.path for w in experts.weights]
    assert split_weights(layer, layout_map) == expected
    number = {None: 6, "lora": 12, "int8": 9, "int4": 12, "lora, then int8": 15}
    assert len(expected) == number[change]
    assert np.isfinite(keras.ops.convert_to_numpy(layer(x))).all()


# The weights along whose axis the inner layers are split, if any.
INNER = {
    "intermediate/kernel": 2,
    "intermediate/bias": 2,
    "intermediate/kernel_scale": 2,
    "intermediate/kernel_zero": 2,
    "intermediate/lora_kernel_a": None,
    "intermediate/lora_kernel_b": 2,
    "output/kernel": 1,
    "output/bias": None,
    "output/kernel_scale": None,  # One block.
    "output/kernel_zero": None,
    "output/lora_kernel_a": 1,
    "output/lora_kernel_b": None,
}


@on_jax
@pytest.mark.parametrize("change", [None, "lora", "int8", "int4"])
def test_inner_layers_are_split(change, monkeypatch):
    # A mesh of two devices per axis, for layouts alone.
    mesh = keras.distribution.DeviceMesh(
        (1, 2, 2), ["batch", "expert", "inner"], [0] * 4
    )
    layout_map = keras_moe.distribution.expert_layout_map(mesh, inner_axis="inner")
    monkeypatch.setattr(
        keras.distribution,
        "distribution",
        lambda: keras.distribution.ModelParallel(
            layout_map=layout_map, batch_dim_name="batch", auto_shard_dataset=False
        ),
    )
    layer = keras_moe.FeedForwardExperts(E, F, gated=True, name="ffn")
    layer.build((1, E, 2, H))
    if change == "lora":
        layer.enable_lora(2)
    elif change:
        layer.quantize(change)
    for weight in layer.weights:
        _, *path = weight.path.split("/")
        inner = INNER["/".join(path).replace("gate/", "intermediate/")]
        axes = ["expert", None, None]
        if inner is not None:
            axes[inner] = "inner"
        assert layout_map[weight.path].axes == tuple(axes), weight.path


@on_jax
def test_inner_layers_that_cannot_be_split():
    devices = keras.distribution.list_devices()[:1]
    mesh = keras.distribution.DeviceMesh((1, 1), ["batch", "expert"], devices)
    with pytest.raises(ValueError, match="different axes"):
        keras_moe.distribution.expert_layout_map(mesh, inner_axis="expert")
    with pytest.raises(ValueError, match="inner_axis='inner'"):
        keras_moe.distribution.expert_layout_map(mesh, inner_axis="inner")


@on_jax
def test_entries_of_users_count(layout_map):
    layout_map["moe/intermediate/kernel"] = ("expert", None, "batch")
    experts = keras_moe.FeedForwardExperts(E, F, name="moe")
    experts.build((1, E, 2, H))
    axes = [layout_map[w.path].axes for w in experts.weights]
    assert axes[0] == ("expert", None, "batch")
    assert axes[1:] == [("expert", None, None)] * 3


@on_jax
def test_experts_that_cannot_be_split(layout_map):
    parts = [keras.layers.Dense(H) for _ in range(E)]
    experts = keras_moe.HeterogeneousExperts(parts)
    with pytest.raises(ValueError, match="cannot be split over the mesh axis 'expert'"):
        experts.build((1, E, 2, H))


def test_other_experts_need_no_layout():
    experts = keras_moe.HeterogeneousExperts([keras.layers.Dense(H)] * 2)
    experts.build((1, 2, 2, H))
