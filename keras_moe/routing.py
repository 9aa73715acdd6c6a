"""The values that a router returns: where each token goes, and with what weight."""

from typing import Any, NamedTuple

from keras import ops

from keras_moe.kernels import scatter_add_rows
from keras_moe.selection import valid_tokens


class Slots(NamedTuple):
    """A routing with a capacity: which token sits in each slot of each expert.

    Attributes:
        token_index: int32 `[g, e, c]`, the token (of its group) that sits in
            the slot, -1 for an empty slot.
        weight: float32 `[g, e, c]`, the weight with which the slot's output
            goes home to its token; 0 for an empty slot.
        probs: float32 `[g, t, e]`, the router's probabilities: 1 in sum for a
            valid token, 0 for a masked one.
        load: float32 `[g, e]`, the share of the group's wanted assignments
            that each expert has: 1 in sum. Where tokens choose, it is before
            any capacity.
    """

    token_index: Any
    weight: Any
    probs: Any
    load: Any

    @property
    def dispatch_mask(self):
        """float32 `[g, t, e, c]`: 1 where the token sits in the slot."""
        tokens = ops.shape(self.probs)[1]
        # One-hot of -1 is a row of zeros.
        mask = ops.one_hot(self.token_index, tokens, dtype="float32")  # g e c t
        return ops.transpose(mask, (0, 3, 1, 2))

    @property
    def combine_array(self):
        """float32 `[g, t, e, c]`: `dispatch_mask` times the slot's weight."""
        return self.dispatch_mask * ops.expand_dims(self.weight, 1)

    @property
    def assignments(self):
        """float32 `[g, e, c]`: 1 for a filled slot, 0 for an empty one."""
        return ops.cast(self.token_index >= 0, "float32")

    @property
    def expert_usage(self):
        """float32 scalar: the share of slots that are filled."""
        return _mean(self.assignments)

    @property
    def slots_per_token(self):
        """float32 `[g, t]`: in how many slots each token sits."""
        groups, experts, capacity = ops.shape(self.token_index)
        index = ops.reshape(self.token_index, (groups, experts * capacity))
        ones = ops.ones_like(index, dtype="float32")
        return scatter_add_rows(ones, index, ops.shape(self.probs)[1])


class Rows(NamedTuple):
    """A routing without a capacity: all assignments, sorted by expert.

    Every choice of a token is a row, so that nothing is dropped and nothing
    filled up: `a = g · t · k` rows, those of masked tokens last.

    All is one part, unless the batch is spread over devices by
    `keras.distribution`. Then each device has its own rows: there are as many
    parts `p` as the batch has, in each the rows of every share of the experts
    one after the other, and `group_sizes` of every part and share.

    Attributes:
        token_index: int32 `[p, a]`, the row's token, counted through all groups
            of the part; -1 for a masked token or a choice of no expert.
        weight: float32 `[p, a]`, the weight with which the row's output goes home
            to its token; 0 where `token_index` is -1.
        group_sizes: int32 `[e]`, how many rows each expert has.
        probs: as of `Slots`.
        load: as of `Slots`.
    """

    token_index: Any
    weight: Any
    group_sizes: Any
    probs: Any
    load: Any

    @property
    def assignments(self):
        """float32 `[p, a]`: 1 for a row with a token, 0 for one without."""
        return ops.cast(self.token_index >= 0, "float32")

    @property
    def expert_usage(self):
        """float32 scalar: the share of experts with at least one token."""
        sizes = ops.reshape(self.group_sizes, (-1, self.probs.shape[-1]))
        return _mean(ops.cast(ops.any(sizes > 0, axis=0), "float32"))

    @property
    def slots_per_token(self):
        """float32 `[g, t]`: to how many experts each token goes."""
        groups, tokens = ops.shape(self.probs)[:2]
        ones = ops.ones_like(self.token_index, dtype="float32")
        in_part = groups * tokens // ops.shape(ones)[0]
        counts = scatter_add_rows(ones, self.token_index, in_part)
        return ops.reshape(counts, (groups, tokens))


class RouterMask(NamedTuple):
    """A routing as two dense arrays, as Model Garden's routers return it.

    It costs `g · t · e · c` numbers and matrix products of as many rows, so it
    is for routers carried over from Model Garden, for routings whose slots
    mix tokens, and for tests. As 0 times NaN is NaN, a token that is NaN spoils
    its whole group, which `Slots` prevent.

    Attributes:
        dispatch_mask: float `[g, t, e, c]`: 1 where the token sits in the slot.
        combine_array: float `[g, t, e, c]`: the weight with which the slot's
            output goes home to the token.
    """

    dispatch_mask: Any
    combine_array: Any

    @property
    def weight(self):
        """float32 `[g, e, c]`: the combine weights, summed over the tokens."""
        return ops.sum(ops.cast(self.combine_array, "float32"), axis=1)

    @property
    def assignments(self):
        """float32 `[g, e, c]`: how much of each slot is filled."""
        return ops.sum(ops.cast(self.dispatch_mask, "float32"), axis=1)

    @property
    def expert_usage(self):
        """float32 scalar: the share of slots that are filled."""
        return _mean(self.assignments)

    @property
    def slots_per_token(self):
        """float32 `[g, t]`: in how many slots each token sits."""
        return ops.sum(ops.cast(self.dispatch_mask, "float32"), axis=(2, 3))


def row_arguments(routing):
    """What experts are told besides their inputs, as keyword arguments."""
    if isinstance(routing, Rows):
        return {"group_sizes": routing.group_sizes}
    return {}


def expert_load(routing):
    """What each expert is wanted for, in tokens.

    Args:
        routing: `Slots`, `Rows` or `RouterMask`.

    Returns:
        float32 `[e]`: each group's `load` times its valid tokens, added up; of
        a `RouterMask`, which has none, what fills the experts' slots.
    """
    if isinstance(routing, RouterMask):
        return ops.sum(routing.assignments, axis=(0, 2))
    # A token that is NaN is valid too.
    valid = ops.cast(valid_tokens(routing.probs), "float32")
    tokens = ops.sum(valid, axis=1, keepdims=True)
    return ops.sum(routing.load * tokens, axis=0)


def _mean(x):
    """The mean, 0 of nothing."""
    return ops.sum(x) / ops.maximum(ops.sum(ops.ones_like(x)), 1.0)


def check_routing(routing):
    """Raises a TypeError for what is no routing."""
    if not isinstance(routing, (Slots, Rows, RouterMask)):
        raise TypeError(
            "A router must return `Slots`, `Rows` or a `RouterMask`. "
            f"Received: {type(routing).__name__}."
        )


def check_has_probs(routing):
    """Raises a TypeError for a routing without probabilities."""
    if not isinstance(routing, (Slots, Rows)):
        raise TypeError(
            "The balance loss needs the probabilities that `Slots` and `Rows` hold. "
            f"Received: {type(routing).__name__}."
        )
