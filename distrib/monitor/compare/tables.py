"""A comparison as tables of text, for the terminal and the page."""

from dataclasses import dataclass

from distrib.monitor.compare.comparison import Comparison, Difference

_MOST_VALUES, _MOST_RUNS = 6, 3  # of a key, with a value, named on a terminal


@dataclass(frozen=True)
class Table:
    title: str
    columns: list[str]
    rows: list[list[str]]
    note: str = ""


def partings(comparison: Comparison) -> Table:
    """A row a run but the first: from which step on it is another, and why."""
    rows = [
        [
            run.name,
            f"{parting.steps:,}",
            _step(parting.samples) if parting.samples_known else "not recorded",
            _step(parting.loss),
            _step(parting.beyond_rounding),
            f"{parting.largest:.2g}",
            _step(parting.evaluation),
            parting.cause,
            parting.because,
        ]
        for run, parting in zip(comparison.runs[1:], comparison.partings, strict=True)
    ]
    bounds = " or ".join(f"{bound:.2g}" for bound in sorted({parting.rounding for parting in comparison.partings}))
    return Table(
        f"Where they part from {comparison.runs[0].name}",
        ["run", "steps in both", "samples", "losses", "beyond rounding", "largest", "evaluations", "cause", "because"],
        rows,
        "The first step, as steps.jsonl counts, whose samples differ, whose losses differ at all, and by more than "
        f"rounding: relatively by more than {bounds}. Largest: relative difference of two losses. Evaluations: the "
        "first that differs at all, by the steps done before it.",
    )


def metrics(comparison: Comparison) -> list[str]:
    """The results that any of the runs has."""
    return list(dict.fromkeys(key for figures in comparison.figures for key in figures.final))


def figures(comparison: Comparison) -> Table:
    """A row a run: how far it got, how well, how fast."""
    keys = metrics(comparison)
    rows = []
    for run, found in zip(comparison.runs, comparison.figures, strict=True):
        results = []
        for key in keys:
            text = _number(found.final[key]) if key in found.final else ""
            if key in found.best and found.best[key][0] != found.final[key]:
                text += f" ({_number(found.best[key][0])} at {found.best[key][1]:,})"
            results.append(text)
        rate = "" if found.samples_per_second is None else f"{found.samples_per_second:,.0f}"
        machine = [run.machine.get(key, "") for key in ("world_size", "strategy")]
        speed = [rate, f"{found.seconds:,.1f}", str(run.restarts)]
        rows.append([run.name, run.state, f"{found.steps:,}", *results, *speed, *machine])
    columns = ["run", "state", "steps", *keys, "samples/s", "seconds", "restarts", "world_size", "strategy"]
    note = "Each metric at the end; in brackets its best, where that was before, and after how many steps."
    return Table("Figures", columns, rows, note)


def differences(comparison: Comparison) -> Table:
    """A row a key, a column a run."""
    rows = [[_key(entry), entry.section, *entry.values] for entry in comparison.differences]
    return Table("Differences", ["key", "in", *(run.name for run in comparison.runs)], rows, _NOTE)


def differences_in_short(comparison: Comparison) -> Table:
    """A row a key, with each value and the runs that have it: as readable with 50 runs as with two."""
    rows = []
    for entry in comparison.differences:
        having: dict[str, list[str]] = {}
        for run, value in zip(comparison.runs, entry.values, strict=True):
            having.setdefault(value, []).append(run.name)
        texts = [f"{value}: {_some(names, _MOST_RUNS)}" for value, names in having.items()]
        rows.append([_key(entry), entry.section, _some(texts, _MOST_VALUES, "; ")])
    return Table("Differences", ["key", "in", "value: runs"], rows, _NOTE)


_NOTE = "*: decides what is computed; a config's other keys, and the environment, change rounding at most."


def _key(difference: Difference) -> str:
    return f"{difference.key} *" if difference.decides else difference.key


def _some(texts: list[str], most: int, between: str = ", ") -> str:
    more = len(texts) - most
    return between.join(texts[:most]) + (f"{between}and {more} more" if more > 0 else "")


def _step(step: int | None) -> str:
    return "same" if step is None else f"{step:,}"


def _number(value: float) -> str:
    return f"{value:.5g}"
