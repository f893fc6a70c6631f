"""The files of `Task.samples` as wandb and TensorBoard take them."""

import csv
import html
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from distrib.monitor.observer import ObserverWarning
from distrib.tracebacks import first_line


@contextmanager
def logged_apart(evaluation: dict[str, Any]) -> Iterator[None]:
    """Turn an error of the body into a warning, so that the tracker still gets the run's numbers."""
    try:
        yield
    except Exception as error:
        raise ObserverWarning(f"samples after step {evaluation['step']} are not logged: {first_line(error)}") from error


def add_to_tensorboard(writer: Any, name: str, path: Path, steps_done: int) -> None:
    """Add a file to what a SummaryWriter writes: an image, or a text."""
    if path.suffix == ".png":
        from matplotlib.image import imread

        writer.add_image(name, imread(path), steps_done, dataformats="HWC")
        return
    text = "".join(f"    {line}" for line in path.read_text("utf-8").splitlines(keepends=True))  # as it is
    writer.add_text(name, text, steps_done)


def media_of(path: Path) -> Any:
    """Return a file of the samples as what wandb shows."""
    import wandb

    if path.suffix == ".png":
        return wandb.Image(str(path))
    if path.suffix == ".csv":
        with path.open(encoding="utf-8", newline="") as file:
            columns, *rows = csv.reader(file)
        return wandb.Table(columns=list[str | int](columns), data=rows)
    return wandb.Html(f"<pre>{html.escape(path.read_text('utf-8'))}</pre>", inject=False)
