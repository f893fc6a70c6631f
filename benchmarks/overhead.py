"""The time a step takes: distrib against the DDP loop of the PyTorch tutorial, see README.md.

python benchmarks/overhead.py             measure with 1 and with 2 processes, write results/DATE-overhead.json and .md
python benchmarks/overhead.py --profile   say instead where distrib's steps spend their time
"""

import argparse
import copy
import cProfile
import json
import math
import os
import platform
import pstats
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from datetime import date
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from distrib import Config, Trainer
from distrib.data.loader import Window
from distrib.task import load_task
from distrib.world import World

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
TARGETS = {1: 0.90, 2: 1.00}  # distrib's time a step by the plain loop's, at most, for each number of processes
GLOBAL_BATCH_SIZE = 64
BLOCKS = 15  # timed, of each loop; one of each goes before and is not counted
EPOCHS = 5  # of the plain loop, a block
STEPS = 23 * EPOCHS  # a block of either: 1,438 images, 64 a step
TOP = 25  # lines of a profile


class PlainLoop:
    """The tutorial's Trainer, with AdamW: pytorch.org/tutorials/beginner/ddp_series_multigpu.html"""

    def __init__(self, model: nn.Module, dataset: TensorDataset, world: World) -> None:
        self.sampler = DistributedSampler(dataset, num_replicas=world.world_size, rank=world.rank)
        self.loader = DataLoader(dataset, batch_size=GLOBAL_BATCH_SIZE // world.world_size, sampler=self.sampler)
        self.model = DistributedDataParallel(model) if world.world_size > 1 else model
        self.optimizer = torch.optim.AdamW(self.model.parameters())
        self.criterion = nn.CrossEntropyLoss()

    def run_epochs(self, epochs: range) -> None:
        for epoch in epochs:
            self.sampler.set_epoch(epoch)
            for inputs, targets in self.loader:
                self.optimizer.zero_grad()
                output = self.model(inputs)
                loss = self.criterion(output, targets)
                loss.backward()
                self.optimizer.step()


class AlternatingTrainer(Trainer):
    """A Trainer which, between blocks of its steps, lets the plain loop run: what is timed is Trainer's own loop."""

    profile: cProfile.Profile | None = None

    def _windows(self) -> Iterator[Window]:
        self.milliseconds: dict[str, list[float]] = {"plain": [], "distrib": []}  # a step, a block
        self.losses: dict[str, list[float]] = {"plain": [], "distrib": []}  # before the first block and after each
        twin = copy.deepcopy(self.module)
        plain = PlainLoop(twin, self.train_dataset, self.world)
        assert len(plain.loader) * EPOCHS == STEPS, "the loops must make equally many steps"
        windows = super()._windows()
        self._record_losses(twin)
        for block in range(1 + BLOCKS):
            with self._timed("plain"):
                plain.run_epochs(range(block * EPOCHS, (block + 1) * EPOCHS))
            with self.profile or nullcontext(), self._timed("distrib"):
                yield from islice(windows, STEPS)
            self._record_losses(twin)
        yield from windows  # one more step: what Trainer does after the last belongs to no block

    @contextmanager
    def _timed(self, loop: str) -> Iterator[None]:
        if self.world.world_size > 1:
            dist.barrier()
        started = time.perf_counter()
        yield
        self.milliseconds[loop].append((time.perf_counter() - started) * 1000 / STEPS)

    def _record_losses(self, twin: nn.Module) -> None:
        """Of the whole training set, in the same way for both."""
        inputs, targets = self.train_dataset.tensors
        with torch.no_grad():
            for loop, module in ("plain", twin), ("distrib", self.module):
                self.losses[loop].append(nn.functional.cross_entropy(module(inputs), targets).item())


def run_member(folder: Path, profiled: bool) -> None:
    """One process of one case; rank 0 leaves folder/result.json."""
    config = Config.from_dict(
        {
            "name": "overhead",
            "task": {"target": "distrib.tasks.digits:Digits", "network": "mlp"},
            "data": {
                "global_batch_size": GLOBAL_BATCH_SIZE,
                "micro_batch_size": GLOBAL_BATCH_SIZE // World.detect().world_size,
            },
            "optim": {"name": "adamw", "lr": 0.001, "weight_decay": 0.01},  # torch's defaults, which the other has
            "train": {"steps": (1 + BLOCKS) * STEPS + 1, "max_grad_norm": None},  # the tutorial does not clip
        }
    )
    trainer = AlternatingTrainer(load_task(config.task), config, folder / "run")
    trainer.profile = cProfile.Profile() if profiled else None
    trainer.fit()
    for loop, losses in trainer.losses.items():
        if not (all(map(math.isfinite, losses)) and losses[-1] < losses[0] / 10):
            raise RuntimeError(f"{loop} does not learn, so its time says nothing: losses {losses}")
    if not trainer.world.is_rank_0:
        return
    if trainer.profile is not None:
        print_profile(trainer.profile, (1 + BLOCKS) * STEPS)
    environment = json.loads(trainer.run.environment.read_text())
    result = {
        "threads": environment["machine"]["threads"],
        "versions": environment["versions"],
        "milliseconds": {loop: times[1:] for loop, times in trainer.milliseconds.items()},
        "losses": trainer.losses,
    }
    (folder / "result.json").write_text(json.dumps(result))


def print_profile(profile: cProfile.Profile, steps: int) -> None:
    """The functions that took most, by their own time. The profiler makes Python look slower than C."""
    stats = pstats.Stats(profile).stats  # type: ignore[attr-defined]
    print(f"{'own us':>9} {'with inner':>11} {'calls':>6}  of rank 0, a step")
    for (file, line, name), (_, calls, own, inner, _) in sorted(stats.items(), key=lambda item: -item[1][2])[:TOP]:
        where = name if file == "~" else f"{'/'.join(Path(file).parts[-3:])}:{line} {name}"
        print(f"{own / steps * 1e6:9.1f} {inner / steps * 1e6:11.1f} {calls / steps:6.1f}  {where}")


def measure(processes: int, profiled: bool) -> dict[str, Any]:
    """Start one case, wait for it, and work out its ratios."""
    command = [sys.executable, "-m", "distrib", "launch", "--processes", str(processes), str(Path(__file__).resolve())]
    with tempfile.TemporaryDirectory() as folder:
        command += ["--member", folder, *(["--profile"] if profiled else [])]
        # Its output is not passed on, or the progress display would draw its bar where ours is a terminal.
        done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
        if done.returncode:
            sys.exit(f"{done.stdout}{' '.join(command)} ended with exit code {done.returncode}")
        if profiled:
            print(f"{processes} process(es)\n{done.stdout}")
        case: dict[str, Any] = json.loads((Path(folder) / "result.json").read_text())
    times = case["milliseconds"]
    ratios = [ours / plain for ours, plain in zip(times["distrib"], times["plain"], strict=True)]
    case["medians"] = {loop: statistics.median(values) for loop, values in times.items()}
    case["ratios"] = ratios
    case["ratio"] = {"median": statistics.median(ratios), "min": min(ratios), "max": max(ratios)}
    case["target"] = TARGETS[processes]
    return case


def describe_machine() -> dict[str, Any]:
    """Cores, CPU, and how busy it was before we began."""
    cpu_info = Path("/proc/cpuinfo")
    lines = cpu_info.read_text().splitlines() if cpu_info.exists() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return {
        "cores": os.cpu_count(),
        "cpu": models[0] if models else platform.processor(),
        "load_before": round(os.getloadavg()[0], 2),
    }


def describe_commit() -> str:
    """The commit that was measured; '-dirty' where tracked files differ from it."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout.strip() or "unknown"


def as_markdown(result: dict[str, Any]) -> str:
    rows = [
        "| processes | plain DDP loop, ms a step | distrib, ms a step | distrib / plain (min to max) | target |",
        "|---|---|---|---|---|",
    ]
    for processes, case in result["cases"].items():
        medians, ratio = case["medians"], case["ratio"]
        verdict = "met" if ratio["median"] <= case["target"] else "missed"
        rows.append(
            f"| {processes} | {medians['plain']:.3f} | {medians['distrib']:.3f} "
            f"| {ratio['median']:.3f} ({ratio['min']:.3f} to {ratio['max']:.3f}) | {case['target']:.2f} {verdict} |"
        )
    machine = result["machine"]
    versions = ", ".join(f"{name} {number}" for name, number in result["versions"].items())
    return "\n".join(
        [
            f"# Overhead a step, {result['date']}\n",
            f"Digits MLP, global batch {GLOBAL_BATCH_SIZE}; medians of {BLOCKS} alternating blocks of {STEPS} steps, "
            "and of the ratios of neighbouring blocks.\n",
            *rows,
            f"\nMachine: {machine['cores']} cores, {machine['cpu']}, load {machine['load_before']} before. {versions}.",
            f"Commit {result['git_commit']}.\n",
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="distrib's time a step against that of the plain DDP loop")
    parser.add_argument("--profile", action="store_true", help="print where distrib's steps spend their time")
    parser.add_argument("--member", type=Path, help=argparse.SUPPRESS)  # how we start ourselves
    arguments = parser.parse_args()
    if arguments.member is not None:
        run_member(arguments.member, arguments.profile)
        return
    result: dict[str, Any] = {
        "date": date.today().isoformat(),
        "machine": describe_machine(),
        "git_commit": describe_commit(),
    }
    cases = {processes: measure(processes, arguments.profile) for processes in TARGETS}
    if arguments.profile:
        return
    result["versions"] = [case.pop("versions") for case in cases.values()].pop()
    result["cases"] = cases
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{result['date']}-overhead.json"
    path.write_text(json.dumps(result, indent=2) + "\n")
    text = as_markdown(result)
    path.with_suffix(".md").write_text(text)
    print(f"{text}\n{path.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
