"""Grouping: tokens into groups and back, and the capacity of an expert for a group.

Tokens are routed per group. Inputs `[batch, ..., h]` become rows of tokens, each padded
with masked tokens to a multiple of the group size. All examples form one row if a group
holds one or more of them; each example is a row if it is split into groups.
"""

import math

from keras_moe.kernels import as_size, clip_size, ops


def group(inputs, mask, examples_per_group):
    """Splits tokens into groups.

    Args:
        inputs: `[batch, ..., h]`.
        mask: `[batch, ...]`, false for a masked token, or `None`.
        examples_per_group: n or 1/n for a whole number n; `None` for one group of all
            tokens.

    Returns:
        A pair: tokens `[g, t, h]`, zero where masked, and the mask, bool `[g, t]`, or
        `None` if no token is masked.
    """
    shape = [as_size(n) for n in ops.shape(inputs)]
    rows, length, t = _rows(shape, examples_per_group)
    tokens = ops.reshape(inputs, (rows, length, shape[-1]))
    if mask is not None:
        mask = ops.reshape(ops.cast(mask, "bool"), (rows, length))
        # The values of a masked token, NaN included, have no effect.
        tokens = ops.where(ops.expand_dims(mask, -1), tokens, 0)
    if _fills_groups(length, t):
        groups = rows * (length // t)
    else:
        parts = -(-length // t)
        padding = (0, parts * t - length)
        if mask is None:
            mask = ops.ones((rows, length), dtype="bool")
        mask = ops.pad(mask, ((0, 0), padding), constant_values=False)
        tokens = ops.pad(tokens, ((0, 0), padding, (0, 0)))
        groups = rows * parts
    tokens = ops.reshape(tokens, (groups, t, shape[-1]))
    return tokens, None if mask is None else ops.reshape(mask, (groups, t))


def ungroup(tokens, inputs, examples_per_group):
    """Restores the shape of the inputs: the inverse of `group`.

    Args:
        tokens: `[g, t, h]`.
        inputs: `[batch, ..., h]`, the inputs of `group`.
        examples_per_group: as for `group`.

    Returns:
        `[batch, ..., h]`.
    """
    shape = [as_size(n) for n in ops.shape(inputs)]
    rows, length, t = _rows(shape, examples_per_group)
    if not _fills_groups(length, t):
        padded = -(-length // t) * t
        tokens = ops.reshape(tokens, (rows, padded, shape[-1]))[:, :length]
    return ops.reshape(tokens, shape)


def tokens_per_group(input_shape, examples_per_group):
    """Returns the group size for a shape `(batch, ..., h)`, `None` if it is unknown."""
    batch, *inner, _ = input_shape
    if None in inner or (examples_per_group is None and batch is None):
        return None
    # The size of a group depends on the batch only if it holds all examples.
    return _rows((batch or 0, *inner, None), examples_per_group)[2]


def expert_capacity(t, num_experts, capacity_factor, min_expert_capacity):
    """Returns the number of slots of each expert for a group.

    `round(capacity_factor * t / num_experts)`, where an exact half is rounded to the
    even number, then limited to the range from `min_expert_capacity` to `t`.

    Args:
        t: tokens per group, an int or a scalar tensor.
        num_experts: int.
        capacity_factor: float.
        min_expert_capacity: int.

    Returns:
        An int, or a scalar int32 tensor if `t` is a tensor.
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
    """`expert_capacity` for a symbolic dimension of JAX.

    Symbolic dimensions support whole-number arithmetic only.
    """
    numerator, denominator = capacity_factor.as_integer_ratio()
    twice = 2 * num_experts * denominator
    share = 2 * numerator * t + num_experts * denominator  # over twice: + 1/2
    rounded = share // twice
    is_half = 1 - (share % twice + twice - 1) // twice
    capacity = rounded - is_half * (rounded % 2)
    return clip_size(capacity, min_expert_capacity, t)


def _rows(shape, examples_per_group):
    """Returns the number of rows of tokens, their length, and the group size."""
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
    """Returns whether rows of `length` tokens are known to be whole groups of `t`."""
    if t is length:
        return True
    return isinstance(t, int) and isinstance(length, int) and length % t == 0


def _at_least_one(size):
    return ops.maximum(size, 1) if ops.is_tensor(size) else max(size, 1)
