"""Writes a comparison as one HTML file that needs no other file, and as a picture."""

import base64
import csv
import hashlib
import io
import math
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from matplotlib.figure import Figure

from distrib.monitor.compare import tables
from distrib.monitor.compare.comparison import Comparison
from distrib.monitor.compare.runs import Curve, Run, Values

POINTS = 2000  # drawn of a curve
_LARGEST_SAMPLE = 4 << 20  # bytes of a file
_FEW = 60  # points of a curve up to which each gets a marker
_MOST_PANELS, _PANELS_IN_A_ROW = 6, 3
_DASHES = ("solid", "dashed", "dotted", "dashdot", (0, (8, 2)))  # with ten colours, 50 looks


def write_page(comparison: Comparison, path: Path) -> None:
    """Write curves and tables, with plotly's library inside.

    The page may run these two scripts alone, and connect to nothing. Raises OSError.
    """
    from jinja2 import Environment
    from plotly.offline import get_plotlyjs

    here = Path(__file__)
    scripts = [get_plotlyjs(), here.with_name("page.js").read_text(encoding="utf-8")]
    html = Environment(autoescape=True).from_string(here.with_name("page.html").read_text(encoding="utf-8"))
    text = html.render(
        runs=comparison.runs,
        data=_data(comparison),
        tables=[tables.divergences(comparison), tables.figures(comparison), tables.differences(comparison)],
        samples=_samples(comparison),
        points=POINTS,
        scripts=scripts,
        hashes=[base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in scripts],
    )
    path.write_text(text, encoding="utf-8", newline="\n")


def thin(values: Values, points: int) -> tuple[npt.NDArray[np.intp], Values]:
    """Choose about `points` of the values, shape (n,), so that a plot looks the same.

    Returns the indices of the chosen and the means of their slices, both of shape (chosen,). The values are cut into
    equal slices. The smallest, the largest and the first non-finite value of each slice are kept, so that no spike is
    lost; the first and last value too. If there are at most `points` values, all are kept, as their own means.
    """
    if len(values) <= points:
        return np.arange(len(values)), values
    width = -(-len(values) // (points // 2))
    slices = np.minimum(np.arange(-(-len(values) // width) * width), len(values) - 1).reshape(-1, width)
    finite = np.isfinite(values)[slices]
    inside = values[slices]
    rows = np.arange(len(slices))
    kept = [
        slices[rows, np.where(finite, inside, math.inf).argmin(1)],
        slices[rows, np.where(finite, inside, -math.inf).argmax(1)],
        slices[rows, finite.argmin(1)][~finite.all(1)],
        np.array([0, len(values) - 1]),
    ]
    with np.errstate(invalid="ignore"):
        means = np.where(finite, inside, 0).sum(1) / finite.sum(1)
    places = np.unique(np.concatenate(kept))
    return places, np.where(np.isfinite(values[places]), means[places // width], math.nan)


def draw_curves(comparison: Comparison, path: Path) -> None:
    """Draw training loss and evaluated metrics of all runs over the steps. Raises OSError."""
    keys = tables.metrics(comparison)[:_MOST_PANELS]
    runs = comparison.runs
    columns = max(1, min(len(keys), _PANELS_IN_A_ROW))
    rows = max(1, -(-len(keys) // columns))
    width, header = 5.5 * columns, 0.5 + 0.22 * -(-len(runs) // (2 * columns))  # inches; names, two above a panel
    height = header + 3.6 * rows
    figure = Figure(figsize=(width, height), dpi=120)
    figure.subplots_adjust(
        left=0.6 / width, right=1 - 0.2 / width, bottom=0.5 / height, top=1 - header / height, wspace=0.2, hspace=0.3
    )
    panels = figure.subplots(rows, columns, squeeze=False).flatten()
    for panel in panels[len(keys) :]:
        panel.set_visible(False)
    for panel, key in zip(panels, keys, strict=False):
        panel.set(title=_plain(key), xlabel="steps")
        panel.grid(alpha=0.3)
        for number, run in enumerate(runs):
            curve = run.curves.get(key, Curve.of([], []))
            places, _ = thin(curve.values, POINTS)
            (line,) = panel.plot(curve.steps[places], curve.values[places], color=f"C{number % 10}", linewidth=0.9)
            line.set(linestyle=_DASHES[number // 10 % len(_DASHES)], marker="." if len(places) <= _FEW else "")
    looks = panels[0].get_lines()
    figure.legend(looks, [_plain(run.name) for run in runs], loc="upper center", ncols=2 * columns, frameon=False)
    figure.savefig(path)


def _plain(text: str) -> str:
    """Escape $: matplotlib parses text between two of them as mathematics."""
    return text.replace("$", r"\$")


def _data(comparison: Comparison) -> dict[str, Any]:
    """Return what page.js draws: the runs' curves, by metric."""
    runs = comparison.runs
    first = tables.metrics(comparison)
    keys = dict.fromkeys([*first, *(key for run in runs for key in run.curves)])
    return {
        "runs": [{"name": run.name, "batch": run.global_batch_size} for run in runs],
        "metrics": [
            (
                key,
                [{"run": number, **_drawn(run, run.curves[key])} for number, run in enumerate(runs) if _has(run, key)],
            )
            for key in keys
        ],
    }


def _samples(comparison: Comparison) -> list[tuple[str, list[dict[str, Any]]]]:
    """Return each name of the runs' samples, and what to show of each run. Raises OSError."""
    names = dict.fromkeys(name for run in comparison.runs for name in run.sample_files)
    return [(name, [_shown(run.sample_files.get(name)) for run in comparison.runs]) for name in names]


def _shown(found: tuple[int, Path] | None) -> dict[str, Any]:
    """Return what page.html shows of a sample's file: `after` so many steps, and one of `image`, `rows`, `text`."""
    if found is None:
        return {}
    after, path = found
    try:
        if (size := path.stat().st_size) > _LARGEST_SAMPLE:
            return {"after": after, "text": f"{path} has {size:,} bytes, too many for this page"}
        content = path.read_bytes()
    except OSError as error:
        return {"after": after, "text": f"{path} cannot be read: {error.strerror}"}
    if path.suffix == ".png":
        return {"after": after, "image": base64.b64encode(content).decode()}
    text = content.decode("utf-8", "replace")
    with suppress(csv.Error):  # then it is shown as it is
        if path.suffix == ".csv":
            return {"after": after, "rows": list(csv.reader(io.StringIO(text, newline="")))}
    return {"after": after, "text": text}


def _has(run: Run, key: str) -> bool:
    return key in run.curves and len(run.curves[key].steps) > 0


def _drawn(run: Run, curve: Curve) -> dict[str, list[float | None]]:
    places, means = thin(curve.values, POINTS)
    steps = curve.steps[places]
    clock = run.seconds
    seconds = np.interp(steps, clock.steps, clock.values) if len(clock.steps) else np.full(len(steps), math.nan)
    columns = {"steps": steps, "seconds": seconds, "values": curve.values[places], "means": means}
    return {name: [_short(value) for value in column.tolist()] for name, column in columns.items()}


def _short(value: float) -> float | None:
    """Round to 9 significant digits, which is exact for fp32; None if not finite, because JSON has no NaN."""
    if isinstance(value, int):
        return value
    return float(f"{value:.9g}") if math.isfinite(value) else None
