import math

import keras
import numpy as np
import pytest

from keras_moe.utils import checks


@pytest.mark.parametrize("value", [0, -1, 9])
def test_whole_numbers_out_of_range(value):
    with pytest.raises(
        ValueError, match=rf"`k` must be at least 1 and at most 8.*{value}"
    ):
        checks.whole_number("k", value, maximum=8)


@pytest.mark.parametrize("value", [2**31, 10**12, 10**400])
def test_whole_numbers_beyond_int32(value):
    with pytest.raises(
        ValueError, match="`k` must be at least 1 and at most 2147483647"
    ):
        checks.whole_number("k", value)


@pytest.mark.parametrize("value", [1.0, "1", None, True])
def test_values_that_are_not_whole_numbers(value):
    with pytest.raises(TypeError, match="`k` must be an int"):
        checks.whole_number("k", value)


def test_numpy_numbers_are_accepted():
    assert checks.whole_number("k", np.int64(3)) == 3
    assert type(checks.number("x", np.float32(0.5))) is float


@pytest.mark.parametrize("value", [0, -0.5, math.nan, math.inf, 1e39, 10**400])
def test_numbers_out_of_range(value):
    with pytest.raises(ValueError, match="`x` must be more than 0 and finite"):
        checks.number("x", value, above=True)


@pytest.mark.parametrize("value", [-0.1, 1.0, math.nan])
def test_rates_out_of_range(value):
    with pytest.raises(ValueError, match="`x` must be at least 0 and less than 1"):
        checks.number("x", value, below=1)


@pytest.mark.parametrize("value", ["1", None, True, [1.0]])
def test_values_that_are_not_numbers(value):
    with pytest.raises(TypeError, match="`x` must be a number"):
        checks.number("x", value)


def test_booleans():
    assert checks.boolean("b", False) is False
    with pytest.raises(TypeError, match="`b` must be a bool"):
        checks.boolean("b", 1)


@pytest.mark.parametrize("value", [1, 2, 4.0, 0.5, 1 / 3, 1 / 7, None])
def test_examples_per_group(value):
    assert checks.examples_per_group(value) == value


@pytest.mark.parametrize(
    ("value", "n"), [(2.9999999999999996, 3), (1 / 3.0000001, 1 / 3)]
)
def test_rounding_errors_in_examples_per_group(value, n):
    assert checks.examples_per_group(value) == n


@pytest.mark.parametrize("value", [0, -1, 1.5, 0.4, 1e-320, 1e12, 1e-12, math.nan])
def test_bad_examples_per_group(value):
    with pytest.raises(ValueError, match="`examples_per_group` must be"):
        checks.examples_per_group(value)


@pytest.mark.parametrize("value", ["x", 1, {}, {"class_name": "function"}])
def test_values_unknown_to_keras(value):
    with pytest.raises(ValueError, match="`f` must be a name or config known to Keras"):
        checks.from_keras("f", value, keras.activations.get)
