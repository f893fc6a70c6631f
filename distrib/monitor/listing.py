"""`distrib ls`: the runs in a folder as a table. Reads the ends of large files only, and imports no torch."""

import math
import os
import time
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from distrib.config import Config
from distrib.config_yaml import one_line
from distrib.errors import CommandLineError, DistribError, RunDirError, did_you_mean
from distrib.monitor.progress import format_metrics
from distrib.plan import RunPlan
from distrib.run_folder.files import read_lines
from distrib.run_folder.folder import RunDir
from distrib.run_folder.formats import EVALUATION, EVENT, STEP
from distrib.run_folder.ledger import last_line, to_json
from distrib.run_folder.manifest import step_of, steps_of

_FILES = ("config.yaml", "environment.json", "steps.jsonl", "evals.jsonl", "events.jsonl", "summary.json")
_KEYS = ("age", "name", "state", "step", "steps", "samples_per_second", "strategy")  # to sort by, beside metrics
_WIDEST = 10_000  # characters of a line
_NOT_AN_END = {"warning"}  # events that may follow a run's last

Row = dict[str, Any]


def list_runs(folder: Path, sort: str, as_json: bool) -> None:
    """Print a row for each run in the folder, and in the folders in it. Raises RunDirError, CommandLineError."""
    rows = sort_rows([row(RunDir(path), _name(path, folder)) for path in run_folders(folder)], sort)
    if as_json:
        print("[" + ",\n".join(to_json(row, indent=2) for row in rows) + "]")
    elif not rows:
        print(f"{folder}: no runs")
    else:
        _print(rows)


def run_folders(folder: Path) -> list[Path]:
    """Return the folder itself if it is a run's, else the runs in it and in its folders, as a sweep has them.

    Raises RunDirError if the folder cannot be read.
    """
    if _is_run(folder):
        return [folder]
    try:
        inner = _folders(folder)
    except OSError as error:
        raise RunDirError(one_line(f"{folder}: cannot be listed: {error.strerror}; give a folder of runs")) from None
    found = []
    for path in inner:
        if _is_run(path):
            found.append(path)
            continue
        try:
            found += [run for run in _folders(path) if _is_run(run)]
        except OSError:
            found.append(path)  # its row says why
    return found


def row(run: RunDir, name: str) -> Row:
    """Return what is known of a run. `problem`: what cannot be read, else None. Raises nothing."""
    known: Row = {
        "name": name,
        "path": str(run.path),
        "state": "damaged",
        "step": None,
        "steps": None,
        "last_activity": None,
        "metrics": {},
        "best": None,
        "samples_per_second": None,
        "strategy": None,
        "world_size": None,
        "problem": None,
    }
    try:
        os.listdir(run.path)
        known["last_activity"] = _last_activity(run)
        _fill(run, known)
    except (DistribError, OSError, ValueError, OverflowError) as error:
        run.report(str(error))
    if trouble := run.take_trouble():
        known["problem"] = one_line("; ".join(trouble))
    return known


def sort_rows(rows: Sequence[Row], key: str) -> list[Row]:
    """Return the rows by a key of theirs, or by a metric; those without it come last. Raises CommandLineError."""
    metrics = sorted({metric for row in rows for metric in row["metrics"]})
    if key not in (*_KEYS, *metrics):
        known = [*_KEYS, *metrics]
        hint = did_you_mean(key, known)
        raise CommandLineError(one_line(f"--sort: {key!r}: no such column{hint or '; give ' + ', '.join(known)}"))
    newest_first = sorted(rows, key=lambda row: row["last_activity"] or "", reverse=True)
    if key == "age":
        return newest_first

    def value(row: Row) -> Any:
        found = row[key] if key in _KEYS else row["metrics"].get(key)
        return None if isinstance(found, float) and not math.isfinite(found) else found

    return [
        *sorted((row for row in newest_first if value(row) is not None), key=value),
        *(row for row in newest_first if value(row) is None),
    ]


def _fill(run: RunDir, known: Row) -> None:
    """Fill in what the files say; what is read before a damaged file stays. Raises DistribError, OSError."""
    step = last_line(run.steps, STEP)
    known["step"] = step["step"] + 1 if step else next((step_of(path) for path in steps_of(run.checkpoints)), 0)
    known["metrics"] = run.latest_metrics()
    config = run.read_config()
    known["steps"], known["strategy"] = config.train.steps, config.strategy.name
    known["best"] = _best(run, config)
    if step is not None:
        known["strategy"] = str(step.get("strategy", known["strategy"]))
        known["world_size"] = step.get("world_size")
        if step["seconds"]:
            known["samples_per_second"] = round(config.data.global_batch_size / step["seconds"], 1)
    summary = run.read_summary()
    if summary is not None:
        known["state"] = "stopped early" if "stopped" in summary else "finished"
        known |= {"step": summary["steps"], "metrics": summary["metrics"], "world_size": summary["world_size"]}
        if isinstance(speed := summary.get("samples_per_second"), int | float):
            known["samples_per_second"] = speed
        known["best"] = summary.get("best", known["best"])
    else:
        known["state"] = _state(run)
    if environment := run.environment_or_nothing() if known["state"] != "not begun" else {}:
        world_size = environment["starts"][-1]["world_size"]
        known["steps"] = RunPlan.create(config, world_size, environment["training_samples"]).num_steps


def _state(run: RunDir) -> str:
    """The state of a run that has no summary."""
    if run.held():
        return "training now"
    if not os.path.lexists(run.environment) and not run.has_begun():
        return "not begun"
    last = last_line(run.events, EVENT, lambda event: event["event"] not in _NOT_AN_END)
    if last is not None and last["event"] == "failed":
        return "failed"
    if last is not None and last["event"] == "preempted" and last.get("requeue", False):
        return "in queue"
    return "interrupted"


def _best(run: RunDir, config: Config) -> Row | None:
    """The best evaluation by the metric that the config names, else by the loss."""
    by = config.checkpoint.best or config.train.stop
    metric, mode = (by.metric, by.mode) if by is not None else ("eval/loss", "min")
    found: Row | None = None
    for evaluation in read_lines(run.evals, EVALUATION, run.trouble):
        value = evaluation["metrics"].get(metric)
        if value is None or not math.isfinite(value):
            continue
        if found is None or (value < found["value"] if mode == "min" else value > found["value"]):
            found = {"metric": metric, "mode": mode, "value": value, "step": evaluation["step"]}
    return found


def _last_activity(run: RunDir) -> str | None:
    """When a file of the run was last written, in UTC."""
    times = [path.stat().st_mtime for name in _FILES if (path := run.path / name).exists()]
    return datetime.fromtimestamp(max(times), timezone.utc).isoformat(timespec="seconds") if times else None


def _print(rows: Sequence[Row]) -> None:
    table = Table(box=None, pad_edge=False)
    for heading in ("run", "state", "step", "age", "metrics", "best", "samples/s", "strategy"):
        table.add_column(heading, justify="right" if heading in ("step", "age", "samples/s") else "left", no_wrap=True)
    for row in rows:
        best, speed, step = row["best"], row["samples_per_second"], row["step"]
        cells = (
            row["name"],
            row["state"],
            "" if step is None else f"{step} of {row['steps']}" if row["steps"] else f"{step}",
            _age(row["last_activity"]),
            format_metrics(_main_metrics(row)),
            "" if best is None else f"{best['metric']} {best['value']:.4f} @{best['step']}",
            "" if speed is None else f"{speed:,.0f}",
            row["strategy"] or "",
        )
        table.add_row(*(Text(one_line(cell)) for cell in cells))
    console = Console(highlight=False, soft_wrap=True)
    whole = console.measure(table, options=console.options.update(max_width=_WIDEST)).maximum
    console.width = max(console.width, whole)  # a number that is cut would be another number
    console.print(table)
    for row in rows:
        if row["problem"]:
            print(f"warning: {row['problem']}")


def _main_metrics(row: Row) -> dict[str, Any]:
    """The losses, and the metric that decides which checkpoint is the best; --json has all."""
    names = {"train/loss", "eval/loss", "eval/ema/loss", (row["best"] or {}).get("metric")}
    return {name: value for name, value in row["metrics"].items() if name in names}


def _age(moment: str | None) -> str:
    if moment is None:
        return ""
    seconds = max(0, int(time.time() - datetime.fromisoformat(moment).timestamp()))
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= size:
            return f"{seconds // size} {unit}"
    return f"{seconds} s"


def _folders(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))


def _is_run(folder: Path) -> bool:
    return any(os.path.lexists(folder / name) for name in (*_FILES, "checkpoints"))


def _name(path: Path, folder: Path) -> str:
    return path.name if path == folder else str(path.relative_to(folder))
