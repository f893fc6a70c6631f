"""Draws curves.png: loss and metrics of a run over its steps, from the run folder alone."""

import io
from contextlib import suppress

from matplotlib.figure import Figure  # pyplot takes a second to import, and is for screens

from distrib.run_folder.files import read_lines
from distrib.run_folder.folder import RunDir
from distrib.run_folder.formats import EVALUATION, STEP

_LOSSES = ("eval/loss", "eval/ema/loss")


def draw_curves(run: RunDir) -> None:
    """Draw the losses of steps.jsonl and evals.jsonl in one panel, and each metric in a panel of its own.

    Lines that cannot be read are left out and reported in the run's `trouble`. Raises OSError.
    """
    steps, evals = list(read_lines(run.steps, STEP, run.trouble)), list(read_lines(run.evals, EVALUATION, run.trouble))
    metrics = {key: None for entry in evals for key in entry["metrics"] if key not in _LOSSES}
    width = 5.5 * (1 + len(metrics))
    figure = Figure(figsize=(width, 4), dpi=120)  # margins by hand: a layout engine draws everything twice
    figure.subplots_adjust(left=0.6 / width, right=1 - 0.2 / width, bottom=0.13, top=0.9, wspace=0.2)
    panels = figure.subplots(1, 1 + len(metrics), squeeze=False)
    losses, *others = panels[0]
    losses.plot([e["step"] + 1 for e in steps], [e["loss"] for e in steps], linewidth=0.8, label="train/loss")
    if evals:
        for key in [key for key in _LOSSES if any(key in e["metrics"] for e in evals)]:
            losses.plot([e["step"] for e in evals], [e["metrics"].get(key) for e in evals], "o-", label=key)
    losses.legend()
    for panel, key in zip(others, metrics, strict=True):
        panel.plot([e["step"] for e in evals], [e["metrics"].get(key) for e in evals], "o-", color="tab:green")
    for panel, title in zip(panels[0], [f"{run.path.name}: loss", *metrics], strict=True):
        panel.set_title(title, y=1.0)  # with places given, matplotlib lays out the labels once, not thrice
        panel.set_xlabel("step")
        panel.xaxis.set_label_coords(0.5, -0.095)
        panel.yaxis.set_label_coords(0, 0.5)
        panel.locator_params(nbins=5)
        panel.grid(alpha=0.3)
    picture = io.BytesIO()
    figure.savefig(picture, format="png", pil_kwargs={"compress_level": 1})  # a third of the time, hardly larger
    partial = run.curves.with_name(f".{run.curves.name}.partial")
    try:
        partial.unlink(missing_ok=True)  # if it is a FIFO, opening it would wait
        partial.write_bytes(picture.getvalue())
        partial.replace(run.curves)
    except OSError:
        with suppress(OSError):
            partial.unlink()
        raise
