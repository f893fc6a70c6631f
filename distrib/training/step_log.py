"""What came of the steps, each read when the next is on its way: the ledger's lines, and the schedule's clock."""

from typing import Any

from distrib.config import TrainConfig
from distrib.errors import TrainingError
from distrib.monitor.run_log import Record
from distrib.plan import RunPlan
from distrib.run_folder.earlier_starts import total_seconds
from distrib.training.pending_step import Step, StepResult


class Account:
    """Of one run, the same on every rank. `made` a step, then `read` what came of it, at the latest before what
    depends on it: an evaluation, a save, the end."""

    def __init__(self, record: Record, plan: RunPlan, strategy: str, config: TrainConfig) -> None:
        self.record, self.plan, self.strategy, self.config = record, plan, strategy, config
        self.applied = 0  # updates, as far as is known
        self.skipped_in_a_row = 0  # steps up to the last one that was read
        self._applied_before = -1  # the last step of which that is known
        self._unread: tuple[int, Step, dict[str, float]] | None = None

    @property
    def clock(self) -> int:
        """The updates made, which is the schedule's position. The last step counts as one: its verdict is not known
        yet. Where it is, as after a save, that makes no difference, or runs would differ by when they save."""
        return (self._applied_before if self._unread is None else self.applied) + 1

    def made(self, number: int, step: Step, seconds: dict[str, float]) -> None:
        """`seconds`: where its time went, and what else a ledger's line says of it."""
        assert self._unread is None, "the step before is read first"
        self._unread = number, step, seconds

    def read(self) -> bool:
        """Note what came of the last step, where that is not done; was someone asked to stop?"""
        if self._unread is None:
            return False
        (number, step, seconds), self._unread = self._unread, None
        result = step.read()
        self._applied_before, self.applied = self.applied, self.applied + result.applied
        self.record.step(self._entry(number, result, seconds))
        self.skipped_in_a_row = 0 if result.applied else self.skipped_in_a_row + 1
        if not result.applied:
            self._skipped(number, result)
        return result.stop

    def close(self) -> None:
        """However the run ends: a step that was made before it failed is noted, where nobody has to be waited for."""
        if self._unread is not None and self._unread[1].known:
            self.read()

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
            "metrics": self.record.metrics,
            "samples_per_second": round(samples / max(self.record.train_seconds, 1e-9), 1),
            "wall_seconds": round(total_seconds(self.record.run), 3),
            "restarts": len(self.record.run.starts()) - 1,
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
        self.record.event("skipped", step=number, verdict=result.verdict)
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
