"""What is looked at: routing statistics, and `add_metric` for Keras 3 layers."""

import keras
import numpy as np
from keras import ops

from keras_moe.kernels import CARRIES_STATE, scatter_add_rows
from keras_moe.routing import expert_load


def routing_statistics(routing, valid):
    """How a routing used its experts, as float32 scalars.

    Args:
        routing: `Slots`, `Rows` or `RouterMask`.
        valid: float32 scalar, the number of tokens that are not masked.

    Returns:
        A dict:
        `fraction_tokens_left_behind`, the share of valid tokens without any
        slot; `router_confidence`, the mean combine weight of a filled slot;
        `expert_usage`, the share of slots that are filled, or without slots of
        experts with a token. Each is 0 where there is nothing to take the
        share of.
    """
    served = ops.sum(ops.cast(routing.slots_per_token > 0, "float32"))
    return {
        "fraction_tokens_left_behind": _share(valid - served, valid),
        "router_confidence": _share(
            ops.sum(routing.weight), ops.sum(routing.assignments)
        ),
        "expert_usage": routing.expert_usage,
    }


def _share(part, whole):
    return part / ops.maximum(whole, 1.0)


class LayerMetrics:
    """Gives `add_metric` back to a Keras 3 layer. A mixin.

    Put it before the layer class. What `call` hands to `add_metric` is
    averaged over the batches of an epoch, and stands in the progress bar, in
    the history of `fit` (`val_` too) and in `evaluate(return_dict=True)` under
    `<layer path>/<name>`, on every backend:

    ```python
    class Scale(keras_moe.LayerMetrics, keras.layers.Layer):
        def call(self, inputs):
            self.add_metric(keras.ops.mean(keras.ops.abs(inputs)), "magnitude")
            return inputs
    ```

    The running sums are state of the layer, but no weights: they stand neither
    in `weights`, nor in `count_params()`, nor in a saved file.

    Args:
        *args: forwarded to the layer class.
        export_metrics: `True`, `False` (`add_metric` then does nothing), or a
            tuple of the names to keep. It is no part of the config; a layer
            that takes it says so there.
        **kwargs: forwarded to the layer class.

    Raises:
        TypeError: if `export_metrics` is something else.
    """

    # Before `__init__`, where Keras may already ask for `variables`.
    export_metrics = False

    def __init__(self, *args, export_metrics=True, **kwargs):
        super().__init__(*args, **kwargs)
        if not isinstance(export_metrics, bool):
            if not isinstance(export_metrics, (tuple, list)) or not all(
                isinstance(name, str) for name in export_metrics
            ):
                raise TypeError(
                    "`export_metrics` must be True, False, or a tuple of names. "
                    f"Received: export_metrics={export_metrics!r}."
                )
            export_metrics = tuple(export_metrics)
        self.export_metrics = export_metrics
        self._running_means = _RunningMeans(self.name) if export_metrics else None

    def add_metric(self, value, name):
        """Averages a scalar over the epoch, under the layer's path.

        Args:
            value: a scalar.
            name: a string; a name given again is the same metric.

        Raises:
            ValueError: if the value is no scalar.
            TypeError: if the name is no string.
        """
        self.add_metrics({name: value})

    def add_metrics(self, values):
        """`add_metric` for a dict of several, in one update.

        Args:
            values: a dict of names to scalars.
        """
        if not self.export_metrics:
            return
        if self.export_metrics is not True:
            values = {n: v for n, v in values.items() if n in self.export_metrics}
        if values:
            self._running_means.update(values, self.metrics_prefix)

    @property
    def metrics_prefix(self):
        """What stands before a metric's name: the layer's path."""
        return self.path or self.name

    @property
    def metrics(self):
        return super().metrics + (
            self._running_means.views if self.export_metrics else []
        )

    @property
    def variables(self):
        # Backends that are given a model's state, as JAX is, find it here.
        return super().variables + self.running_state

    @property
    def running_state(self):
        """Variables of the layer that are no weights."""
        return [self._running_means.state] if self.export_metrics else []


def running_sums(shape, name):
    """A variable for sums over batches, which is no weight of any layer."""
    # Made from an initializer, not an array, so that a layer may be made while
    # another is built symbolically; never autocast, as bfloat16 does not count
    # beyond 256.
    return keras.Variable(
        initializer="zeros",
        shape=shape,
        dtype="float32",
        trainable=False,
        autocast=False,
        aggregation="sum",
        # Else a replica waits here for the others, and loses losses added before.
        synchronization="on_read",
        name=name,
    )


class RoutingLog:
    """What a router did, in sums over batches, for `RoutingMonitor`.

    It is a plain object, so that Keras takes the variable for no weight. The owner's
    name is part of the variable's.
    """

    def __init__(self, owner, num_experts):
        self.sums = running_sums((num_experts + 3,), f"{owner}_routing_log")

    def update(self, routing, *, valid, left_behind, z_loss):
        """Adds a batch.

        Args:
            routing: `Slots`, `Rows` or `RouterMask`.
            valid: float32 scalar, the number of tokens that are not masked.
            left_behind: float32 scalar, the share of these without an expert.
            z_loss: float32 scalar.
        """
        figures = ops.stack([valid, valid * left_behind, valid * z_loss])
        sums = ops.concatenate([figures, expert_load(routing)])
        self.sums.assign_add(ops.stop_gradient(sums))

    def read(self):
        """A dict of the sums since the last `clear`, numpy."""
        tokens, left_behind, z_loss, *load = ops.convert_to_numpy(self.sums)
        return {
            "tokens": tokens,
            "left_behind": left_behind,
            "z_loss": z_loss,
            "load": np.array(load),
        }

    def clear(self):
        self.sums.assign(ops.zeros(self.sums.shape, dtype="float32"))


class _RunningMeans:
    """Sums and counts of named values, in one variable.

    It is a plain object, so that Keras takes the variable for no weight. The owner's
    name is part of the variable's. The variable has room for metrics that are first
    named while a step is being compiled, when it is too late for a new variable.
    """

    room = 32

    def __init__(self, owner):
        self.state = running_sums((self.room, 2), f"{owner}_running_means")
        self.views = []
        self._columns = {}
        self._traced = None

    def update(self, values, prefix):
        for name in values:
            if not isinstance(name, str):
                raise TypeError(
                    f"A metric's name must be a string. Received: {name!r}."
                )
            if name not in self._columns:
                self._add_column(name, prefix)
        columns = ops.convert_to_tensor([self._columns[name] for name in values])
        sums = ops.stack([_scalar(*value) for value in values.items()])
        counted = ops.stop_gradient(ops.stack([sums, ops.ones_like(sums)], axis=-1))
        sums = scatter_add_rows(counted[None], columns[None], self.room)
        self.state.assign_add(sums[0])
        # A JAX step asks for results before the variable has its new value;
        # this is that value, for as long as the step is being traced.
        if CARRIES_STATE:
            self._traced = ops.stop_gradient(ops.convert_to_tensor(self.state))

    def result(self, column):
        for state in (self._traced, self.state):
            if state is None:
                continue
            try:
                total, count = state[column, 0], state[column, 1]
                return total / ops.maximum(count, 1.0)
            except (TypeError, ValueError):
                # Of a trace that has ended, or without a value in this one.
                continue
        # Keeps the key in the logs; Keras fills in the value after the epoch.
        return float("nan")

    def reset(self, column):
        self._traced = None
        kept = ops.expand_dims(ops.arange(self.room) != column, -1)
        state = ops.convert_to_tensor(self.state)
        self.state.assign(ops.where(kept, state, 0.0))

    def _add_column(self, name, prefix):
        column = len(self._columns)
        if column == self.room:
            raise ValueError(
                f"A layer has room for {self.room} metrics. "
                f"Received one more: name={name!r}."
            )
        self._columns[name] = column
        self.views.append(_View(self, column, name=f"{prefix}/{name}"))


def _scalar(name, value):
    value = ops.cast(ops.convert_to_tensor(value), "float32")
    if len(value.shape):
        raise ValueError(
            f"A metric must be a scalar. Received: {name!r} of shape {value.shape}."
        )
    return value


class _View(keras.metrics.Metric):
    """One mean of `_RunningMeans`, as a metric without variables."""

    def __init__(self, means, column, name):
        super().__init__(name=name)
        self._result = lambda: means.result(column)
        self._reset = lambda: means.reset(column)

    def update_state(self, value):
        raise NotImplementedError("`add_metric` in the layer's `call` updates it.")

    def result(self):
        return self._result()

    def reset_state(self):
        self._reset()
