"""Measures the time from the launcher's start to the first step of a run that resumes at the millionth step of a
dataset of a billion samples, compared with a fresh start. See README.md.

python benchmarks/late_resume.py   measure, write results/DATE-late-resume.json and .md
"""

import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent / "contenders"))

import torch
from alternating import folder_on_disk, write_table
from paced import paced
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import Dataset
from with_distrib import note_steps

from distrib import Config, Loss, Task, Trainer
from distrib.data.loader import Window

SAMPLES, LATE = 10**9, 10**6
ROUNDS, TARGET, PROCESSES = 7, 1.05, 2
_STARTED = "DISTRIB_BENCHMARK_STARTED"


class Synthetic(Dataset[Any]):
    """A billion samples, each computed from its index."""

    def __len__(self) -> int:
        return SAMPLES

    def __getitems__(self, indices: list[int]) -> Tensor:
        return torch.tensor(indices, dtype=torch.float32)[:, None] / SAMPLES * torch.arange(1.0, 17.0)


class Numbers(Task):
    def train_dataset(self) -> Synthetic:
        return Synthetic()

    def model(self) -> nn.Module:
        return nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 1))

    def forward(self, model: nn.Module, batch: Tensor) -> Tensor:
        output: Tensor = model(batch)
        return output

    def loss(self, output: Tensor, batch: Tensor) -> Loss:
        return Loss(F.mse_loss(output, batch[:, :1], reduction="sum"), len(batch))


def make_trainer(folder: str) -> Trainer:
    config = {
        "name": "late",
        "data": {"global_batch_size": 64, "micro_batch_size": 32},
        "train": {"steps": 2 * LATE},
        "checkpoint": {"every_steps": LATE},
        "tracking": {"wandb": "off"},
    }
    return Trainer(Numbers(), Config.from_dict(config), folder)


def prepare(folder: str) -> None:
    """Make the run folder of a run that was stopped after its millionth step: a million lines in its ledger, and a
    checkpoint. Only the last step is computed."""
    trainer = make_trainer(folder)
    source = trainer.source

    def only_the_last(windows: Iterator[Window]) -> Iterator[Window]:
        note_steps(trainer, islice(windows, LATE - 1))
        trainer.preemption.asked = True  # so that it saves and ends
        yield from source.windows(LATE - 1)

    paced(trainer, only_the_last).fit()


def time_first_step(folder: str) -> None:
    """End after the first step, and print how long that took from the start of the launcher."""
    trainer = make_trainer(folder)

    def only_the_first(windows: Iterator[Window]) -> Iterator[Window]:
        first = next(windows)
        yield first
        if trainer.world.is_rank_0:
            print(f"step {first.step} after {time.time() - float(os.environ[_STARTED])} s", flush=True)
        trainer.world.barrier()
        os._exit(0)

    paced(trainer, only_the_first).fit()


def launched(folder: Path, kind: str) -> tuple[int, float]:
    """Return the step that was made, and after how many seconds."""
    command = [sys.executable, "-m", "distrib", "launch", "--processes", str(PROCESSES), __file__, kind, str(folder)]
    environment = {**os.environ, _STARTED: str(time.time())}
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True)
    said = next((line for line in done.stdout.splitlines() if line.startswith("step ") and " after " in line), None)
    if kind == "prepare":
        return 0, 0.0
    if said is None:
        raise RuntimeError(f"{' '.join(command)} ended with exit code {done.returncode}: {done.stdout}")
    return int(said.split()[1]), float(said.split()[3])


def main() -> None:
    if len(sys.argv) == 3:
        {"prepare": prepare, "timed": time_first_step}[sys.argv[1]](sys.argv[2])
        return
    times: dict[str, list[float]] = {"fresh": [], "resumed": []}
    with folder_on_disk() as folder:
        late, fresh = folder / "late", folder / "fresh"
        launched(late, "prepare")
        for _ in range(ROUNDS):
            for name, run, expected in (("fresh", fresh, 0), ("resumed", late, LATE)):
                step, seconds = launched(run, "timed")
                if step != expected:
                    raise RuntimeError(f"{name}: began at step {step}, not {expected}")
                times[name].append(seconds)
            shutil.rmtree(fresh)
        megabytes = (late / "steps.jsonl").stat().st_size / 1e6
    ratio = statistics.median(b / a for a, b in zip(times["fresh"], times["resumed"], strict=True))
    medians = {name: statistics.median(values) for name, values in times.items()}
    rows = [
        "| fresh, s | resumed, s | resumed / fresh | target |",
        "|---|---|---|---|",
        f"| {medians['fresh']:.2f} | {medians['resumed']:.2f} | {ratio:.3f} "
        f"| {TARGET:.2f} {'met' if ratio <= TARGET else 'missed'} |",
    ]
    what = (
        f"From the launcher's start to the end of the first step, {PROCESSES} processes: of a fresh run, and of one "
        f"that goes on at step {LATE:,} of a dataset of {SAMPLES:,} samples, with a ledger of {megabytes:.0f} MB. "
        f"Medians of {ROUNDS} alternating rounds, and of their ratios."
    )
    figures = {"seconds": times, "medians": medians, "ratio": ratio, "target": TARGET}
    versions = {package: version(package) for package in ("distrib", "torch")}
    write_table("late-resume", "Resuming late", what, rows, figures, versions)


if __name__ == "__main__":
    main()
