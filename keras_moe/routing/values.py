"""The values that a router returns: `Slots`, `Rows` and `RouterMask`."""

import math
from typing import Any, NamedTuple

from keras_moe.kernels import ops, scatter_add_rows


class Slots(NamedTuple):
    """A routing with a capacity: the token in each slot of each expert.

    Attributes:
        token_index: int32 `[g, e, c]`, the token of the group in the slot; -1 for an
            empty slot.
        weight: float32 `[g, e, c]`, the combine weight of the slot's output; 0 for an
            empty slot.
        probs: float32 `[g, t, e]`, the router probabilities: 1 in sum for a valid
            token, 0 for a masked one.
        load: float32 `[g, e]`, the fraction of the group's assignments that each
            expert received, 1 in sum. Where tokens choose, assignments count before
            any is dropped.
        expert_index: int32 `[g, t, k]`, the experts that each token selected, before
            any is dropped; -1 for none. `[g, t, 0]` where experts choose, and for two
            levels of routing. Defaults to `None`, unknown, which a layer returns as
            `[g, t, 0]`.

    Example:

    ```python
    slots = keras_moe.routing.Slots(
        token_index=[[[0, 2], [1, -1]]],  # expert 0 has tokens 0 and 2
        weight=[[[0.9, 0.7], [0.8, 0.0]]],
        probs=[[[0.9, 0.1], [0.2, 0.8], [0.7, 0.3]]],
        load=[[2 / 3, 1 / 3]],
    )
    ```
    """

    token_index: Any
    weight: Any
    probs: Any
    load: Any
    expert_index: Any = None

    @property
    def dispatch_mask(self):
        """float32 `[g, t, e, c]`: 1 where the token is in the slot."""
        tokens = ops.shape(self.probs)[1]
        # The one-hot vector of -1 is zero.
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
        """float32 scalar: the fraction of slots that are filled."""
        return _mean(self.assignments)

    @property
    def slots_per_token(self):
        """float32 `[g, t]`: the number of slots that hold each token."""
        groups, experts, capacity = ops.shape(self.token_index)
        index = ops.reshape(self.token_index, (groups, experts * capacity))
        ones = ops.ones_like(index, dtype="float32")
        return scatter_add_rows(ones, index, ops.shape(self.probs)[1])


class Rows(NamedTuple):
    """A routing without a capacity (dropless): all assignments, sorted by expert.

    Each expert selected for a token is one row, so there are `a = g · t · k` rows.
    The rows of masked tokens come last.

    Where `keras.distribution` splits the batch over devices, each device sorts its own
    rows. Then there are `p` parts, one for each split of the batch. A part holds the
    rows of each split of the experts, one after the other, and `group_sizes` those of
    each part and split, one after the other.

    Attributes:
        token_index: int32 `[p, a]`, the row's token, counted over all groups of the
            part; -1 for a masked token or where no expert was selected. `p` is 1
            unless the batch is split over devices.
        weight: float32 `[p, a]`, the combine weight of the row's output; 0 where
            `token_index` is -1.
        group_sizes: int32 `[e]`, the number of rows of each expert.
        probs: as in `Slots`.
        load: as in `Slots`.
        expert_index: as in `Slots`.

    Example:

    ```python
    rows = keras_moe.routing.Rows(
        token_index=[[0, 2, 1]],  # expert 0 has tokens 0 and 2, expert 1 token 1
        weight=[[0.9, 0.7, 0.8]],
        group_sizes=[2, 1],
        probs=[[[0.9, 0.1], [0.2, 0.8], [0.7, 0.3]]],
        load=[[2 / 3, 1 / 3]],
    )
    ```
    """

    token_index: Any
    weight: Any
    group_sizes: Any
    probs: Any
    load: Any
    expert_index: Any = None

    @property
    def assignments(self):
        """float32 `[p, a]`: 1 for a row with a token, 0 for one without."""
        return ops.cast(self.token_index >= 0, "float32")

    @property
    def expert_usage(self):
        """float32 scalar: the fraction of experts with at least one token."""
        sizes = ops.reshape(self.group_sizes, (-1, self.probs.shape[-1]))
        return _mean(ops.cast(ops.any(sizes > 0, axis=0), "float32"))

    @property
    def slots_per_token(self):
        """float32 `[g, t]`: the number of rows that hold each token."""
        if self.expert_index is not None and self.expert_index.shape[-1]:
            return ops.sum(ops.cast(self.expert_index >= 0, "float32"), axis=-1)
        groups, tokens = ops.shape(self.probs)[:2]
        ones = ops.ones_like(self.token_index, dtype="float32")
        in_part = groups * tokens // ops.shape(ones)[0]
        counts = scatter_add_rows(ones, self.token_index, in_part)
        return ops.reshape(counts, (groups, tokens))


class RouterMask(NamedTuple):
    """A routing as two dense arrays, as in TensorFlow Model Garden.

    It holds `g · t · e · c` numbers and is applied by matrix products. Use it for
    routers migrated from Model Garden, for slots that mix several tokens, and in tests.
    Since 0 · NaN is NaN, a token that is NaN affects its whole group; with `Slots` it
    affects no other token.

    Attributes:
        dispatch_mask: float `[g, t, e, c]`, 1 where the token is in the slot.
        combine_array: float `[g, t, e, c]`, the token's combine weight for the slot's
            output.

    Example:

    ```python
    probs = keras.ops.softmax(keras.random.normal((1, 4, 2)))
    slots = keras_moe.routing.assign_slots(
        keras_moe.routing.top_k(probs, 1), probs, expert_capacity=2
    )
    mask = keras_moe.RouterMask(slots.dispatch_mask, slots.combine_array)
    ```
    """

    dispatch_mask: Any
    combine_array: Any

    @property
    def weight(self):
        """float32 `[g, e, c]`: the combine weights, summed over the tokens."""
        return ops.sum(ops.cast(self.combine_array, "float32"), axis=1)

    @property
    def assignments(self):
        """float32 `[g, e, c]`: the filled fraction of each slot."""
        return ops.sum(ops.cast(self.dispatch_mask, "float32"), axis=1)

    @property
    def expert_usage(self):
        """float32 scalar: the fraction of slots that are filled."""
        return _mean(self.assignments)

    @property
    def slots_per_token(self):
        """float32 `[g, t]`: the number of slots that hold each token."""
        return ops.sum(ops.cast(self.dispatch_mask, "float32"), axis=(2, 3))


def group_size_arguments(routing):
    """Returns the keyword arguments that experts take besides their inputs."""
    if isinstance(routing, Rows):
        return {"group_sizes": routing.group_sizes}
    return {}


def check_routing(routing):
    """Raises a TypeError if the value is not a routing."""
    if not isinstance(routing, (Slots, Rows, RouterMask)):
        raise TypeError(
            "A router must return `Slots`, `Rows` or a `RouterMask`. "
            f"Received: {type(routing).__name__}."
        )


def with_expert_index(routing):
    """Returns a routing whose selection, if it is not known, is an empty tensor."""
    if getattr(routing, "expert_index", 0) is not None:
        return routing
    return routing._replace(expert_index=no_experts(routing.probs))


def no_experts(probs):
    """Returns the `expert_index` of tokens that select no experts, `[g, t, 0]`."""
    return ops.zeros((*ops.shape(probs)[:2], 0), dtype="int32")


def check_has_probs(routing):
    """Raises a TypeError if the routing has no probabilities."""
    if not isinstance(routing, (Slots, Rows)):
        raise TypeError(
            "The balance loss needs a routing with probabilities, `Slots` or `Rows`. "
            f"Received: {type(routing).__name__}."
        )


def _mean(x):
    """Returns the mean, 0 for no elements."""
    size = ops.cast(math.prod(ops.shape(x)), "float32")
    return ops.sum(x) / ops.maximum(size, 1.0)
