"""Argument checks. Each returns the value in its final type or raises an error."""

import numbers

# Sizes and indices are int32; loss weights and the like are float32.
LARGEST_INT = 2**31 - 1
LARGEST_FLOAT = 3.4028234663852886e38


def whole_number(name, value, minimum=1, maximum=None):
    """Returns `value` as an int.

    Args:
        name: string, the argument's name.
        value: the value received.
        minimum: int, the smallest value allowed.
        maximum: int, the largest value allowed; that of int32 by default.

    Raises:
        TypeError: if `value` is not an int.
        ValueError: if it is out of range.
    """
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError(f"`{name}` must be an int. Received: {name}={value!r}.")
    largest = LARGEST_INT if maximum is None else maximum
    if not minimum <= value <= largest:
        upper = "" if maximum is None and value < minimum else f" and at most {largest}"
        raise ValueError(
            f"`{name}` must be at least {minimum}{upper}. Received: {name}={value}."
        )
    return int(value)


def number(name, value, minimum=0.0, above=False, below=None):
    """Returns `value` as a float that is finite in float32.

    Args:
        name: string, the argument's name.
        value: the value received.
        minimum: float, the smallest value allowed.
        above: bool, whether `value` must be greater than `minimum`.
        below: float, an exclusive upper bound, or `None`.

    Raises:
        TypeError: if `value` is not a number.
        ValueError: if it is out of range.
    """
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"`{name}` must be a number. Received: {name}={value!r}.")
    fits = value > minimum if above else value >= minimum
    fits = fits and value <= LARGEST_FLOAT
    if not (fits and (below is None or value < below)):
        lower = "more than" if above else "at least"
        upper = "finite in float32" if below is None else f"less than {below:g}"
        raise ValueError(
            f"`{name}` must be {lower} {minimum:g} and {upper}. "
            f"Received: {name}={value!r}."
        )
    return float(value)


def capacity_factor(name, value):
    """Returns a positive float, or `None` for `None`."""
    return None if value is None else number(name, value, above=True)


def boolean(name, value):
    """Returns `value` if it is a bool."""
    if not isinstance(value, bool):
        raise TypeError(f"`{name}` must be a bool. Received: {name}={value!r}.")
    return value


def one_of(name, value, choices):
    """Returns `value` if it is one of the strings in `choices`."""
    if not isinstance(value, str):
        raise TypeError(f"`{name}` must be a string. Received: {name}={value!r}.")
    if value not in choices:
        raise ValueError(
            f"`{name}` must be one of {choices}. Received: {name}={value!r}."
        )
    return value


def keyword_arguments(name, value):
    """Returns a dict; an empty one for `None`."""
    if value is not None and not isinstance(value, dict):
        raise TypeError(f"`{name}` must be a dict. Received: {name}={value!r}.")
    return value or {}


def examples_per_group(value):
    """Returns n or 1/n as a float, for a whole number n, or `None` for `None`."""
    if value is None:
        return None
    value = number("examples_per_group", value, above=True)
    ratio = value if value >= 1 else 1 / value
    if ratio > LARGEST_INT or abs(ratio - round(ratio)) > 1e-6 * ratio:
        raise ValueError(
            "`examples_per_group` must be n or 1/n for a whole number n "
            f"(at most {LARGEST_INT}), or None. "
            f"Received: examples_per_group={value!r}."
        )
    # Rounding errors, as in 2.9999999999999996, do not change the group.
    n = float(round(ratio))
    return n if value >= 1 else 1 / n


def from_keras(name, value, get):
    """Returns what a `get` function of Keras makes of a name, config or callable.

    Args:
        name: string, the argument's name.
        value: the value received.
        get: function, such as `keras.activations.get`.

    Raises:
        ValueError: if `get` raises.
    """
    try:
        return get(value)
    # Keras raises many types of errors for an invalid config.
    except Exception as error:
        raise ValueError(
            f"`{name}` must be a name or config known to Keras, or a callable. "
            f"Received: {name}={value!r}. {error}"
        ) from error


def experts_shape(input_shape, num_experts):
    """Raises a ValueError if a shape is not `[g, e, c, h]` with that number `e`."""
    if len(input_shape) != 4 or input_shape[1] != num_experts:
        raise ValueError(
            "The inputs of experts must be [groups, experts, capacity, hidden] with "
            f"{num_experts} experts. Received: input_shape={input_shape}."
        )


def no_foreign_arguments(layer, kwargs, hints):
    """Raises a TypeError if keyword arguments are known to be meant otherwise.

    Args:
        layer: the layer that received `kwargs`.
        kwargs: dict.
        hints: dict of the names of such arguments to what to use instead.
    """
    for name in kwargs:
        if name in hints:
            raise TypeError(
                f"`{name}` is not an argument of {type(layer).__name__}: use "
                f"{hints[name]}. Received: {name}={kwargs[name]!r}."
            )
