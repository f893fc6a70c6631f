"""Measures how long training waits for a checkpoint, relative to a synchronous torch.save, and how long a resume takes.

python benchmarks/saving.py                 measure, write results/DATE-saving.json and .md
python benchmarks/saving.py --millions 10   a smaller model
"""

import argparse
import statistics
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from alternating import folder_on_disk, write_table
from torch import nn

from distrib.processes.world import World
from distrib.run_folder import checkpoint
from distrib.run_folder.async_save import Saver
from distrib.run_folder.checkpoint import replicated

ROUNDS, TARGET = 5, 0.10  # the wait, by torch.save's time
NOTHING_ELSE: dict[str, Any] = {"chain": "", "applied": 0, "loss_scale": None, "numbers": {}, "tied": {}}


def state_of(millions: int) -> dict[str, torch.Tensor]:
    """Return parameters and Adam's two moments."""
    model = nn.Sequential(*(nn.Linear(1000, 1000, bias=False) for _ in range(millions)))
    named = [(name, parameter.detach()) for name, parameter in model.named_parameters()]
    kinds = ("model", "optimizer.exp_avg", "optimizer.exp_avg_sq")
    return {f"{kind}.{name}": torch.randn_like(value) for kind in kinds for name, value in named}


def load_plainly(path: Path, state: dict[str, torch.Tensor]) -> None:
    """Load as load_state_dict does."""
    for name, tensor in torch.load(path, weights_only=True).items():
        state[name].copy_(tensor)


def seconds(work: Any) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description="the wait for an asynchronous save against a synchronous torch.save")
    parser.add_argument("--millions", type=int, default=100, help="of parameters")
    millions = parser.parse_args().millions
    state = state_of(millions)
    shards = {name: replicated(tensor) for name, tensor in state.items()}
    kinds = ("torch.save", "wait", "background", "torch.load", "resume")
    times: dict[str, list[float]] = {kind: [] for kind in kinds}
    with folder_on_disk() as folder:
        saver = Saver(folder / "checkpoints", World(), keep=1, keep_every=0, durable=[])
        for step in range(1, ROUNDS + 1):
            times["torch.save"].append(seconds(lambda: torch.save(state, folder / "state.pt")))
            times["wait"].append(seconds(lambda step=step: saver.save(step, shards, NOTHING_ELSE)))
            times["background"].append(seconds(saver.wait))
            path = next(checkpoint.steps_of(saver.folder))
            times["torch.load"].append(seconds(lambda: load_plainly(folder / "state.pt", state)))
            times["resume"].append(seconds(lambda path=path: checkpoint.load(path, checkpoint.verify(path), shards)))
    medians = {name: statistics.median(values) for name, values in times.items()}
    ratio = statistics.median(wait / whole for wait, whole in zip(times["wait"], times["torch.save"], strict=True))
    rows = [
        "| torch.save, s | training waits, s | wait / torch.save | target | background, s | torch.load, s "
        "| verify and load, s |",
        "|---|---|---|---|---|---|---|",
        f"| {medians['torch.save']:.2f} | {medians['wait']:.3f} | {ratio:.3f} "
        f"| {TARGET:.2f} {'met' if ratio <= TARGET else 'missed'} "
        f"| {medians['background']:.2f} | {medians['torch.load']:.2f} | {medians['resume']:.2f} |",
    ]
    what = (
        f"{millions} million fp32 parameters and Adam's two moments, {millions * 12} MB, one process; medians of "
        f"{ROUNDS} alternating rounds. The background includes syncing to the disk and SHA-256, torch.save neither; "
        "nor does torch.load verify what it reads."
    )
    figures = {"millions": millions, "seconds": times, "medians": medians, "ratio": ratio, "target": TARGET}
    versions = {package: version(package) for package in ("torch", "safetensors")}
    write_table("saving", "The wait for a checkpoint", what, rows, figures, versions)


if __name__ == "__main__":
    main()
