"""Formats a comparison as tables of text, for the terminal and the page."""

from dataclasses import dataclass

from distrib.errors import and_more
from distrib.monitor.compare.comparison import Comparison, Difference

_MOST_VALUES, _MOST_RUNS = 6, 3  # values of a key, and runs with one value, shown on a terminal


@dataclass(frozen=True)
class Table:
    title: str
    columns: list[str]
    rows: list[list[str]]
    note: str = ""


def divergences(comparison: Comparison) -> Table:
    """One row for each run but the first: from which step on it differs, and why."""
    rows = [
        [
            run.name,
            f"{divergence.steps:,}",
            _step(divergence.samples) if divergence.samples_known else "not recorded",
            _step(divergence.loss),
            _step(divergence.beyond_rounding),
            f"{divergence.largest:.2g}",
            _step(divergence.evaluation),
            divergence.cause,
            divergence.because,
        ]
        for run, divergence in zip(comparison.runs[1:], comparison.divergences, strict=True)
    ]
    bounds = " or ".join(
        f"{bound:.2g}" for bound in sorted({divergence.rounding for divergence in comparison.divergences})
    )
    return Table(
        f"Where they part from {comparison.runs[0].name}",
        ["run", "steps in both", "samples", "losses", "beyond rounding", "largest", "evaluations", "cause", "because"],
        rows,
        "The first step, as steps.jsonl counts, whose samples differ, whose losses differ at all, and by more than "
        f"rounding: relatively by more than {bounds}. Largest: relative difference of two losses. Evaluations: the "
        "first that differs at all, by the steps done before it.",
    )


def metrics(comparison: Comparison) -> list[str]:
    """Return the names of the metrics that any run has."""
    return list(dict.fromkeys(key for figures in comparison.figures for key in figures.final))


def figures(comparison: Comparison) -> Table:
    """One row a run: how far it got, how well, how fast."""
    keys = metrics(comparison)
    rows = []
    for run, found in zip(comparison.runs, comparison.figures, strict=True):
        results = []
        for key in keys:
            text = _number(found.final[key]) if key in found.final else ""
            if key in found.best and found.best[key][0] != found.final.get(key):
                text += f" ({_number(found.best[key][0])} at {found.best[key][1]:,})"
            results.append(text)
        rate = "" if found.samples_per_second is None else f"{found.samples_per_second:,.0f}"
        machine = [run.machine.get(key, "") for key in ("world_size", "strategy")]
        speed = [rate, f"{found.seconds:,.1f}", str(run.restarts)]
        rows.append([run.name, run.state, f"{found.steps:,}", *results, *speed, *machine])
    columns = ["run", "state", "steps", *keys, "samples/s", "seconds", "restarts", "world_size", "strategy"]
    note = f"Each metric {_WHERE[comparison.runs[0].at is None]}; in brackets its best, and after how many steps."
    return Table("Figures", columns, rows, note)


def differences(comparison: Comparison) -> Table:
    """One row a key, one column a run."""
    rows = [[_key(entry), entry.section, *entry.values] for entry in comparison.differences]
    return Table("Differences", ["key", "in", *(run.name for run in comparison.runs)], rows, _NOTE)


def differences_in_short(comparison: Comparison) -> Table:
    """One row a key, with each value and the runs that have it, so that 50 runs are as readable as two."""
    rows = []
    for entry in comparison.differences:
        having: dict[str, list[str]] = {}
        for run, value in zip(comparison.runs, entry.values, strict=True):
            having.setdefault(value, []).append(run.name)
        texts = [f"{value}: {and_more(names, _MOST_RUNS, last=', and')}" for value, names in having.items()]
        rows.append([_key(entry), entry.section, and_more(texts, _MOST_VALUES, "; ", "; and")])
    return Table("Differences", ["key", "in", "value: runs"], rows, _NOTE)


_WHERE = {True: "at the end", False: "at the chosen checkpoint, or at the last evaluation before it"}
_NOTE = "*: decides what is computed; a config's other keys, and the environment, change rounding at most."


def _key(difference: Difference) -> str:
    return f"{difference.key} *" if difference.decides else difference.key


def _step(step: int | None) -> str:
    return "same" if step is None else f"{step:,}"


def _number(value: float) -> str:
    return f"{value:.5g}"
