"""The names under which trackers know what the run folder holds: train/…, eval/…, perf/…"""

import math
from typing import Any

from distrib.config import Config

_GIB = 2**30
_PERF = {  # of a line of the ledger
    "seconds": "perf/step_seconds",
    "data_seconds": "perf/data_seconds",
    "optimizer_seconds": "perf/optimizer_seconds",
    "communication_seconds": "perf/communication_seconds",
}
_TRAIN = ("loss", "lr", "grad_norm", "epoch", "loss_scale")
_LOWER_IS_BETTER = ("loss", "error", "perplexity", "bits")


def lower_is_better(metric: str) -> bool:
    """By its name: eval/loss, eval/bits_per_byte, … ; of others, such as eval/accuracy, more is better."""
    return any(word in metric.lower() for word in _LOWER_IS_BETTER)


class Metrics:
    """Of one run, from its first line on."""

    def __init__(self, config: Config, start: dict[str, Any]) -> None:
        """`start`: of environment.json, the latest."""
        self.batch_size = config.data.global_batch_size
        self.skipped = 0
        self.flops: float | None = start.get("flops_per_step")
        self.peak: float | None = start.get("peak_flops")
        self._steps_done = 0
        self._latest: dict[str, float] = {}
        self._best: dict[str, float] = {}

    def of(self, kind: str, entry: dict[str, Any]) -> tuple[int, dict[str, float]]:
        """How many steps were done, and the numbers that belong there; of News as Follower gives them."""
        values: dict[str, float | None]
        if kind == "step":
            values = self._of_step(entry)
        elif kind == "evaluation":
            values = self._of_evaluation(entry)
        elif kind == "checkpoint":
            values = {"perf/save_seconds": entry.get("seconds"), "perf/save_stall_seconds": entry.get("stall")}
        else:
            return self._steps_done, {}
        known = {key: value for key, value in values.items() if value is not None}
        self._latest.update(known)
        return self._steps_done, known

    def summary(self) -> dict[str, float]:
        """The last of each, and the best of each that an evaluation found."""
        return {**self._latest, **{f"best/{key}": value for key, value in self._best.items()}}

    def _of_step(self, entry: dict[str, Any]) -> dict[str, float | None]:
        self._steps_done = entry["step"] + 1
        self.skipped += entry["verdict"] != "applied"
        seconds = entry["seconds"]
        # JSON has no NaN: null stands for a number that is not finite, or for the loss of a step without items.
        null = None if entry["verdict"] == "skipped:no_items" else math.nan
        values = {f"train/{key}": null if entry[key] is None else entry[key] for key in _TRAIN if key in entry}
        values |= {name: entry.get(key) for key, name in _PERF.items()}
        values["train/skipped"] = self.skipped
        if "data_seconds" in entry:
            values["perf/forward_backward_seconds"] = (
                seconds - entry["data_seconds"] - entry.get("optimizer_seconds", 0.0)
            )
        if "peak_memory" in entry:
            values["perf/peak_memory_gib"] = entry["peak_memory"] / _GIB
        if seconds:
            values["perf/samples_per_second"] = self.batch_size / seconds
            if entry["count"] and entry["count"] != self.batch_size:  # the loss counts something else, such as tokens
                values["perf/items_per_second"] = entry["count"] / seconds
            if self.flops is not None:
                values["perf/flops_per_second"] = self.flops / seconds
                if self.peak is not None:
                    values["perf/utilisation"] = self.flops / seconds / self.peak
        return values

    def _of_evaluation(self, entry: dict[str, Any]) -> dict[str, float | None]:
        for key, value in entry["metrics"].items():
            if value is not None:
                choose = min if lower_is_better(key) else max
                self._best[key] = choose(self._best.get(key, value), value)
        metrics = {key: math.nan if value is None else value for key, value in entry["metrics"].items()}
        return {**metrics, "perf/evaluation_seconds": entry.get("seconds")}
