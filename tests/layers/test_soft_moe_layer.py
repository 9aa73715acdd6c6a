import keras
import numpy as np
import oracle
import pytest
from keras import ops
from layer_check import check_layer

from keras_moe import FeedForwardExperts, RouterMask, SoftMoeLayer

E, C, H, F = 3, 2, 6, 10


def make_soft(**kwargs):
    experts = FeedForwardExperts(
        E, F, kernel_initializer="he_normal", dtype=kwargs.get("dtype")
    )
    return SoftMoeLayer(experts, slots_per_expert=C, **kwargs)


def soft_moe(x, layer):
    """Computes the paper's equations for one group `[t, h]`, with loops."""
    slots, scale, *experts = (
        {w.path.split("/", 1)[1]: w.numpy().astype("float64") for w in layer.weights}[n]
        for n in (
            "slots",
            "scale",
            "experts/intermediate/kernel",
            "experts/intermediate/bias",
            "experts/output/kernel",
            "experts/output/bias",
        )
    )
    norm = np.linalg.norm
    logits = np.zeros((len(x), E * C))
    for t in range(len(x)):
        for slot in range(E * C):
            s = slots[:, slot // C, slot % C]
            logits[t, slot] = scale * (x[t] @ s) / norm(x[t]) / norm(s)
    dispatch = oracle.softmax(logits.T).T
    combine = oracle.softmax(logits)
    results = [
        oracle.feed_forward(dispatch[:, slot] @ x, experts, slot // C)
        for slot in range(E * C)
    ]
    return combine @ np.array(results)


def test_outputs_match_the_equations_of_the_paper(rng):
    x = rng.normal(size=(4, 5, H)).astype("float32")
    layer = make_soft(name="soft")
    layer.build(x.shape)
    layer.scale.assign(2.0)
    outputs = ops.convert_to_numpy(layer(x))
    for i in range(4):
        np.testing.assert_allclose(outputs[i], soft_moe(x[i], layer), atol=1e-5)


def test_masked_tokens_do_not_affect_others_and_have_outputs_of_0(rng):
    x = rng.normal(size=(3, 5, H)).astype("float32")
    mask = np.array([[1, 1, 1, 0, 0], [1, 0, 1, 0, 1], [0] * 5], bool)
    layer = make_soft(name="soft")
    outputs = ops.convert_to_numpy(layer(x, mask=mask))
    assert not outputs[~mask].any()
    for i in range(2):
        expected = soft_moe(x[i][mask[i]], layer)
        np.testing.assert_allclose(outputs[i][mask[i]], expected, atol=1e-5)


def test_dispatch_and_combine_weights_sum_to_1(rng):
    x = rng.normal(size=(4, 5, H)).astype("float32")
    layer = make_soft(examples_per_group=2)
    _, routing = layer(x, return_routing=True)
    assert isinstance(routing, RouterMask)
    for array, axes in ((routing.dispatch_mask, 1), (routing.combine_array, (2, 3))):
        assert array.shape == (2, 10, E, C)
        np.testing.assert_allclose(ops.convert_to_numpy(array).sum(axes), 1, rtol=1e-5)
    for a, b in zip(routing, layer.route(x), strict=True):
        np.testing.assert_array_equal(ops.convert_to_numpy(a), ops.convert_to_numpy(b))


def test_the_layer_check(tmp_path):
    def make(**kwargs):
        return make_soft(examples_per_group=3, **kwargs)

    check_layer(make, (12, H), tmp_path / "model.keras")


def test_routing_is_float32():
    layer = make_soft(dtype="mixed_bfloat16")
    _, routing = layer(np.ones((2, 5, H)), return_routing=True)
    assert keras.backend.standardize_dtype(routing.combine_array.dtype) == "float32"
    assert layer.slots.dtype == layer.scale.dtype == "float32"


def test_bad_arguments():
    with pytest.raises(ValueError, match="slots_per_expert=0"):
        SoftMoeLayer(FeedForwardExperts(E, F), slots_per_expert=0)
    with pytest.raises(TypeError, match="`experts` must be a Keras layer"):
        SoftMoeLayer(None)
