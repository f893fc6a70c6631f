"""What a run reports while it trains: to its folder, to its observers (the display is one), and to the trackers."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

from distrib.config import Config
from distrib.errors import DistribError, Preempted, WriteError
from distrib.monitor.alerts import Alerts
from distrib.monitor.observer import METHODS, Notifier, Observer
from distrib.monitor.progress import ProgressDisplay, Verbosity
from distrib.monitor.trackers.process import TrackingProcess
from distrib.monitor.trackers.trackers import WARNING
from distrib.plan import RunPlan
from distrib.processes import output
from distrib.processes.failures import lost_to_others
from distrib.processes.lifetimes import ignore_sigterm
from distrib.processes.world import World
from distrib.run_folder.folder import RunDir
from distrib.run_folder.identity import notes
from distrib.run_folder.ledger import Ledger, now, train_metrics
from distrib.run_folder.resume import ResumePoint


class RunLog:
    """Call it alike on all ranks; it writes and prints on rank 0 alone."""

    def __init__(
        self,
        run: RunDir,
        world: World,
        config: Config,
        plan: RunPlan,
        observers: Sequence[Observer] = (),
        verbosity: Verbosity = "normal",
    ) -> None:
        self.run, self.world, self.config, self.plan = run, world, config, plan
        self.display = ProgressDisplay(verbosity)
        self.metrics: dict[str, float] = {}  # the latest of each
        self.train_seconds = 0.0
        self.steps_done = 0
        self._ledger: Ledger | None = None  # on rank 0, from the first step on
        self._tracking: TrackingProcess | None = None
        alerts = [Alerts(config.alerts)] if config.alerts is not None and world.is_rank_0 else []
        self._notifier = Notifier([self.display, *alerts], observers)
        self._has_observers = bool(alerts or observers)
        self._before_start: list[tuple[str, dict[str, Any]]] | None = []  # lines that observers get after on_start
        self._end: dict[str, Any] | None = None  # the last event

    @property
    def chain(self) -> str:
        """The ledger's chain after the last step, on rank 0; empty on other ranks."""
        return "" if self._ledger is None else self._ledger.chain

    def state(self) -> dict[str, Any]:
        """Return rank 0's part of a checkpoint's manifest: the ledger's chain, and the texts of the small files."""
        return {"chain": self.chain, "run": self.run.to_save()} if self.world.is_rank_0 else {}

    @contextmanager
    def open(self, chain: str, first_step: int) -> Iterator[None]:
        """Log steps within, from `first_step` on, in a ledger that ends with `chain`. Collective."""
        self._tracking = TrackingProcess(self.run, self.config.tracking, self.world, self._start(first_step))
        if not self.world.is_rank_0:
            yield
            return
        with Ledger(self.run.steps, chain) as self._ledger:
            self._start_observers(first_step)
            yield

    def step(self, entry: dict[str, Any]) -> None:
        """Append a line to steps.jsonl, and pass it to the observers."""
        self.steps_done = entry["step"] + 1
        self.train_seconds += entry["seconds"]
        self.metrics.update(train_metrics(entry))
        if self._ledger is not None:
            self._ledger.append(entry)
            self._notify("step", {**entry, "chain": self._ledger.chain})
            self._show_tracking()
            self._report_output()

    def evaluation(
        self, step: int, count: int, metrics: dict[str, float], seconds: float, samples: Sequence[str] = ()
    ) -> None:
        """Append the evaluation of `count` samples after `step` steps to evals.jsonl, and pass it to the observers.

        `samples`: paths in the run folder of what is to be looked at."""
        self.metrics.update(metrics)
        if self.world.is_rank_0:
            entry = {"step": step, "count": count, "metrics": metrics, "seconds": round(seconds, 6)}
            entry |= {"samples": list(samples)} if samples else {}
            self._notify("evaluation", self.run.evaluation(entry))
            self._report_output()

    def event(self, name: str, **details: Any) -> None:
        """Append a line to events.jsonl, and pass it to the observers."""
        if self.world.is_rank_0:
            self._notify(name, self.run.event(name, **details))

    def finish(self, summary: dict[str, Any]) -> None:
        """Write summary.json and the run's last event. Raises WriteError."""
        self._end = {**self.run.finish(summary), "summary": summary}

    def warn(self, reason: str) -> None:
        """Log a warning event."""
        self.event("warning", reason=reason)

    def trouble(self, finished: bool = False) -> None:
        """Log a warning for each damage found in the run folder. If the run had `finished`, only print it."""
        for reason in self.run.take_trouble():
            if finished:
                self.display.warn(reason)
            else:
                self.warn(reason)

    def rewind(self, found: ResumePoint | None, first_step: int) -> None:
        """Remove what the run folder has after the step that the run resumes from, and log that. `found`: its
        checkpoint, if there is one. Call it on rank 0."""
        if found is not None and found.ours:
            lost = self.run.rewind(first_step, found.manifest, found.led)
        else:
            lost = self.run.rewind(first_step)
        self.trouble()
        if found is not None or lost:
            self.event("resumed", step=first_step, passed_over=[] if found is None else found.passed_over)
            self.metrics = self.run.latest_metrics()
        for reason in notes(self.run.read_environment()):
            self.warn(reason)

    def draw_curves(self) -> None:
        """Write curves.png. If that fails, log a warning: the curves can be drawn again from the other files."""
        from distrib.monitor.curves import draw_curves  # importing matplotlib is slow

        try:
            draw_curves(self.run)
        except Exception as error:  # matplotlib has many ways to fail
            reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
            self.warn(f"{self.run.curves}: not drawn: {type(error).__name__}: {reason}")
        self.trouble()

    def say(self, line: str) -> None:
        """Print a line on rank 0, unless the run is quiet."""
        if self.world.is_rank_0:
            self.display.say(line)

    def close(self, ending: str) -> None:
        """Call observers' on_end after the last event, named `ending`, and wait until the trackers have it too."""
        if ending == "failed" and (self._has_observers or self._tracking is not None):
            self._outlast_launcher()
        if self.world.is_rank_0 and self._end is not None:
            self._start_observers(None)
            self._notifier.notify(ending, self._end, self._warn_after_end)
        if self._tracking is not None:
            self._tracking.finish(ending)
            self._show_tracking(ended=True)

    @contextmanager
    def failures(self) -> Iterator[None]:
        """Log an exception that ends the run as its `failed` event, and raise it again."""
        try:
            yield
        except BaseException as error:
            self.display.close()  # what follows may take some seconds, or be ended by a launcher
            if not isinstance(error, Preempted):
                why = self._lost_to_others(error) or f"{type(error).__name__}: {error}"
                failed = {"step": self.steps_done, "error": why}
                self._end = {"event": "failed", "time": now(), **failed, "summary": None}
                with suppress(WriteError):  # the folder may be why it failed
                    self.event("failed", **failed)
                self.close("failed")
            raise

    def _start(self, first_step: int | None) -> dict[str, Any]:
        """Return what observers' on_start gets."""
        return {
            **self.run.started,
            "step": first_step,
            "num_steps": self.plan.num_steps,
            "global_batch_size": self.plan.global_batch_size,
            "name": self.config.name,
            "run_dir": str(self.run.path.absolute()),
        }

    def _start_observers(self, first_step: int | None) -> None:
        """Call on_start, then pass on the lines that were written before. Does nothing the second time."""
        if self._before_start is None:
            return
        waiting, self._before_start = self._before_start, None
        problems: list[str] = []  # logged after the lines that wait
        self._notifier.notify("started", self._start(first_step), problems.append)
        for kind, line in waiting:
            self._notify(kind, line)
        for problem in problems:
            self.warn(problem)

    def _notify(self, kind: str, line: dict[str, Any]) -> None:
        if METHODS.get(kind) == "on_end":
            self._end = {**line, "summary": None}  # `close` passes it on
        elif self._before_start is not None:
            self._before_start.append((kind, line))
        else:
            self._notifier.notify(kind, line, self.warn)

    def _warn_after_end(self, reason: str) -> None:
        """Log and print a warning after on_end, when observers are called no more."""
        with suppress(WriteError):
            self.run.event("warning", reason=reason)
        self.display.warn(reason)

    def _show_tracking(self, ended: bool = False) -> None:
        """Show what the tracking process has printed. If the run has `ended`, its folder gets no more events."""
        while self._tracking is not None and self._tracking.lines and self.world.is_rank_0:
            line = self._tracking.lines.popleft()
            if not line.startswith(WARNING):
                self.display.say(line)
            elif ended:
                self.display.warn(line.removeprefix(WARNING))
            else:
                self.warn(line.removeprefix(WARNING))

    def _report_output(self) -> None:
        """Log a warning for each standard stream that can no longer be written."""
        while output.problems:
            self.warn(f"{output.problems.pop(0)}; what is printed is lost, the run goes on")

    def _outlast_launcher(self) -> None:
        """Ignore SIGTERM from now on: when one rank has failed, a launcher ends the others, and this one has yet to
        report why.

        Without a launcher SIGTERM keeps its meaning, because processes that this one starts would inherit that it is
        ignored, and nothing else may end them.
        """
        if self.world.launcher != "plain":
            ignore_sigterm()

    def _lost_to_others(self, error: BaseException) -> str | None:
        """Return which rank's end made rank 0 fail, if it did: a collective's own error has only addresses."""
        if not self.world.is_rank_0 or isinstance(error, DistribError) or not isinstance(error, Exception):
            return None
        self._outlast_launcher()
        why, _ = lost_to_others(error)
        return why and f"rank 0 stopped{why}"
