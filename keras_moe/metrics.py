"""Layer metrics: `add_metric` for Keras 3 layers, on every backend."""

import keras
import numpy as np

from keras_moe.kernels import STATE_IS_PASSED, assign_part, ops
from keras_moe.kernels.state import OwnedVariable


class LayerMetrics:
    """Adds `add_metric` to a Keras 3 layer. A mixin.

    Put it before the layer class. A value passed to `add_metric` in `call` is averaged
    over the batches of an epoch. It appears in the progress bar, in the history of
    `fit` (with `val_` for validation data) and in `evaluate(return_dict=True)`, as
    `<layer path>/<name>`.

    The running sums are state of the layer, but not weights: they are not in `weights`,
    `count_params()` or a saved file.

    Args:
        *args: forwarded to the layer class.
        export_metrics: `True`; `False`, with which `add_metric` does nothing; or a
            tuple of the names to keep. It is not in the config of the layer; add it in
            `get_config` if the constructor accepts it. Defaults to `True`.
        **kwargs: forwarded to the layer class.

    Raises:
        TypeError: if `export_metrics` has another type.

    Example:

    ```python
    class Scale(keras_moe.LayerMetrics, keras.layers.Layer):
        def call(self, inputs):
            self.add_metric(keras.ops.mean(keras.ops.abs(inputs)), "magnitude")
            return inputs


    inputs = keras.Input((3,))
    model = keras.Model(inputs, Scale(name="scale")(inputs))
    model.compile(loss="mse")
    x = np.ones((4, 3))
    model.evaluate(x, x, return_dict=True)  # {"loss": 0.0, "scale/magnitude": 1.0}
    ```
    """

    # Set before `__init__`, where Keras may read `variables`.
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
        self._running_means = _RunningMeans(self) if export_metrics else None

    def add_metric(self, value, name):
        """Averages a scalar over the epoch.

        Args:
            value: scalar.
            name: string. Values of the same name belong to the same metric.

        Raises:
            ValueError: if the value is not a scalar.
            TypeError: if the name is not a string.
        """
        self.add_metrics({name: value})

    def add_metrics(self, values, weight=1.0):
        """Averages several scalars, in one update: see `add_metric`.

        Args:
            values: dict of names to scalars.
            weight: scalar, the weight of this batch in the average. Defaults to 1.
        """
        if not self.export_metrics:
            return
        if self.export_metrics is not True:
            values = {n: v for n, v in values.items() if n in self.export_metrics}
        if values:
            self._running_means.update(values, weight)

    @property
    def metrics_prefix(self):
        """The prefix of the metrics' names: the path of the layer."""
        return self.path or self.name

    @property
    def metrics(self):
        return super().metrics + (
            self._running_means.views if self.export_metrics else []
        )

    @property
    def variables(self):
        # Backends that pass a model's state to a step, such as JAX, read it here.
        return super().variables + self.running_state

    @property
    def running_state(self):
        """The layer's variables that are not weights."""
        return [self._running_means.state] if self.export_metrics else []


class _RunningMeans:
    """Weighted sums of named values, and their weights, in one variable.

    This is not a Keras object, so Keras does not track the variable as a weight. The
    variable has room for metrics that are first named while a step is compiled, when no
    variable can be created.
    """

    room = 32

    def __init__(self, owner):
        self.state = OwnedVariable(owner, "running_means", (self.room, 2))
        self.views = []
        self._owner = owner
        self._columns = {}
        self._traced = None

    def update(self, values, weight):
        for name in values:
            if not isinstance(name, str):
                raise TypeError(
                    f"The name of a metric must be a string. Received: {name!r}."
                )
            if name not in self._columns:
                self._add_column(name)
        sums = _stacked({name: values.get(name, 0.0) for name in self._columns})
        weights = ops.ones_like(sums)
        if len(values) < len(self._columns):
            weights = np.array([name in values for name in self._columns], "float32")
        weighted = ops.stack([sums, weights], axis=-1) * weight
        empty = self.room - len(self._columns)
        weighted = ops.pad(weighted, [[0, empty], [0, 0]])
        changed = self.state.add(ops.stop_gradient(weighted))
        # A step on JAX reads results before the variable has its new value. This is
        # that value while the step is traced.
        if changed and STATE_IS_PASSED:
            self._traced = ops.stop_gradient(ops.convert_to_tensor(self.state))

    def result(self, column):
        for state in (self._traced, self.state):
            if state is None:
                continue
            try:
                total, weight = state[column, 0], state[column, 1]
                return total / ops.where(weight > 0, weight, 1.0)
            except (TypeError, ValueError):
                # From a trace that has ended, or without a value in this one.
                continue
        # Keeps the key in the logs; Keras replaces the value after the epoch.
        return float("nan")

    def reset(self, column):
        self._traced = None
        assign_part(self.state, column, np.zeros(2, "float32"))

    def _add_column(self, name):
        column = len(self._columns)
        if column == self.room:
            raise ValueError(
                f"A layer has room for {self.room} metrics. "
                f"Received one more: name={name!r}."
            )
        self._columns[name] = column
        self.views.append(
            _View(self, column, name=f"{self._owner.metrics_prefix}/{name}")
        )


def _stacked(values):
    """Returns a float32 vector of scalars."""
    for name, value in values.items():
        shape = tuple(getattr(value, "shape", ()))
        if shape:
            raise ValueError(
                f"A metric must be a scalar. Received: {name!r} of shape {shape}."
            )
    return ops.stack([ops.cast(value, "float32") for value in values.values()])


class _View(keras.metrics.Metric):
    """One mean of `_RunningMeans`, as a metric without variables of its own."""

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
