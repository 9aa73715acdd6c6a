import keras
import numpy as np
import pytest

from keras_moe import FeedForwardExperts, HierarchicalMoeLayer, Top2MaskedRouter
from keras_moe.utils import initializers


def test_the_default_initializer():
    initializer = initializers.get("kernel_initializer", None)
    assert isinstance(initializer, keras.initializers.TruncatedNormal)
    assert initializer.stddev == 0.02
    assert isinstance(initializers.get("b", "zeros"), keras.initializers.Zeros)


def test_clones_draw_different_values():
    initializer = initializers.get("kernel_initializer", None)
    a = keras.ops.convert_to_numpy(initializers.clone(initializer)((3, 3)))
    b = keras.ops.convert_to_numpy(initializers.clone(initializer)((3, 3)))
    assert (a != b).all()


def test_a_function_is_not_cloned():
    def ones(shape, dtype=None):
        return np.ones(shape)

    assert initializers.clone(ones) is ones


# All initializers of Keras that suit the kernel of a dense layer.
KERAS = [
    *("glorot_uniform", "glorot_normal", "he_uniform", "he_normal"),
    *("lecun_uniform", "lecun_normal", "random_uniform", "random_normal"),
    *("truncated_normal", "orthogonal", "variance_scaling"),
    keras.initializers.VarianceScaling(2.0, "fan_out", "uniform"),
    keras.initializers.VarianceScaling(2.0, "fan_avg", "untruncated_normal"),
    keras.initializers.GlorotUniform(seed=3),
    keras.initializers.Orthogonal(gain=2.0, seed=3),
]


@pytest.mark.parametrize("experts", [8, 64])
@pytest.mark.parametrize("initializer", KERAS)
def test_each_expert_is_initialized_like_a_dense_layer(initializer, experts):
    h, f = 64, 96
    dense = keras.layers.Dense(f, kernel_initializer=initializer)
    dense.build((None, h))
    expected = keras.ops.convert_to_numpy(dense.kernel).std()
    layer = FeedForwardExperts(experts, f, kernel_initializer=initializer, gated=True)
    layer.build((1, experts, None, h))
    for dense in (layer.intermediate_layer, layer.gate_layer):
        kernel = keras.ops.convert_to_numpy(dense.kernel)
        np.testing.assert_allclose(kernel.std(axis=(1, 2)), expected, rtol=0.07)
        # All experts differ.
        assert len(np.unique(kernel[:, 0, 0])) == experts


def test_an_orthogonal_expert_is_orthogonal():
    kernels = initializers.Stacked(keras.initializers.Orthogonal())((3, 6, 4))
    for kernel in keras.ops.convert_to_numpy(kernels):
        np.testing.assert_allclose(kernel.T @ kernel, np.eye(4), atol=1e-5)


def test_identity():
    kernels = initializers.Stacked(keras.initializers.get("identity"))((3, 4, 4))
    np.testing.assert_array_equal(kernels, np.broadcast_to(np.eye(4), (3, 4, 4)))


def test_a_function_receives_the_shape_of_one_expert():
    def sizes(shape, dtype=None):
        return keras.ops.full(shape, 100 * len(shape) + shape[-1], dtype=dtype)

    stacked = initializers.Stacked(sizes)((2, 3, 4), dtype="float32")
    np.testing.assert_array_equal(stacked, np.full((2, 3, 4), 204))
    bias = initializers.Stacked(sizes, bias=True)((2, 1, 4), dtype="float32")
    np.testing.assert_array_equal(bias, np.full((2, 1, 4), 104))


def test_a_seed_makes_experts_reproducible():
    for make in (keras.initializers.HeNormal, keras.initializers.Orthogonal):
        a, b = (initializers.Stacked(make(seed=7))((3, 4, 4)) for _ in range(2))
        np.testing.assert_array_equal(a, b)
    generator = keras.random.SeedGenerator(7)
    initializer = initializers.Stacked(keras.initializers.Orthogonal(seed=generator))
    a, b = initializer((3, 4, 4)), initializer((3, 4, 4))
    assert (keras.ops.convert_to_numpy(a) != keras.ops.convert_to_numpy(b)).all()


def test_the_inner_gates_have_the_scale_of_a_single_gate():
    layer = HierarchicalMoeLayer(
        FeedForwardExperts(32, 4),
        Top2MaskedRouter(8, name="outer"),
        Top2MaskedRouter(4, name="inner", kernel_initializer="glorot_uniform"),
    )
    layer.build((None, 16, 512))
    kernel = keras.ops.convert_to_numpy(layer.inner_router.router_weights.kernel)
    expected = np.sqrt(2 / (512 + 4))
    np.testing.assert_allclose(kernel.std(axis=(1, 2)), expected, rtol=0.07)
