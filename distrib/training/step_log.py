"""The results of the steps: the ledger's lines, and the schedule's position."""

from typing import Any

from distrib.config import TrainConfig
from distrib.errors import TrainingError
from distrib.monitor.run_log import RunLog
from distrib.plan import RunPlan
from distrib.run_folder.earlier_starts import total_seconds
from distrib.training.pending_step import PendingStep, StepResult


class StepLog:
    """Logs each step one step late, the same on every rank. Call `submit` after a step, and `flush` before anything
    that needs its result: an evaluation, a save, the end."""

    def __init__(self, run_log: RunLog, plan: RunPlan, strategy: str, config: TrainConfig) -> None:
        self.run_log, self.plan, self.strategy, self.config = run_log, plan, strategy, config
        self.applied = 0  # updates, as far as is known
        self.skipped_in_a_row = 0  # steps up to the last one that was read
        self._applied_before = -1  # the last step of which that is known
        self._unread: tuple[int, PendingStep, dict[str, float]] | None = None

    @property
    def clock(self) -> int:
        """The number of updates made, which is the schedule's position. The last step is assumed applied even if its
        result is already known; otherwise the schedule would depend on when a run saves."""
        return (self._applied_before if self._unread is None else self.applied) + 1

    def submit(self, number: int, step: PendingStep, seconds: dict[str, float]) -> None:
        """`seconds`: where its time went, and what else a ledger's line says of it."""
        assert self._unread is None, "the step before is read first"
        self._unread = number, step, seconds

    def flush(self) -> bool:
        """Log the last step's result, if that is not done yet. Return whether a rank was asked to stop."""
        if self._unread is None:
            return False
        (number, step, seconds), self._unread = self._unread, None
        result = step.read()
        self._applied_before, self.applied = self.applied, self.applied + result.applied
        self.run_log.step(self._entry(number, result, seconds))
        self.skipped_in_a_row = 0 if result.applied else self.skipped_in_a_row + 1
        if not result.applied:
            self._skipped(number, result)
        return result.stop

    def close(self) -> None:
        """However the run ends: a step that was made before it failed is noted, where nobody has to be waited for."""
        if self._unread is not None and self._unread[1].known:
            self.flush()

    def state(self) -> dict[str, int]:
        """What a checkpoint's manifest keeps of it."""
        return {
            "applied": self.applied,
            "applied_before": self._applied_before,
            "skipped_in_a_row": self.skipped_in_a_row,
        }

    def load(self, manifest: dict[str, Any]) -> None:
        """Go on from it."""
        self.applied = manifest["applied"]
        self._applied_before = manifest.get("applied_before", self.applied - 1)  # older ones counted all they knew
        self.skipped_in_a_row = manifest.get("skipped_in_a_row", 0)

    def summary(self, name: str, first_step: int) -> dict[str, Any]:
        """The content of summary.json after the last step. `first_step`: of this start."""
        samples = (self.plan.num_steps - first_step) * self.plan.global_batch_size
        return {
            "name": name,
            "steps": self.plan.num_steps,
            "skipped": self.plan.num_steps - self.applied,
            "metrics": self.run_log.metrics,
            "samples_per_second": round(samples / max(self.run_log.train_seconds, 1e-9), 1),
            "wall_seconds": round(total_seconds(self.run_log.run), 3),
            "restarts": len(self.run_log.run.starts()) - 1,
            "world_size": self.plan.world_size,
            "strategy": self.strategy,
        }

    def _entry(self, number: int, result: StepResult, seconds: dict[str, float]) -> dict[str, Any]:
        """One line of steps.jsonl."""
        return {
            "step": number,
            "epoch": self.plan.epoch(number),
            "loss": result.loss,
            "lr": result.lr,
            "grad_norm": result.grad_norm,
            "count": result.count,
            "verdict": result.verdict,
            "samples": f"{result.digest:016x}",
            **seconds,
            "world_size": self.plan.world_size,
            "strategy": self.strategy,
            **({} if result.loss_scale is None else {"loss_scale": result.loss_scale}),
        }

    def _skipped(self, number: int, result: StepResult) -> None:
        """Log it. Raises TrainingError if the run cannot go on, with steps numbered from 1 as in all that is shown."""
        self.run_log.event("skipped", step=number, verdict=result.verdict)
        if self.config.on_nonfinite == "stop" and "nonfinite" in result.verdict:
            raise TrainingError(
                f"step {number + 1} was {result.verdict}, and train.on_nonfinite is stop; skip would go on"
            )
        if self.skipped_in_a_row >= self.config.max_skipped:
            first = number + 2 - self.skipped_in_a_row
            raise TrainingError(
                f"all steps from {first} to {number + 1} were skipped, the last one as {result.verdict}, which is as "
                f"many in a row as train.max_skipped allows ({self.config.max_skipped}); the weights are those after "
                f"step {first - 1}. Look at the samples of step {first}, or train again with a lower optim.lr or with "
                "train.max_grad_norm; with a larger train.max_skipped the run goes on"
            )
