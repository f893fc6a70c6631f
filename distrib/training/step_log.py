"""From a step to its line in the ledger. `Engine.step` returns a PendingStep; StepLog reads it one step late.

Every step ends with a verdict. Schedule, ledger, trackers and counters depend on the verdict alone.
"""

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from distrib.config import TrainConfig
from distrib.errors import ConfigError, TrainingError
from distrib.plan import RunPlan
from distrib.run_folder.earlier_starts import total_seconds
from distrib.strategies.step_sums import StepSums

if TYPE_CHECKING:  # a loop of one's own needs no display and no trackers
    from distrib.monitor.run_log import RunLog

APPLIED = "applied"


@dataclass(frozen=True)
class StepResult:
    """What a step did, the same on every rank."""

    verdict: str  # applied | skipped:<reason>
    loss: float  # the mean over the whole window, before the update
    count: float  # items in the window; whole, unless items have weights
    grad_norm: float  # before clipping
    lr: float
    digest: int  # of the samples read by all ranks, see data/order.py
    loss_scale: float | None = None  # fp16 only
    own: dict[str, float] = field(default_factory=dict)  # the task's numbers, by their names in the ledger
    stop: bool = False  # a rank was asked to stop
    same_rates: bool = True  # in the step before, all ranks had the same learning rate

    @property
    def applied(self) -> bool:
        return self.verdict == APPLIED


class PendingStep:
    """A step that was made. Its result may still be on a GPU; `read` it after the next step has begun, so that the
    host does not wait."""

    def __init__(
        self,
        sums: Tensor | list[float],
        grad_norm: Tensor | float,
        lr: float,
        scale: float | None,
        own: tuple[list[str], Tensor] | None = None,
    ) -> None:
        """`sums`: the window's, over all ranks, as `StepSums.pack` makes them, shape (SIZE,); `scale`: fp16's loss
        scale; `own`: names and sums of the task's own numbers, shape (names, 2). Tensors on a GPU are copied to the
        host without waiting."""
        self._lr, self._scale = lr, scale
        self._names: list[str] = own[0] if own is not None else []
        self._own: Tensor | None = own[1] if own is not None else None
        self._sums, self._grad_norm = sums, grad_norm
        self._copied: torch.Event | None = None
        if isinstance(sums, Tensor) and sums.device.type != "cpu":  # not run here: see docs/not-run-here.md
            self._sums, self._grad_norm = _copy_to_host(sums), _copy_to_host(grad_norm)
            if self._own is not None:
                self._own = _copy_to_host(self._own)
            self._copied = torch.Event(device=sums.device)
            self._copied.record()

    @property
    def known(self) -> bool:
        """Can `read` return without waiting?"""
        return self._copied is None or self._copied.query()

    def wait(self) -> None:
        """Wait until this step is done; later work on the GPU is not waited for."""
        if self._copied is not None:
            self._copied.synchronize()

    def read(self) -> StepResult:
        """Return the step's result. Waits until it is known."""
        self.wait()
        values = self._sums.tolist() if isinstance(self._sums, Tensor) else self._sums
        sums, grad_norm = StepSums.unpack(values), float(self._grad_norm)
        loss = sums.loss / sums.count if sums.count else math.nan
        if sums.count == 0:
            verdict, grad_norm = "skipped:no_items", math.nan
        elif not math.isfinite(loss):
            verdict, grad_norm = "skipped:nonfinite_loss", math.nan
        elif not math.isfinite(grad_norm):
            verdict = "skipped:nonfinite_gradient" if self._scale is None else "skipped:loss_scale"
        else:
            verdict = APPLIED
        pairs = [] if self._own is None else self._own.tolist()
        own = {f"train/{name}": a / b if b else math.nan for name, (a, b) in zip(self._names, pairs, strict=True)}
        return StepResult(
            *(verdict, loss, sums.count, grad_norm, self._lr, sums.digest, self._scale, own, sums.stop, sums.same_rates)
        )


class Clock:
    """Splits the host time of a step into parts. `lap(part)` adds the time since the previous lap to that part.

    On a GPU these are host times: kernels run asynchronously, so time spent waiting for data may overlap with GPU work.
    """

    def __init__(self) -> None:
        self.start()

    def start(self) -> None:
        """Begin a step."""
        self._began = self._last = time.perf_counter()
        self._spent = {"data": 0.0, "forward_backward": 0.0, "optimizer": 0.0}

    def lap(self, part: str) -> None:
        now = time.perf_counter()
        self._spent[part] += now - self._last
        self._last = now

    def seconds(self) -> dict[str, float]:
        """Return the seconds of the step and of its parts. The remainder is forward and backward."""
        return {
            "seconds": round(time.perf_counter() - self._began, 6),
            "data_seconds": round(self._spent["data"], 6),
            "optimizer_seconds": round(self._spent["optimizer"], 6),
        }


class StepLog:
    """Logs each step one step late, the same on every rank. Call `submit` after a step, and `flush` before anything
    that needs its result: an evaluation, a save, the end."""

    def __init__(
        self, run_log: "RunLog", plan: RunPlan, strategy: str, config: TrainConfig, models: Sequence[str] = ("",)
    ) -> None:
        """`models`: the names of the models that each step updates; if there is one, its name is shown nowhere."""
        self.run_log, self.plan, self.strategy, self.config = run_log, plan, strategy, config
        self.applied = 0  # among the steps that were read, those that updated each model
        self.updates = dict.fromkeys(models, 0)  # of each model
        self.skipped_in_a_row = dict.fromkeys(models, 0)  # for each model, up to the last step that was read
        self._first = next(iter(models))
        self._applied_before = -1  # `applied` before the last step that was read
        self._unread: tuple[int, dict[str, PendingStep], dict[str, float]] | None = None

    @property
    def num_updates(self) -> int:
        """The number of updates made, which is the schedule's position. The last step is assumed applied even if its
        result is already known; otherwise the schedule would depend on when a run saves."""
        return (self._applied_before if self._unread is None else self.applied) + 1

    def submit(
        self, number: int, step: PendingStep, seconds: dict[str, float], others: Mapping[str, PendingStep] | None = None
    ) -> None:
        """Hand over step `number`. `seconds`: its times, and the other measurements for its line in the ledger.
        `others`: the steps of the other models, by name."""
        assert self._unread is None, "the step before is read first"
        self._unread = number, {self._first: step, **(others or {})}, seconds

    def flush(self) -> bool:
        """Log the last step's result, if that is not done yet. Return whether a rank was asked to stop.

        Raises TrainingError if the run cannot go on after a skipped step, ConfigError if the ranks' rates differed.
        """
        if self._unread is None:
            return False
        (number, steps, seconds), self._unread = self._unread, None
        results = {name: steps[name].read() for name in self.updates}
        skipped = {name: result.verdict for name, result in results.items() if not result.applied}
        self._applied_before, self.applied = self.applied, self.applied + (not skipped)
        for name, result in results.items():
            self.updates[name] += result.applied
            self.skipped_in_a_row[name] = 0 if result.applied else self.skipped_in_a_row[name] + 1
        self.run_log.step(self._entry(number, results, seconds))
        for name, verdict in skipped.items():
            model = {"model": name} if len(results) > 1 else {}
            self.run_log.event("skipped", step=number, verdict=verdict, **model)
        for name, verdict in skipped.items():
            self._require_to_go_on(number, name, verdict)
        if not all(result.same_rates for result in results.values()):
            raise ConfigError(
                f"step {number}: its learning rate was not the same on all ranks, so their weights differ; let the "
                "rate (task.learning_rate, or what engine.step is given) depend on nothing that differs between ranks, "
                f"and resume from a checkpoint before step {number}"
            )
        return any(result.stop for result in results.values())

    def close(self) -> None:
        """Log the last step when the run ends for any reason, unless that would wait for a GPU."""
        if self._unread is not None and all(step.known for step in self._unread[1].values()):
            self.flush()

    def state(self) -> dict[str, int]:
        """Return the counters for a checkpoint's manifest."""
        return {
            "applied": self.applied,
            "applied_before": self._applied_before,
            "skipped_in_a_row": self.skipped_in_a_row[self._first],
        }

    def state_of(self, model: str) -> dict[str, int]:
        """Return the counters of a model for its part of a checkpoint's manifest."""
        return {"applied": self.updates[model], "skipped_in_a_row": self.skipped_in_a_row[model]}

    def load(self, manifest: dict[str, Any], parts: Mapping[str, dict[str, Any]] | None = None) -> None:
        """Continue from a checkpoint's manifest. `parts`: those of the models, if the run has several."""
        self.applied = manifest["applied"]
        self._applied_before = manifest.get("applied_before", self.applied - 1)  # older manifests lack this key
        for name in self.updates:
            own = manifest if parts is None else parts[name]
            self.updates[name], self.skipped_in_a_row[name] = own["applied"], own.get("skipped_in_a_row", 0)

    def summary(self, name: str, first_step: int, num_steps: int) -> dict[str, Any]:
        """Return the content of summary.json after `num_steps` steps. `first_step`: of this start."""
        samples = (num_steps - first_step) * self.plan.global_batch_size
        return {
            "name": name,
            "steps": num_steps,
            "skipped": num_steps - self.applied,
            "metrics": self.run_log.metrics,
            "samples_per_second": round(samples / max(self.run_log.train_seconds, 1e-9), 1),
            "wall_seconds": round(total_seconds(self.run_log.run), 3),
            "restarts": len(self.run_log.run.starts()) - 1,
            "world_size": self.plan.world_size,
            "strategy": self.strategy,
        }

    def _entry(self, number: int, results: dict[str, StepResult], seconds: dict[str, float]) -> dict[str, Any]:
        """Return the step's line of steps.jsonl. What other models than the first have is `train/NAME_…`."""
        first, *others = results
        result = results[first]
        verdicts = [each.verdict for each in results.values() if not each.applied]
        return {
            "step": number,
            "epoch": self.plan.epoch(number),
            "loss": result.loss,
            "lr": result.lr,
            "grad_norm": result.grad_norm,
            "count": result.count,
            "verdict": verdicts[0] if verdicts else APPLIED,
            "samples": f"{result.digest:016x}",
            **seconds,
            "world_size": self.plan.world_size,
            "strategy": self.strategy,
            **({} if result.loss_scale is None else {"loss_scale": result.loss_scale}),
            **_merged([result.own, *(_numbers_of(name, results[name]) for name in others)]),
        }

    def _require_to_go_on(self, number: int, model: str, verdict: str) -> None:
        """Raises TrainingError if the run cannot go on after a skipped step; messages number steps from 1."""
        of_model = f" of {model}" if len(self.updates) > 1 else ""
        if self.config.on_nonfinite == "stop" and "nonfinite" in verdict:
            raise TrainingError(
                f"step {number + 1}{of_model} was {verdict}, and train.on_nonfinite is stop; skip would go on"
            )
        in_a_row = self.skipped_in_a_row[model]
        if in_a_row >= self.config.max_skipped:
            first = number + 2 - in_a_row
            raise TrainingError(
                f"all steps{of_model} from {first} to {number + 1} were skipped, the last one as {verdict}, which is "
                f"as many in a row as train.max_skipped allows ({self.config.max_skipped}); the weights are those "
                f"after step {first - 1}. Look at the samples of step {first}, or train again with a lower optim.lr "
                "or with train.max_grad_norm; with a larger train.max_skipped the run goes on"
            )


def _numbers_of(name: str, result: StepResult) -> dict[str, float]:
    """Return what a line of the ledger has of a model that is not the first."""
    found = {"loss": result.loss, "grad_norm": result.grad_norm}
    if result.loss_scale is not None:
        found["loss_scale"] = result.loss_scale
    found |= {key.removeprefix("train/"): value for key, value in result.own.items()}
    return {f"train/{name}_{key}": value for key, value in found.items()}


def _merged(numbers: list[dict[str, float]]) -> dict[str, float]:
    """Merge the models' numbers. Raises ConfigError if two have the same name."""
    merged: dict[str, float] = {}
    for own in numbers:
        if taken := merged.keys() & own.keys():
            raise ConfigError(f"OwnLoop: {min(taken)} would be two numbers; rename a model, or a sum of its Loss")
        merged |= own
    return merged


def _copy_to_host(values: Any) -> Tensor:
    """Start a copy from a GPU into pinned memory; it is complete when an event recorded after it is."""
    return torch.empty_like(values, device="cpu", pin_memory=True).copy_(values, non_blocking=True)
