"""`distrib compare`: tables on the terminal, curves and tables in a page and a picture."""

import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from distrib.errors import ConfigError, RunDirError
from distrib.extras import require
from distrib.monitor.compare import page, tables
from distrib.monitor.compare.comparison import compare
from distrib.monitor.compare.runs import load_runs

_WIDTH_OF_A_FILE = 400  # characters, if the output is no terminal


def compare_runs(paths: Sequence[Path], out: Path, checkpoint: str = "newest") -> None:
    """Compare runs with the first; print tables, and write a page to `out` and a .png beside it.

    `checkpoint`: newest, best or a step, at which metrics and samples are shown.

    Raises RunDirError, ConfigError.
    """
    if out.suffix != ".html":
        raise ConfigError(f"--out {out}: the page is an .html file, for example {out.with_suffix('.html')}")
    require("compare", "distrib compare")
    comparison = compare(load_runs(paths, checkpoint))
    picture = out.with_suffix(".png")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        page.write_page(comparison, out)
        page.draw_curves(comparison, picture)
    except OSError as error:
        raise RunDirError(f"{out}: cannot be written: {error.strerror}") from None
    console = Console(highlight=False, width=None if sys.stdout.isatty() else _WIDTH_OF_A_FILE)
    for make in (tables.differences_in_short, tables.divergences, tables.figures):
        _print(console, make(comparison))
    for run in comparison.runs:
        for line in run.trouble:
            console.print(f"warning: {line}", markup=False, soft_wrap=True)
    console.print(f"{out} and {picture}", markup=False, soft_wrap=True)


def _print(console: Console, table: tables.Table) -> None:
    shown = Table(title=table.title, title_justify="left", title_style="bold", box=None, padding=(0, 2, 0, 0))
    for column in table.columns:
        shown.add_column(Text(column), overflow="fold")
    for row in table.rows:
        shown.add_row(*(Text(cell) for cell in row))
    if table.rows:
        console.print(shown)
        console.print(table.note, style="dim", markup=False, soft_wrap=True)
    else:
        console.print(f"{table.title}: none", style="bold", markup=False)
    console.print()
