"""The evaluations of a run: when they are due, and what follows from them."""

import time
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from functools import partial
from typing import Any

from torch.utils.data import Dataset

from distrib.config import Config
from distrib.monitor.run_log import RunLog
from distrib.plan import RunPlan
from distrib.run_folder import decisions
from distrib.run_folder.decisions import Evaluation
from distrib.run_folder.sample_files import write_samples
from distrib.task import Task
from distrib.tracebacks import first_line, place
from distrib.training import build, probe
from distrib.training.engine import Engine


class Evaluations:
    """Evaluates the task's sets, and knows all lines of evals.jsonl on every rank, so that all decide alike.

    `sets`: by name; one from `Task.eval_dataset` has the name "". Methods are collective.
    """

    def __init__(self, task: Task, sets: dict[str, Dataset[Any]], config: Config, plan: RunPlan, log: RunLog) -> None:
        self.task, self.sets, self.config, self.plan, self.log = task, sets, config, plan, log
        self.longest_seconds = 0.0
        own = {name: one.every_steps for name, one in config.eval.sets.items()}
        self._every_steps = dict.fromkeys(sets, config.eval.every_steps) | own
        # Whether to evaluate the average of the weights; each of these in turn.
        wanted = "model" if config.train.ema is None else config.eval.weights
        self._ema = {"model": (False,), "ema": (True,), "both": (False, True)}[wanted]
        self._lines: list[Evaluation] = []
        self.plateau_factor = 1.0  # of the learning rate, by `optim.plateau`

    def due(self, steps_done: int) -> list[str]:
        """Return the names of the sets that are evaluated after so many steps."""
        if steps_done == self.plan.num_steps:
            return list(self.sets)
        return [name for name in self.sets if (every := self._every_steps[name]) and steps_done % every == 0]

    def begin(self, engine: Engine, first_step: int) -> None:
        """Evaluate what a start that was killed after its save has not evaluated, and in a new run what `eval.at_start`
        asks for. If there is nothing to evaluate, try each set."""
        run = self.log.run
        self._lines, begins = self.log.world.on_rank_0(
            lambda: (decisions.read_evaluations(run), first_step == min(run.anchors()))
        )
        self.plateau_factor = decisions.plateau_factor(self._lines, self.config.optim.plateau)
        wanted = self.due(first_step) if not begins else list(self.sets) if self.config.eval.at_start else []
        if not self._evaluate_missing(engine, first_step, wanted) and first_step < self.plan.num_steps:
            found: list[str] | None = []
            for name, dataset in self.sets.items():
                keys = probe.trial_evaluation(engine, self.task, dataset, self.config, self.log, name)
                found = None if keys is None or found is None else [*found, *self._names(name, keys)]
            if found:
                decisions.require_metrics(self.config, found)

    def evaluate(self, engine: Engine, steps_done: int, names: Iterable[str]) -> None:
        """Evaluate these sets, and write a line of evals.jsonl. Raises ConfigError if a decision lacks its metric."""
        started, metrics = time.perf_counter(), dict[str, float]()
        names, files = list(names), list[str]()  # the latter: of samples, on rank 0
        for ema in self._ema:
            with engine.averaged() if ema else nullcontext():
                for name in names:
                    keep = partial(self._keep_samples, steps_done, ["ema", name] if ema else [name], files)
                    metrics.update(build.evaluate(engine, self.task, self.sets[name], self.config, name, ema, keep))
        count = sum(len(self.sets[name]) for name in names)  # type: ignore[arg-type, misc]
        seconds = time.perf_counter() - started
        self.longest_seconds = max(self.longest_seconds, seconds)
        self.log.evaluation(steps_done, count, metrics, seconds, files)
        self._lines.append({"step": steps_done, "metrics": metrics})
        self.plateau_factor = decisions.plateau_factor(self._lines, self.config.optim.plateau)
        if len(self._sets_of(self._lines[-1])) == len(self.sets):
            decisions.require_metrics(self.config, metrics)

    def _keep_samples(
        self, steps_done: int, folder: list[str], written: list[str], make: Callable[[], dict[str, bytes]]
    ) -> None:
        """Write the files of samples, and add their paths in the run folder to `written`. Raises WriteError.

        If the task fails to make them, the run logs a warning and goes on: nothing follows from them.
        """
        try:
            files = make()
        except Exception as error:
            reason = f"{first_line(error)}{place(error)}"
            self.log.warn(f"task.samples failed after step {steps_done}, and nothing of it is written: {reason}")
            return
        if files:
            written += write_samples(self.log.run.samples, steps_done, "/".join(folder), files)

    def end(self, engine: Engine, steps_done: int) -> None:
        """Evaluate the sets that were not due at the step after which the run stops."""
        self._evaluate_missing(engine, steps_done, list(self.sets))

    def _evaluate_missing(self, engine: Engine, steps_done: int, names: list[str]) -> bool:
        """Evaluate those of the sets that have no line at this step yet. Return whether there were some."""
        done = {name for line in self._lines if line["step"] == steps_done for name in self._sets_of(line)}
        missing = [name for name in names if name not in done]
        if missing:
            self.evaluate(engine, steps_done, missing)
        return bool(missing)

    @property
    def stopped(self) -> dict[str, Any] | None:
        """The details of the `stopped` event, if the run stops after the evaluations so far."""
        return decisions.stopped(self._lines, self.config.train.stop)

    @property
    def best_steps(self) -> list[int]:
        """The steps of the best evaluations, whose checkpoints are kept; the last is the best."""
        best = self.config.checkpoint.best
        return [] if best is None else [step for step, _ in decisions.records(self._lines, best)][-best.keep :]

    def summary(self) -> dict[str, Any]:
        """Return what summary.json says about decisions."""
        best, stopped = decisions.best(self._lines, self.config), self.stopped
        return {
            **({} if best is None else {"best": best}),
            **({} if stopped is None else {"stopped": stopped["reason"]}),
        }

    def _sets_of(self, line: Evaluation) -> list[str]:
        """Return the names of the sets that were evaluated for a line of evals.jsonl."""
        return [name for name in self.sets if not line["metrics"].keys().isdisjoint(self._names(name, ["loss"]))]

    def _names(self, name: str, keys: Iterable[str]) -> list[str]:
        """Return the names in evals.jsonl of these metrics of a set."""
        return [build.metric_name(name, key, ema) for ema in self._ema for key in keys]
