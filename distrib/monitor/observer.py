"""`Observer`, the base class of what looks on at a run, and `Notifier`, which calls observers.

Examples: a message at each evaluation, a line in a file, a call of a webhook; the progress display; the trackers.
"""

import traceback
from collections.abc import Callable, Sequence
from typing import Any

from distrib.errors import TrainingError
from distrib.run_folder.ledger import finite
from distrib.tracebacks import first_line, place

METHODS = {  # by the kind of a line: `step`, `evaluation`, or an event's name; other events go to `on_event`
    "started": "on_start",
    "step": "on_step",
    "evaluation": "on_evaluation",
    "checkpoint": "on_checkpoint",
    "finished": "on_end",
    "failed": "on_end",
    "preempted": "on_end",
}


class Observer:
    """Looks on at a run. Derive a class, override what you need, and name it in the config's `observers`.

    Each line that the run writes into its folder goes to one of these methods, as a copy, after the line is written.
    `on_start` comes first, `on_end` last. The fields are those of docs/run-folder.md; a number that is not finite is
    None. Rank 0 alone makes and calls observers, in the process that trains: training waits for each call. If a method
    raises an exception, the run logs a warning and calls the observer no more. The random numbers that a method draws
    with Python's `random`, numpy or torch do not change the run.
    """

    def on_start(self, start: dict[str, Any]) -> None:
        """The first step is next.

        `start`: `event` (started), `time`, `world_size`, `strategy` and `launcher`, as in events.jsonl; also `step`
        (steps that earlier starts made, 0 in a new run; None if this start fails before it is known), `num_steps`,
        `global_batch_size`, `name`, and `run_dir` (the run folder's path).
        """

    def on_step(self, step: dict[str, Any]) -> None:
        """A line of steps.jsonl. It is written when the next step is made, or before an evaluation, a save or the end.

        `step`: `step` (from 0), `epoch`, `loss`, `lr`, `grad_norm`, `count`, `verdict`, `samples`, `seconds`,
        `data_seconds`, `optimizer_seconds`, `world_size`, `strategy`, `chain`; now and then `peak_memory` and
        `communication_seconds`, `loss_scale` in fp16, and the task's own numbers as `train/…`.
        """

    def on_evaluation(self, evaluation: dict[str, Any]) -> None:
        """A line of evals.jsonl.

        `evaluation`: `step` (steps done before it), `count` (samples), `metrics` (by name: `eval/loss` and the task's),
        `seconds`.
        """

    def on_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """A checkpoint is complete: `run_dir`/checkpoints/step-NNNNNNNN.

        `checkpoint`: `event` (checkpoint), `time`, `step` (steps done), `seconds`, `stall` (seconds that training
        waited).
        """

    def on_event(self, event: dict[str, Any]) -> None:
        """Any other line of events.jsonl; those that are written before the first step follow `on_start`.

        `event`: `event`, `time`, and for resumed `step` and `passed_over`, for compiling `what`, for initialized
        `lines`, for warning `reason`, for skipped `step`, `verdict`, and `model` in a loop of one's own with several
        models, for stopped (early, by `train.stop`) `step`, `metric`, `reason`, `best_step` and `best_value`.
        """

    def on_end(self, end: dict[str, Any]) -> None:
        """This start of the run has ended.

        `end`: `event`, `time`, and for finished `step`, for preempted (asked to stop, and saved) `step` and `requeue`,
        for failed `step` (steps done) and `error`; also `summary`, which is the content of summary.json if the run
        finished, else None.
        """


class ObserverWarning(Exception):  # noqa: N818, it ends nothing
    """Raised by a method of an observer: the run logs the text as a warning, and still calls the observer."""


def pass_on(observer: Observer, kind: str, line: dict[str, Any]) -> None:
    """Call the method for a line of this kind: `step`, `evaluation`, or the event's name."""
    getattr(observer, METHODS.get(kind, "on_event"))(line)


class Notifier:
    """Passes each line to every observer. One that raises an exception is called no more."""

    def __init__(self, ours: Sequence[Observer], users: Sequence[Observer] = ()) -> None:
        """`ours` come first and draw no random numbers; `users` may, and the generators are put back after each
        call."""
        self._observers = [*((one, False) for one in ours), *((one, True) for one in users)]

    def notify(self, kind: str, line: dict[str, Any], warn: Callable[[str], None]) -> None:
        """Pass a copy of the line to each, then call `warn` for each that failed.

        Raises TrainingError if one calls sys.exit before the run has ended. KeyboardInterrupt is raised on.
        """
        method, problems = METHODS.get(kind, "on_event"), []
        try:
            for observer, may_draw in self._observers:
                if getattr(type(observer), method) is getattr(Observer, method):
                    continue  # it does nothing
                try:
                    _call(observer, kind, finite(line), may_draw)
                except ObserverWarning as warning:
                    problems.append(str(warning))
                except (Exception, SystemExit) as error:
                    self._observers = [one for one in self._observers if one[0] is not observer]
                    name = f"{type(observer).__module__}:{type(observer).__qualname__}"
                    what = f"{first_line(error)}{_line(error)}"
                    if isinstance(error, SystemExit) and method != "on_end":
                        raise TrainingError(
                            f"observer {name} asked to exit in {method}: {what}; an observer cannot end a run, take "
                            "sys.exit out of it"
                        ) from error
                    problems.append(f"observer {name} failed in {method} and is called no more: {what}")
        finally:
            for problem in problems:
                warn(problem)


def _call(observer: Observer, kind: str, line: dict[str, Any], may_draw: bool) -> None:
    if not may_draw:
        pass_on(observer, kind, line)
        return
    from distrib.data.seeding import random_state_kept  # imports torch, which the tracking process does without

    with random_state_kept():
        pass_on(observer, kind, line)


def _line(error: BaseException) -> str:
    """` at FILE:LINE`, the user's own if there is one in the traceback."""
    last = traceback.extract_tb(error.__traceback__)[-1]
    return place(error) or f" at {last.filename}:{last.lineno}"
