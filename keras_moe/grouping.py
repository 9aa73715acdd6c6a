"""Tokens into groups and back, and how many slots a group gives an expert.

Tokens are routed per group. Any input `[batch, ..., h]` is seen as rows of
tokens, each row filled up with masked tokens to whole groups: one row holds
all examples where a group takes one or more of them, each example is a row of
its own where it is cut into several groups.
"""

import math

from keras import ops

from keras_moe.kernels import as_size, clip_size


def group(inputs, mask, examples_per_group):
    """Cuts tokens into groups.

    Args:
        inputs: `[batch, ..., h]`.
        mask: `[batch, ...]`, false for a token to leave out, or `None`.
        examples_per_group: how many examples make a group: a whole number, or
            one over a whole number; `None` for one group of all tokens.

    Returns:
        `(tokens, mask)`: `[g, t, h]`, zero where masked, and bool `[g, t]`, or
        `None` where every token is valid.
    """
    shape = [as_size(n) for n in ops.shape(inputs)]
    rows, length, t = _rows(shape, examples_per_group)
    tokens = ops.reshape(inputs, (rows, length, shape[-1]))
    if mask is not None:
        mask = ops.reshape(ops.cast(mask, "bool"), (rows, length))
        # Whatever a masked token holds, a NaN too, goes no further.
        tokens = ops.where(ops.expand_dims(mask, -1), tokens, 0)
    if _fills_groups(length, t):
        groups = rows * (length // t)
    else:
        parts = -(-length // t)
        filling = (0, parts * t - length)
        if mask is None:
            mask = ops.ones((rows, length), dtype="bool")
        mask = ops.pad(mask, ((0, 0), filling), constant_values=False)
        tokens = ops.pad(tokens, ((0, 0), filling, (0, 0)))
        groups = rows * parts
    tokens = ops.reshape(tokens, (groups, t, shape[-1]))
    return tokens, None if mask is None else ops.reshape(mask, (groups, t))


def ungroup(tokens, inputs, examples_per_group):
    """Puts tokens back where they were: the inverse of `group`.

    Args:
        tokens: `[g, t, h]`.
        inputs: `[batch, ..., h]`, what `group` was given.
        examples_per_group: as for `group`.

    Returns:
        `[batch, ..., h]`.
    """
    shape = [as_size(n) for n in ops.shape(inputs)]
    rows, length, t = _rows(shape, examples_per_group)
    if not _fills_groups(length, t):
        filled = -(-length // t) * t
        tokens = ops.reshape(tokens, (rows, filled, shape[-1]))[:, :length]
    return ops.reshape(tokens, shape)


def expert_capacity(t, num_experts, capacity_factor, min_expert_capacity):
    """The number of slots each expert has for a group.

    `round(capacity_factor * t / num_experts)`, an exact half rounded to the
    even number, then at least `min_expert_capacity` and at most `t`.

    Args:
        t: tokens per group, an int or a scalar tensor.
        num_experts: an int.
        capacity_factor: a float.
        min_expert_capacity: an int.

    Returns:
        An int, or a scalar int32 tensor where `t` is one.
    """
    if isinstance(t, int):
        share = min(capacity_factor * t / num_experts, t)
        return min(max(round(share), min_expert_capacity), t)
    if not ops.is_tensor(t):
        return _symbolic_capacity(t, num_experts, capacity_factor, min_expert_capacity)
    # Compilers turn a division by a constant into a multiplication, which
    # misses exact halves; this divisor equals num_experts and is no constant.
    divisor = ops.maximum(ops.minimum(t, num_experts), num_experts)
    t64, divisor = ops.cast(t, "float64"), ops.cast(divisor, "float64")
    share = ops.minimum(capacity_factor * t64 / divisor, t64)
    capacity = ops.cast(ops.round(share), "int32")
    return ops.minimum(ops.maximum(capacity, min_expert_capacity), t)


def _symbolic_capacity(t, num_experts, capacity_factor, min_expert_capacity):
    """The same for a dimension of which JAX knows the name alone.

    Such a dimension takes part in whole-number arithmetic only.
    """
    numerator, denominator = capacity_factor.as_integer_ratio()
    twice = 2 * num_experts * denominator
    share = 2 * numerator * t + num_experts * denominator  # over twice: + 1/2
    rounded = share // twice
    is_half = 1 - (share % twice + twice - 1) // twice
    capacity = rounded - is_half * (rounded % 2)
    return clip_size(capacity, min_expert_capacity, t)


def _rows(shape, examples_per_group):
    """Rows of tokens, tokens in a row, and tokens in a group."""
    batch, *inner, _ = shape
    length = math.prod(inner)
    if examples_per_group is None:
        return 1, batch * length, _at_least_one(batch * length)
    if examples_per_group == 1 and (not isinstance(length, int) or length):
        return batch, length, length
    if examples_per_group > 1:
        return 1, batch * length, _at_least_one(int(examples_per_group) * length)
    parts = round(1 / examples_per_group)
    return batch, length, _at_least_one(-(-length // parts))


def _fills_groups(length, t):
    """Whether rows of `length` tokens are known to fill groups of `t`."""
    if t is length:
        return True
    return isinstance(t, int) and isinstance(length, int) and length % t == 0


def _at_least_one(size):
    return ops.maximum(size, 1) if ops.is_tensor(size) else max(size, 1)
