"""What rank 0 shows while training: a bar on a terminal, a readable line now and then in a log file."""

import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

_SECONDS_BETWEEN_LINES = 10.0
_SECONDS_BETWEEN_DRAWS = 0.1  # a step may take less than a millisecond


class ProgressDisplay:
    """Draws on rank 0 only; on the other ranks (`shown=False`) it does nothing."""

    def __init__(self, name: str, num_steps: int, shown: bool) -> None:
        self.console = Console(quiet=not shown, highlight=False, soft_wrap=True)
        self.num_steps = num_steps
        self._started = self._drawn = time.perf_counter()
        self._steps = 0
        self._bar: Progress | None = None
        self._between = _SECONDS_BETWEEN_LINES
        if shown and self.console.is_terminal:
            self._between = _SECONDS_BETWEEN_DRAWS
            self._bar = Progress(
                TextColumn(name),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[state]}"),
                TimeRemainingColumn(),
                console=self.console,
            )
            self._task = self._bar.add_task(name, total=num_steps, state="")

    def step(self, step: int, epoch: int, loss: float, lr: float, samples: int) -> None:
        """Call after every step; `step` counts from 0, `samples` is the global batch size."""
        self._steps += 1
        now = time.perf_counter()
        if now - self._drawn < self._between and step + 1 < self.num_steps:
            return
        self._drawn = now
        rate = self._steps * samples / (now - self._started)
        state = f"epoch {epoch}  loss {loss:.4f}  lr {lr:.2e}  {rate:,.0f} samples/s"
        if self._bar is not None:
            self._bar.update(self._task, completed=step + 1, state=state)
        else:
            self.say(f"step {step + 1}/{self.num_steps}  {state}")

    def say(self, line: str) -> None:
        """A line that stays, above the bar if there is one."""
        self.console.print(line, markup=False)

    def __enter__(self) -> "ProgressDisplay":
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if self._bar is not None:
            self._bar.stop()


def format_metrics(metrics: dict[str, float]) -> str:
    """`eval/accuracy 0.9861  eval/loss 0.0532`"""
    return "  ".join(f"{key} {value:.4f}" for key, value in sorted(metrics.items()))
