"""The progress display: a bar on a terminal, a line now and then in a log file.

It is an observer. The process that trains calls it, or `distrib watch` with what it reads from the run folder.
"""

import time
from collections import deque
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal, TypeAlias

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.text import Text

from distrib.monitor.observer import Observer
from distrib.processes.output import keep_writable
from distrib.run_folder.ledger import or_nan

Verbosity: TypeAlias = Literal["quiet", "normal", "verbose"]
_SECONDS_BETWEEN_LINES = 10.0
_SECONDS_BETWEEN_DRAWS = 0.1  # a step may take less than a millisecond
_CHARACTERS_OF_NAME = 24
_STEPS_OF_RATE = 100  # the rate is the mean over this many last steps


class ProgressDisplay(Observer):
    """Shows a run. `verbosity`: quiet (only warnings), normal, or verbose (a line for each step, with its times)."""

    def __init__(self, verbosity: Verbosity = "normal") -> None:
        keep_writable()  # a user's script has not done so
        self.console = Console(highlight=False, soft_wrap=True)
        self.verbosity = verbosity
        self.num_steps, self.batch_size = 0, 0  # steps of the run; samples of a step, on all ranks
        self._seconds: deque[float] = deque(maxlen=_STEPS_OF_RATE)
        self._latest: dict[str, Any] | None = None  # the latest step, if it is not shown yet
        self._state_shown: list[str] = []  # the line below the bar
        self._status: dict[str, list[str]] = {}  # the last checkpoint, the last evaluation
        self._drawn = time.perf_counter()
        self._live: Live | None = None

    def on_start(self, start: dict[str, Any]) -> None:
        """Show a bar, if this is a terminal and there are steps to come."""
        name, self.num_steps, self.batch_size = start["name"], start["num_steps"], start["global_batch_size"]
        if self.verbosity == "normal" and self.console.is_terminal and start["step"] is not None:
            short = name if len(name) <= _CHARACTERS_OF_NAME else f"{name[: _CHARACTERS_OF_NAME - 1]}…"
            columns = (TextColumn(short, markup=False), BarColumn(), MofNCompleteColumn())
            self._bar = Progress(*columns, console=self.console)
            self._task = self._bar.add_task(name, total=self.num_steps)
            self._live = Live(console=self.console, get_renderable=self._render, refresh_per_second=4)
            self._live.start()

    def on_step(self, step: dict[str, Any]) -> None:
        """Show the step, if the last one was shown long enough ago."""
        done = step["step"] + 1
        self._seconds.append(step["seconds"])
        self._latest = step
        now = time.perf_counter()
        between = _SECONDS_BETWEEN_LINES if self._live is None else _SECONDS_BETWEEN_DRAWS
        if self.verbosity == "verbose":
            between = 0.0
        if self.verbosity == "quiet" or (now - self._drawn < between and done < self.num_steps):
            return
        self._drawn = now
        self.flush()

    def on_evaluation(self, evaluation: dict[str, Any]) -> None:
        """Show the metrics."""
        metrics, done = format_metrics(evaluation["metrics"]), evaluation["step"]
        self._status["evaluation"] = [f"evaluation step {done}:", *metrics.split("  ")]
        self.say(f"step {done}/{self.num_steps}  {metrics}  ({evaluation['count']} samples)")

    def on_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Show its step below the bar."""
        self._status["checkpoint"] = [f"checkpoint step {checkpoint['step']}"]

    def on_event(self, event: dict[str, Any]) -> None:
        """Show events that matter to a person."""
        kind, step = event["event"], event.get("step", 0)
        if kind == "warning":
            self.warn(event["reason"])
        elif kind == "resumed":
            for problem in event["passed_over"]:
                self.warn(f"passed over: {problem}")
            self.say(f"going on after step {step}")
        elif kind == "compiling":
            self.say(f"compiling ({event['what']}) while the first step runs")
        elif kind == "initialized":
            for line in event["lines"]:
                self.say(line)
        elif kind == "stopped":
            self.say(f"stopped after step {step}: {event['reason']}")
        elif kind == "skipped":
            whose = f" of {event['model']}" if "model" in event else ""
            self.say(f"step {step + 1} {event['verdict']}: the weights{whose} were left as they are")

    def on_end(self, end: dict[str, Any]) -> None:
        """Stop drawing; the bar stays as it is."""
        self.close()

    def close(self) -> None:
        """Stop drawing, if a bar is drawn."""
        if self._live is not None:
            self.flush()
            self._live.stop()
            self._live = None

    def flush(self) -> None:
        """Show the latest step, if it is not shown yet."""
        if self._latest is None:
            return
        done, state = self._latest["step"] + 1, self._state(self._latest)
        self._latest = None
        if self._live is not None:
            self._state_shown = state
            self._bar.update(self._task, completed=done)
        else:
            self.say("  ".join([f"step {done}/{self.num_steps}", *state]))

    def say(self, line: str) -> None:
        """Print a line, above the bar if there is one; nothing if quiet."""
        if self.verbosity != "quiet":
            self.console.print(line, markup=False)

    def warn(self, line: str) -> None:
        """Print a warning, also if quiet."""
        self.console.print(f"warning: {line}", markup=False)

    def _state(self, entry: dict[str, Any]) -> list[str]:
        loss, norm = or_nan(entry["loss"]), or_nan(entry["grad_norm"])
        mean = sum(self._seconds) / len(self._seconds)
        left = timedelta(seconds=min(round(mean * (self.num_steps - entry["step"] - 1)), 10**9))
        state = [
            *(f"epoch {entry['epoch']}", f"loss {loss:.4f}", f"lr {entry['lr']:.2e}"),
            f"{self.batch_size / mean:,.0f} samples/s",
        ]
        if self.verbosity == "verbose":
            parts = {"data": "data_seconds", "optimizer": "optimizer_seconds"}
            split = "  ".join(f"{name} {1000 * entry[key]:.1f}" for name, key in parts.items() if key in entry)
            return [*state, f"grad_norm {norm:.4f}", f"{1000 * entry['seconds']:.1f} ms ({split})"]
        return [*state, f"{left} left"]

    def _render(self) -> Group:
        status = [part for what in ("checkpoint", "evaluation") for part in self._status.get(what, ())]
        lines = {"": fitting(self._state_shown, self.console.width), "dim": fitting(status, self.console.width)}
        return Group(self._bar, *(Text(line, style=style, no_wrap=True) for style, line in lines.items() if line))


def fitting(parts: list[str], width: int) -> str:
    """Join as many whole parts as fit into `width` characters: a number that is cut would be another number."""
    line = ""
    for part in parts:
        longer = f"{line}  {part}" if line else part
        if len(longer) > width:
            break
        line = longer
    return line


def format_metrics(metrics: dict[str, Any]) -> str:
    """Return `eval/accuracy 0.9861  eval/loss 0.0532`; None, which means not finite, becomes nan."""
    return "  ".join(f"{key} {or_nan(value):.4f}" for key, value in sorted(metrics.items()))


def format_summary(path: Path, summary: dict[str, Any], what: str) -> str:
    """Return the last line of a run. `what`: finished, or a longer text."""
    best = summary.get("best")
    record = "" if best is None else f"best {best['metric']} {best['value']:.4f} after step {best['step']}  "
    return (
        f"{path} {what}: {format_metrics(summary['metrics'])}  {record}"
        f"({summary['steps']} steps on {summary['world_size']} process(es) in {summary['wall_seconds']:.1f} s)"
    )
