"""`distrib watch`: shows a run as its own display does, from its folder."""

import math
import os
import time
from contextlib import closing
from pathlib import Path
from typing import Any

from distrib.config import Config
from distrib.errors import ConfigError, DamagedFileError
from distrib.monitor.observer import pass_on
from distrib.monitor.progress import ProgressDisplay, format_metrics, format_summary
from distrib.monitor.run_tail import RunTail
from distrib.plan import RunPlan
from distrib.run_folder import decisions
from distrib.run_folder.folder import RunDir
from distrib.run_folder.formats import STEP
from distrib.run_folder.ledger import last_line

_SECONDS_BETWEEN_LOOKS = 0.2
_SECONDS_TO_COME_BACK = 30.0  # a run that was being trained a moment ago may just be started again


class _Choice:
    """The checkpoint that `--checkpoint` names, as it is chosen from what the run has written so far."""

    def __init__(self, run: RunDir, config: Config, which: str, num_steps: int) -> None:
        """Raises ConfigError if the run can have no such checkpoint."""
        self._config, self._which = config, which
        if which == "best":
            decisions.require_criterion(run, config)
        elif which != "newest" and int(decisions.chosen_step(run, which) or 0) > num_steps:
            raise ConfigError(f"--checkpoint {which}: {run.path} has {num_steps} steps; give one of them")
        self._evaluations: list[decisions.Evaluation] = []
        self._saved: int | None = None  # the steps done at the newest checkpoint
        self._done = 0

    def evaluated(self, evaluation: decisions.Evaluation) -> None:
        """Take a line of evals.jsonl. A run that was resumed makes some evaluations again."""
        self._done = step = evaluation["step"]
        self._evaluations = [*(each for each in self._evaluations if each["step"] < step), evaluation]

    def saved(self, step: int) -> None:
        """Take the step of a checkpoint."""
        self._done = self._saved = step

    def shown(self) -> list[str]:
        """Return the parts of a line: its step, and each metric as it was last evaluated up to there. Empty if there is
        no such checkpoint yet."""
        if self._which == "best":
            best = decisions.best(self._evaluations, self._config)
            step = None if best is None else best["step"]
        elif self._which == "newest":
            step = self._saved
        else:
            step = int(self._which) if int(self._which) <= self._done else None
        if step is None:
            return []
        metrics: dict[str, Any] = {}
        for evaluation in self._evaluations:
            if evaluation["step"] <= step:
                metrics |= evaluation["metrics"]
        named = f"checkpoint {self._which}: step {step}" if self._which in ("best", "newest") else f"checkpoint {step}:"
        return [named, *(format_metrics(metrics).split("  ") if metrics else ["not evaluated"])]


class _Display(ProgressDisplay):
    """The display of a run that may have several starts: shows each start and end, and the chosen checkpoint, too."""

    def __init__(self, run: RunDir, config: Config, checkpoint: str | None) -> None:
        num_steps, batch_size = _length(run, config)
        self._choice = None if checkpoint is None else _Choice(run, config, checkpoint, num_steps)
        self.chosen: list[str] = []  # as it is shown
        super().__init__()
        super().on_start({"step": 0, "name": config.name, "num_steps": num_steps, "global_batch_size": batch_size})

    def on_evaluation(self, evaluation: dict[str, Any]) -> None:
        super().on_evaluation(evaluation)
        if self._choice is not None:
            self._choice.evaluated(evaluation)
            self._show_chosen()

    def on_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_checkpoint(checkpoint)
        if self._choice is not None:
            self._choice.saved(checkpoint["step"])
            self._show_chosen()

    def _show_chosen(self) -> None:
        """Show the chosen checkpoint below the bar, in place of the newest; without a bar print it if it is another."""
        before, self.chosen = self.chosen, self._choice.shown() if self._choice is not None else []
        if self.chosen:
            self._status["checkpoint"] = self.chosen
        if self._live is None and self.chosen and self.chosen != before:
            self.say("  ".join(self.chosen))

    def on_start(self, start: dict[str, Any]) -> None:
        self.say(f"started on {start['world_size']} process(es), {start['strategy']}, by {start['launcher']}")

    def on_end(self, end: dict[str, Any]) -> None:
        if end["event"] == "preempted":
            self.say(f"asked to stop; saved after step {end['step']}")
        elif end["event"] == "failed":
            self.say(f"failed: {end['error']}")


def watch_run(path: Path, checkpoint: str | None = None) -> None:
    """Show a run until it is finished or no process trains it. A run that waits in a queue is waited for.

    `checkpoint`: newest, best or a step, whose metrics are shown too. Raises RunDirError, ConfigError.
    """
    run = RunDir(path)
    config = run.read_config()
    if not _is_there(run):
        print(f"{path} has not begun yet", flush=True)
    while not _is_there(run):
        time.sleep(_SECONDS_BETWEEN_LOOKS)
    display, follower = _Display(run, config, checkpoint), RunTail(run)
    in_queue, held_at = False, -math.inf
    with closing(display):
        while in_queue or time.monotonic() - held_at < _SECONDS_TO_COME_BACK or held_at < 0:
            if run.held():
                held_at = time.monotonic()
            finished = os.path.lexists(run.summary)
            for kind, entry in follower.entries():
                pass_on(display, kind, entry)
                if kind != "warning":  # a warning may follow the last event
                    in_queue = kind == "preempted" and entry.get("requeue", False)
            if finished or (held_at < 0 and not in_queue):
                break
            time.sleep(_SECONDS_BETWEEN_LOOKS)
        for kind, entry in follower.rest():
            pass_on(display, kind, entry)
        display.flush()
    if checkpoint is not None and not display.chosen:
        print(f"checkpoint {checkpoint}: there is none")
    summary = None
    try:
        summary = run.read_summary()
    except DamagedFileError as error:
        run.report(str(error))
    for line in [*run.take_trouble(), *follower.trouble()]:
        print(f"warning: {line}")
    if summary is not None:
        print(format_summary(path, summary, "finished"))
    else:
        print(f"{path}: nobody trains it now, as far as can be seen from here; start it again to go on")


def _is_there(run: RunDir) -> bool:
    """Return whether the run was started: environment.json is there or, if that is lost, a step or a checkpoint."""
    return os.path.lexists(run.environment) or run.has_begun()


def _length(run: RunDir, config: Config) -> tuple[int, int]:
    """Return the steps of the run and the samples of a step."""
    environment = run.environment_or_nothing()
    if environment:
        plan = RunPlan.create(config, environment["starts"][-1]["world_size"], environment["training_samples"])
        return plan.num_steps, plan.global_batch_size
    last = last_line(run.steps, STEP)  # the number of training samples is lost
    return config.train.steps or (last["step"] + 1 if last else 0), config.data.global_batch_size
