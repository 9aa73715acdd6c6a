"""Checks of arguments: errors that say what was expected and what came."""

import numbers

# Sizes and indices are int32, weights of losses and the like float32.
LARGEST_INT = 2**31 - 1
LARGEST_FLOAT = 3.4028234663852886e38


def whole_number(name, value, minimum=1, maximum=None):
    """Returns `value` as an int, or raises."""
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
    """Returns `value` as a float that is finite in float32, or raises.

    Args:
        name: the argument's name.
        value: what was received.
        minimum: the least it may be.
        above: whether it must be more than `minimum`.
        below: what it must be less than, or `None`.
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
    """Returns a float above 0 or `None`, or raises."""
    return None if value is None else number(name, value, above=True)


def boolean(name, value):
    """Returns `value` if it is a bool, or raises."""
    if not isinstance(value, bool):
        raise TypeError(f"`{name}` must be a bool. Received: {name}={value!r}.")
    return value


def one_of(name, value, choices):
    """Returns `value` if it is one of `choices`, or raises."""
    if not isinstance(value, str):
        raise TypeError(f"`{name}` must be a string. Received: {name}={value!r}.")
    if value not in choices:
        raise ValueError(
            f"`{name}` must be one of {choices}. Received: {name}={value!r}."
        )
    return value


def examples_per_group(value):
    """Returns a whole number, one over a whole number, or `None`, or raises."""
    if value is None:
        return None
    value = number("examples_per_group", value, above=True)
    whole = value if value >= 1 else 1 / value
    if whole > LARGEST_INT or abs(whole - round(whole)) > 1e-6 * whole:
        raise ValueError(
            "`examples_per_group` must be a whole number, one over a whole number "
            f"(of at most {LARGEST_INT}), or None. "
            f"Received: examples_per_group={value!r}."
        )
    return value


def known(name, value, get):
    """Returns what Keras's `get` makes of `value`, a name or a config, or raises."""
    try:
        return get(value)
    # Whatever Keras runs into on what is no config.
    except Exception as error:
        raise ValueError(
            f"`{name}` must be something that Keras knows, or a function. "
            f"Received: {name}={value!r}. {error}"
        ) from error
