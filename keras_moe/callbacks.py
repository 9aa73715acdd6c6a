"""Watching the routers of a model while it is trained."""

import csv
import warnings

import keras
import numpy as np

from keras_moe import checks
from keras_moe.inspection import layers_within
from keras_moe.routers import Router


class RoutingMonitor(keras.callbacks.Callback):
    """What each router of a model does, epoch by epoch.

    It finds every router, however nested, that does not say
    `export_metrics=False`, and puts figures of each into the logs, under the
    path of its MoE layer; in validation with `val_` before it:

    - `max_load`, `min_load`: the busiest and the idlest expert, in units of
      the mean, so that 1 is balance;
    - `dead_experts`, `overloaded_experts`: how many are below `dead_below` or
      above `overloaded_above`, in the same units;
    - `load_entropy`: of the load, over that of perfect balance: 1 at best;
    - `left_behind`: the share of tokens that no expert served;
    - `z_loss`.

    It goes before callbacks that are to see them, such as `CSVLogger`,
    `TensorBoard` or `EarlyStopping`. The loads of all experts are in `history`.

    ```python
    monitor = keras_moe.callbacks.RoutingMonitor()
    model.fit(x, y, epochs=3, callbacks=[monitor])
    monitor.plot().savefig("load.png")
    ```

    Args:
        every: int, of how many training batches there is a record besides
            those of the epochs; `None` for none.
        dead_below: float.
        overloaded_above: float.
        collapsed_below: float in [0, 1]. A router's spread is `(n - k) / (e - k)`
            with `n = exp(entropy of the load)`, the number of experts that it
            in effect uses, and the `k` that it would use if all tokens went
            one way: 1 at balance, 0 at collapse. Below this there is a warning
            that names the layer and its busiest experts.

    Attributes:
        history: a list of dicts, one for each record of each router: `layer`;
            `phase`, `"train"`, `"validation"` or `"test"`; `epoch`; `batch`,
            `None` but with `every`; `step`, how many training batches it has
            seen; the figures above; and `load`, numpy `[e]`, 1 in sum.

    Raises:
        ValueError: for numbers out of range; in training, if there is nothing
            to watch.
        TypeError: for arguments of another type.
    """

    def __init__(
        self,
        every=None,
        *,
        dead_below=0.01,
        overloaded_above=2.0,
        collapsed_below=0.1,
    ):
        super().__init__()
        self.every = None if every is None else checks.whole_number("every", every)
        self.dead_below = checks.number("dead_below", dead_below)
        self.overloaded_above = checks.number("overloaded_above", overloaded_above)
        self.collapsed_below = checks.number("collapsed_below", collapsed_below)
        self.history = []
        self._epoch = None
        self._steps = 0
        self._warned = set()

    # What Keras calls

    def on_train_begin(self, logs=None):
        self._epoch = 0

    def on_epoch_begin(self, epoch, logs=None):
        self._epoch = epoch
        self._train_logs = None
        self._begin()

    def on_train_batch_end(self, batch, logs=None):
        # With `steps_per_execution` it is called for the last of several.
        before, self._batches = self._batches, batch + 1
        self._steps += self._batches - before
        if self.every and self._batches // self.every > before // self.every:
            self._record("train", batch=batch, since=self._last)
            self._last = self._read()

    def on_test_begin(self, logs=None):
        if self._epoch is not None:
            # Validation, between the last batch and the end of the epoch.
            self._train_logs = self._record("train")
        self._begin()

    def on_test_end(self, logs=None):
        if self._epoch is None:
            found = self._record("test")
        else:
            found = self._record("validation")
            self._test_logs = {f"val_{name}": x for name, x in found.items()}
        if logs is not None:
            logs.update(found)

    def on_epoch_end(self, epoch, logs=None):
        if self._train_logs is None:
            self._train_logs = self._record("train")
            self._test_logs = {}
        if logs is not None:
            logs.update({**self._train_logs, **self._test_logs})

    def on_train_end(self, logs=None):
        self._epoch = None

    # What users call

    def to_csv(self, path):
        """Writes the history as a table: a row for each record, a column for
        each figure and for the load of each expert."""
        experts = max((len(record["load"]) for record in self.history), default=0)
        names = [name for name in (self.history or [{}])[0] if name != "load"]
        with open(path, "w", newline="") as file:
            table = csv.writer(file)
            table.writerow(names + [f"load_{i}" for i in range(experts)])
            for record in self.history:
                table.writerow([record[name] for name in names] + list(record["load"]))

    def plot(self, phase="train"):
        """Draws the load of each layer's experts over time, and at last.

        Args:
            phase: of which records.

        Returns:
            A `matplotlib.figure.Figure`.
        """
        from keras_moe.visualization import draw_loads

        return draw_loads([r for r in self.history if r["phase"] == phase])

    # The records

    def _routers(self):
        """The routers that keep a log; on JAX, `model` brings it up to date."""
        found = [r for r in layers_within(self.model, Router) if r.log]
        if not found:
            raise ValueError(
                "The model has no router to watch: there is none, or all say "
                "`export_metrics=False`; `export_metrics=()` keeps them out of the "
                "logs but can be watched."
            )
        return found

    def _begin(self):
        for router in self._routers():
            router.log.clear()
        self._batches, self._last = 0, None

    def _read(self):
        return [router.log.read() for router in self._routers()]

    def _record(self, phase, batch=None, since=None):
        """Adds records to the history; returns what goes into the logs."""
        result = {}
        for i, router in enumerate(self._routers()):
            sums = router.log.read()
            if since is not None:
                sums = {name: x - since[i][name] for name, x in sums.items()}
            figures = self._figures(sums)
            layer = router.metrics_prefix
            place = {
                "layer": layer,
                "phase": phase,
                "epoch": self._epoch,
                "batch": batch,
                "step": self._steps,
            }
            self.history.append({**place, **figures})
            self._warn_of_collapse(layer, router, figures["load"])
            del figures["load"]
            result |= {f"{layer}/{name}": float(x) for name, x in figures.items()}
        return result

    def _figures(self, sums):
        experts, tokens = len(sums["load"]), max(sums["tokens"], 1.0)
        load = sums["load"] / max(sums["load"].sum(), 1e-9)
        relative = experts * load
        return {
            "max_load": relative.max(),
            "min_load": relative.min(),
            "dead_experts": int(np.sum(relative < self.dead_below)),
            "overloaded_experts": int(np.sum(relative > self.overloaded_above)),
            "load_entropy": _entropy(load) / max(np.log(experts), 1e-9),
            "left_behind": sums["left_behind"] / tokens,
            "z_loss": sums["z_loss"] / tokens,
            "load": load,
        }

    def _warn_of_collapse(self, layer, router, load):
        experts, k = len(load), router.experts_per_token or 1
        if layer in self._warned or experts <= k or not load.any():
            return
        spread = (np.exp(_entropy(load)) - k) / (experts - k)
        if spread < self.collapsed_below:
            self._warned.add(layer)
            busiest = np.flatnonzero(load > 1 / experts)
            warnings.warn(
                f"{layer} has collapsed: of {experts} experts, {busiest.tolist()} have "
                f"{load[busiest].sum():.0%} of the load. A larger weight of the "
                "balance loss, noise or a bias-balanced router may help.",
                stacklevel=2,
            )


def _entropy(load):
    load = load[load > 0]
    return -np.sum(load * np.log(load))
