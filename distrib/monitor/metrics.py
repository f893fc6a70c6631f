"""The names of a run's numbers in trackers: train/…, eval/…, perf/…"""

import math
from typing import Any

from distrib.monitor.observer import Observer
from distrib.run_folder.folder import RunDir
from distrib.run_folder.ledger import or_nan, own_numbers

_GIB = 2**30
_PERF = {  # from a line of the ledger
    "seconds": "perf/step_seconds",
    "data_seconds": "perf/data_seconds",
    "optimizer_seconds": "perf/optimizer_seconds",
    "communication_seconds": "perf/communication_seconds",
}
FROM_LEDGER = ("loss", "lr", "grad_norm", "epoch", "loss_scale")
_LOWER_IS_BETTER = ("loss", "error", "perplexity", "bits")


def lower_is_better(metric: str) -> bool:
    """Return whether a lower value is better, judged by the name: true for eval/loss, false for eval/accuracy."""
    return any(word in metric.lower() for word in _LOWER_IS_BETTER)


class Metrics(Observer):
    """Turns the lines of a run into named numbers. Derive a class and override `log`."""

    def __init__(self, run: RunDir) -> None:
        self.logged = 0  # numbers up to this many steps are known already, and are not logged again
        self.run = run
        self.latest: dict[str, float] = {}
        self.best: dict[str, float] = {}  # of what an evaluation found
        self._steps_done, self._skipped = 0, 0

    def log(self, steps_done: int, numbers: dict[str, float]) -> None:
        """Called with the numbers of each line; `steps_done` never decreases. NaN stands for what is not finite."""
        raise NotImplementedError

    def on_start(self, start: dict[str, Any]) -> None:
        self._batch_size, this = start["global_batch_size"], self.run.starts()[-1]
        self._flops, self._peak = this.get("flops_per_step"), this.get("peak_flops")

    def on_step(self, step: dict[str, Any]) -> None:
        self._steps_done = step["step"] + 1
        self._skipped += step["verdict"] != "applied"
        # JSON has no NaN: null stands for a number that is not finite, or for the loss of a step without items.
        null = None if step["verdict"] == "skipped:no_items" else math.nan
        numbers = {f"train/{key}": null if step[key] is None else step[key] for key in FROM_LEDGER if key in step}
        own = {key: or_nan(value) for key, value in own_numbers(step).items()}
        self._log({**numbers, **own, "train/skipped": self._skipped, **self._performance(step)})

    def on_evaluation(self, evaluation: dict[str, Any]) -> None:
        metrics = evaluation["metrics"]
        for key, value in metrics.items():
            if value is not None:
                self.best[key] = (min if lower_is_better(key) else max)(self.best.get(key, value), value)
        numbers = {key: or_nan(value) for key, value in metrics.items()}
        self._log({**numbers, "perf/evaluation_seconds": evaluation.get("seconds")})

    def on_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        seconds, stall = checkpoint.get("seconds"), checkpoint.get("stall")
        self._log({"perf/save_seconds": seconds, "perf/save_stall_seconds": stall})

    @property
    def is_new(self) -> bool:
        """Is the latest line one that is not logged yet?"""
        return self._steps_done > self.logged

    def summary(self) -> dict[str, float]:
        """The latest of each number, and the best of each evaluated one as best/eval/…"""
        return {**self.latest, **{f"best/{key}": value for key, value in self.best.items()}}

    def _log(self, numbers: dict[str, float | None]) -> None:
        known = {key: value for key, value in numbers.items() if value is not None}
        self.latest.update(known)
        if known and self.is_new:
            self.log(self._steps_done, known)

    def _performance(self, step: dict[str, Any]) -> dict[str, float | None]:
        seconds = step["seconds"]
        numbers: dict[str, float | None] = {name: step.get(key) for key, name in _PERF.items()}
        if "data_seconds" in step:
            rest = seconds - step["data_seconds"] - step.get("optimizer_seconds", 0.0)
            numbers["perf/forward_backward_seconds"] = rest
        if "peak_memory" in step:
            numbers["perf/peak_memory_gib"] = step["peak_memory"] / _GIB
        if seconds:
            numbers["perf/samples_per_second"] = self._batch_size / seconds
            if step["count"] and step["count"] != self._batch_size:  # the loss counts something else, such as tokens
                numbers["perf/items_per_second"] = step["count"] / seconds
            if self._flops is not None:
                numbers["perf/flops_per_second"] = self._flops / seconds
                if self._peak is not None:
                    numbers["perf/utilisation"] = self._flops / seconds / self._peak
        return numbers
