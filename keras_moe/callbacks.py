"""Callbacks: routing statistics of each expert during training."""

import csv
import time
import warnings

import keras
import numpy as np
from keras import ops

from keras_moe.routers import BiasBalancedMaskedRouter, Router
from keras_moe.utils import checks
from keras_moe.utils.traversal import find_layers

PHASES = ("train", "validation", "test")


class RoutingMonitor(keras.callbacks.Callback):
    """Logs the expert load of each router, and warns of dropped tokens and collapse.

    It finds the routers of a model at any depth, except those with
    `export_metrics=False`. At the end of each epoch it adds these values to the logs,
    as `<path of the MoE layer>/<name>`, with `val_` in front for validation data:

    - `max_load`: the load of the most-loaded expert of a group, relative to the group's
      mean load; the mean over groups. Above the capacity factor over `k`, assignments
      are dropped.
    - `min_load`: the load of the least-loaded expert over the whole epoch, relative to
      the mean load. 1 is balanced.
    - `dead_experts`, `overloaded_experts`: the number of experts whose load over the
      whole epoch is below `dead_below` or above `overloaded_above`, relative to the
      mean load.
    - `load_entropy`: the entropy of the load over that of a balanced load, at most 1.
    - `experts_per_token`: the mean number of experts that a token selects, before any
      is dropped; where experts choose, the mean number that select it.
    - `left_behind`: the fraction of tokens that are dropped, without any expert.
    - `z_loss`: the unweighted router z-loss.

    Place it before callbacks that read these values, such as `CSVLogger`, `TensorBoard`
    or `EarlyStopping`.

    Args:
        every: int, the number of training batches after which a record is added to
            `history`, besides those of the epochs. Defaults to `None`, no such records.
        dead_below: float. Defaults to 0.01.
        overloaded_above: float. Defaults to 2.
        collapsed_below: float. Warns once per layer if the spread of a router,
            `(n - k) / (e - k)`, is below. `n = exp(entropy of the load)` is the
            effective number of experts; the spread is 1 for a balanced load and 0 if
            all tokens select the same `k` experts. Defaults to 0.1.
        dropped_above: float. Warns once per layer and phase if `left_behind` is above.
            Defaults to 0.1.
        log_dir: string or path of a folder for TensorBoard, to which the histograms
            `expert_load` and `expert_bias` of each layer are written after each epoch.
            Needs tensorboard. Defaults to `None`, no histograms.

    Attributes:
        history: list of dicts, one per record and router. The keys: `layer`; `phase`,
            `"train"`, `"validation"` or `"test"`; `epoch`; `batch`, `None` for the
            record of an epoch; `step`, the number of training batches so far; the
            values above; `load`, numpy `[e]`, 1 in sum; and of a
            `BiasBalancedMaskedRouter` `bias`, numpy `[e]`.

    Raises:
        ValueError: if an argument is out of range; in training, if the model has no
            router to monitor.
        TypeError: if an argument has another type.

    Example:

    ```python
    inputs = keras.Input((8, 16))
    layer = keras_moe.presets.mixtral(num_experts=4, d_ff=32, name="moe")
    model = keras.Model(inputs, inputs + layer(inputs))
    model.compile("adam", "mse")
    monitor = keras_moe.callbacks.RoutingMonitor()
    x = np.random.default_rng(0).normal(size=(4, 8, 16))
    model.fit(x, x, epochs=3, callbacks=[monitor], verbose=0)
    monitor.history[-1]["load"]
    ```
    """

    def __init__(
        self,
        every=None,
        *,
        dead_below=0.01,
        overloaded_above=2.0,
        collapsed_below=0.1,
        dropped_above=0.1,
        log_dir=None,
    ):
        super().__init__()
        self.every = None if every is None else checks.whole_number("every", every)
        self.dead_below = checks.number("dead_below", dead_below)
        self.overloaded_above = checks.number("overloaded_above", overloaded_above)
        self.collapsed_below = checks.number("collapsed_below", collapsed_below)
        self.dropped_above = checks.number("dropped_above", dropped_above)
        self._histograms = None if log_dir is None else _Histograms(log_dir)
        self.history = []
        self._epoch = None
        self._step = 0
        # Of the current epoch or evaluation.
        self._batches, self._last_sums = 0, None
        self._train_logs, self._validation_logs = None, {}
        self._warned = set()

    # Called by Keras

    def on_train_begin(self, logs=None):
        self._epoch = 0

    def on_epoch_begin(self, epoch, logs=None):
        self._epoch = epoch
        self._train_logs = None
        self._clear()

    def on_train_batch_end(self, batch, logs=None):
        # With `steps_per_execution` it is called for the last of several batches.
        before, self._batches = self._batches, batch + 1
        self._step += self._batches - before
        if self.every and self._batches // self.every > before // self.every:
            self._record("train", batch=batch, since=self._last_sums)
            self._last_sums = self._read()

    def on_test_begin(self, logs=None):
        if self._epoch is not None:
            # Validation runs between the last batch and the end of the epoch.
            self._train_logs = self._record("train")
        self._clear()

    def on_test_end(self, logs=None):
        if self._epoch is None:
            found = self._record("test")
        else:
            found = self._record("validation")
            self._validation_logs = {f"val_{name}": x for name, x in found.items()}
        if logs is not None:
            logs.update(found)

    def on_epoch_end(self, epoch, logs=None):
        if self._train_logs is None:
            self._train_logs = self._record("train")
            self._validation_logs = {}
        if logs is not None:
            logs.update({**self._train_logs, **self._validation_logs})

    def on_train_end(self, logs=None):
        self._epoch = None

    # Called by users

    def to_csv(self, path):
        """Writes the history as a CSV file, one row per record.

        The columns are the keys of a record, and `load_0`, `load_1`, ... for the load
        of each expert; with biases, also `bias_0`, `bias_1`, ....

        Args:
            path: string or path of the file.
        """
        rows = [_flat(record) for record in self.history]
        columns = list(dict.fromkeys(name for row in rows for name in row))
        # The numbers of each expert come last.
        columns.sort(key=lambda name: name.startswith(("load_", "bias_")))
        with open(path, "w", newline="") as file:
            table = csv.DictWriter(file, columns)
            table.writeheader()
            table.writerows(rows)

    def plot(self, phase="train"):
        """Draws the load of each layer's experts over time, and in the last record.

        Needs matplotlib.

        Args:
            phase: string, `"train"`, `"validation"` or `"test"`. Defaults to `"train"`.

        Returns:
            A `matplotlib.figure.Figure`.

        Raises:
            ValueError: if there is no record of this phase.
        """
        from keras_moe.visualization import draw_loads

        checks.one_of("phase", phase, PHASES)
        records = [r for r in self.history if r["phase"] == phase]
        if not records:
            found = sorted({r["phase"] for r in self.history})
            raise ValueError(
                f"There is no record of the phase {phase!r}: pass the monitor to `fit` "
                "for training and validation, to `evaluate` for a test. Recorded so "
                f"far: {found}."
            )
        return draw_loads(records)

    # Records

    def _routers(self):
        # On JAX, `self.model` copies the state of the training step into the variables.
        found = [r for r in find_layers(self.model, Router) if r.log]
        if not found:
            raise ValueError(
                "The model has no router to monitor: it has none, or all have "
                "`export_metrics=False`. With `export_metrics=()` a router exports no "
                "metrics but can be monitored."
            )
        return found

    def _clear(self):
        for router in self._routers():
            router.log.clear()
        self._batches, self._last_sums = 0, None

    def _read(self):
        return [router.log.read() for router in self._routers()]

    def _record(self, phase, batch=None, since=None):
        """Adds records to the history, and returns the values for the logs."""
        result = {}
        for i, router in enumerate(self._routers()):
            sums = router.log.read()
            if since is not None:
                sums = {name: x - since[i][name] for name, x in sums.items()}
            figures = self._figures(sums)
            bias = getattr(router, "expert_bias", None)
            if bias is not None:
                figures["bias"] = np.array(ops.convert_to_numpy(bias))
            layer = router.metrics_prefix
            position = {
                "layer": layer,
                "phase": phase,
                "epoch": self._epoch,
                "batch": batch,
                "step": self._step,
            }
            self.history.append({**position, **figures})
            self._warn_if_collapsed(layer, figures)
            self._warn_if_dropped(layer, phase, figures["left_behind"])
            experts = {n: figures.pop(n) for n in ("load", "bias") if n in figures}
            if self._histograms and batch is None:
                self._histograms.add(f"{layer}/{phase}", experts, self._step)
            result |= {f"{layer}/{name}": float(x) for name, x in figures.items()}
        return result

    def _figures(self, sums):
        experts, tokens = len(sums["load"]), max(sums["tokens"], 1.0)
        load = sums["load"] / max(sums["load"].sum(), 1e-9)
        relative = experts * load
        return {
            "max_load": sums["max_load"] / max(sums["groups"], 1.0),
            "min_load": relative.min(),
            "dead_experts": int(np.sum(relative < self.dead_below)),
            "overloaded_experts": int(np.sum(relative > self.overloaded_above)),
            "experts_per_token": sums["selected"] / tokens,
            "load_entropy": _entropy(load) / max(np.log(experts), 1e-9),
            "left_behind": sums["left_behind"] / tokens,
            "z_loss": sums["z_loss"] / tokens,
            "load": load,
        }

    def _warn_if_collapsed(self, layer, figures):
        load = figures["load"]
        experts, k = len(load), max(figures["experts_per_token"], 1.0)
        if experts <= k or not load.any():
            return
        # 0 if all tokens select the same k experts, 1 for a balanced load.
        spread = (np.exp(_entropy(load)) - k) / (experts - k)
        if spread < self.collapsed_below:
            busiest = np.flatnonzero(load > 1 / experts)
            self._warn_once(
                (layer, "collapsed"),
                f"{layer} has collapsed: of {experts} experts, {busiest.tolist()} have "
                f"{load[busiest].sum():.0%} of the load. Increase "
                "`load_balancing_loss_weight`, add noise to the router, or use "
                "`BiasBalancedMaskedRouter`.",
            )

    def _warn_if_dropped(self, layer, phase, left_behind):
        if left_behind > self.dropped_above:
            factor = "train" if phase == "train" else "eval"
            self._warn_once(
                (layer, "dropped", phase),
                f"{layer} drops {left_behind:.0%} of the tokens ({phase}): similar "
                "tokens of a group select the same experts. Increase "
                f"`{factor}_capacity_factor` (`None` is dropless, for routers that "
                "support it), or route more examples together "
                "(`examples_per_group=None` for the whole batch).",
            )

    def _warn_once(self, key, message):
        if key not in self._warned:
            self._warned.add(key)
            warnings.warn(message, stacklevel=2)


class BiasUpdateRateScheduler(keras.callbacks.Callback):
    """Sets `bias_update_rate` of each `BiasBalancedMaskedRouter` while training.

    Args:
        schedule: function of the number of updates of the weights so far (`iterations`
            of the optimizer), which returns the rate, such as a
            `keras.optimizers.schedules.LearningRateSchedule`. With
            `steps_per_execution`, all steps of an execution have the same rate.

    Raises:
        ValueError: in training, if the model has no such router.
        TypeError: if `schedule` is not callable.

    Example:

    ```python
    # The rate of DeepSeek-V3, which is 0 at the end of training.
    scheduler = keras_moe.callbacks.BiasUpdateRateScheduler(
        lambda step: 0.001 if step < 10_000 else 0.0
    )
    ```

    Reference:
        [DeepSeek-AI, 2024](https://arxiv.org/abs/2412.19437), section 4.2.
    """

    def __init__(self, schedule):
        super().__init__()
        if not callable(schedule):
            raise TypeError(
                f"`schedule` must be a function. Received: schedule={schedule!r}."
            )
        self.schedule = schedule
        # At the beginning of the epoch.
        self._iterations = None
        self._batches_per_update = 1
        self._rate = None

    def on_train_begin(self, logs=None):
        self._rate = None

    def on_epoch_begin(self, epoch, logs=None):
        self._iterations = None

    def on_train_batch_begin(self, batch, logs=None):
        if self._iterations is None:
            # Not before: another callback may have restored the optimizer.
            optimizer = self.model.optimizer
            self._iterations = int(ops.convert_to_numpy(optimizer.iterations))
            self._batches_per_update = optimizer.gradient_accumulation_steps or 1
        step = self._iterations + batch // self._batches_per_update
        rate = float(ops.convert_to_numpy(self.schedule(step)))
        if rate == self._rate:
            return
        self._rate = rate
        # On JAX, `self.model` copies the state of the training step into the variables.
        routers = find_layers(self.model, BiasBalancedMaskedRouter)
        if not routers:
            raise ValueError("The model has no `BiasBalancedMaskedRouter`.")
        for router in routers:
            router.bias_update_rate = rate


class _Histograms:
    """Histograms of values per expert in a folder of TensorBoard.

    Args:
        log_dir: string or path.
    """

    def __init__(self, log_dir):
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        self._writer = EventFileWriter(str(log_dir))

    def add(self, layer, values, step):
        """Adds a histogram of each value.

        Args:
            layer: string, the beginning of the names.
            values: dict of names to numpy `[e]`.
            step: int.
        """
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.plugins.histogram.summary_v2 import histogram_pb

        for name, value in values.items():
            summary = histogram_pb(f"{layer}/expert_{name}", value)
            self._writer.add_event(
                Event(wall_time=time.time(), step=step, summary=summary)
            )
        self._writer.flush()


def _flat(record):
    """Returns a record with one value for each expert, instead of arrays."""
    row = {}
    for name, value in record.items():
        if isinstance(value, np.ndarray):
            row |= {f"{name}_{i}": x for i, x in enumerate(value)}
        else:
            row[name] = value
    return row


def _entropy(load):
    load = load[load > 0]
    return -np.sum(load * np.log(load))
