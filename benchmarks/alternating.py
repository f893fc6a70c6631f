"""Shared code of the benchmarks: distrib's loop and another alternate in the same processes, block by block.

A slow moment of the machine then affects both. The result is the median of the ratios of neighbouring blocks.
"""

import argparse
import copy
import cProfile
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from datetime import date
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

sys.path.insert(0, str(Path(__file__).parent / "contenders"))

import torch
import torch.distributed as dist
from paced import paced
from torch import nn

from distrib import Config, Task, Trainer
from distrib.config import StrategyConfig
from distrib.data.loader import Window
from distrib.strategies import registry
from distrib.training.engine import Engine
from distrib.training.loop import train_step

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"


class Loop(Protocol):
    """The loop that distrib is compared with, over a copy of the same model."""

    loss: torch.Tensor  # of the last step on this rank

    def run_block(self, block: int) -> None:
        """Make as many steps as distrib makes in a block."""


class AlternatingTrainer(Trainer):
    """A Trainer that runs the other loop between blocks of its own steps. So Trainer's real loop is timed."""

    blocks_timed: int  # of each loop; one of each goes before and is not counted
    steps_a_block: int
    learned = math.log(10) / 10  # what the loss must fall below: a tenth of that of guessing one of ten digits
    profile: cProfile.Profile | None = None

    def __init__(self, task: Task, config: Config, run_dir: Path) -> None:
        super().__init__(task, config, run_dir)
        self.twin = copy.deepcopy(self.module)  # before it is wrapped and sharded
        self.uninterrupted = self.source  # for other loops, which have turns of their own
        paced(self, self.take_turns)

    def other_loop(self, twin: nn.Module) -> Loop:
        raise NotImplementedError

    def take_turns(self, windows: Iterator[Window]) -> Iterator[Window]:
        self.milliseconds: dict[str, list[float]] = {"plain": [], "distrib": []}  # a step, a block
        self.losses: dict[str, list[float]] = {"plain": [], "distrib": []}  # of the last step of each block
        plain = self.other_loop(self.twin)
        for block in range(1 + self.blocks_timed):
            with self.timed("plain"):
                plain.run_block(block)
            with self.profile or nullcontext(), self.timed("distrib"):
                yield from islice(windows, self.steps_a_block)
            self.losses["plain"].append(plain.loss.item())
            self.losses["distrib"].append(self.run_log.metrics.get("train/loss", 0.0))  # known to rank 0
        yield from windows  # one more step: what Trainer does after the last belongs to no block

    @contextmanager
    def timed(self, loop: str) -> Iterator[None]:
        if self.world.world_size > 1:
            dist.barrier()
        started = time.perf_counter()
        yield
        self.milliseconds[loop].append((time.perf_counter() - started) * 1000 / self.steps_a_block)

    def finish_member(self, folder: Path) -> None:
        """After `fit`: check that both loops have learned, and write folder/result.json on rank 0."""
        for loop, losses in self.losses.items():
            if not (all(map(math.isfinite, losses)) and losses[-1] < self.learned):
                raise RuntimeError(f"{loop} does not learn, so its time says nothing: losses {losses}")
        if self.world.is_rank_0:
            environment = json.loads(self.run.environment.read_text())
            result = {
                "threads": environment["machine"]["threads"],
                "versions": environment["versions"],
                "milliseconds": {loop: times[1:] for loop, times in self.milliseconds.items()},
                "losses": self.losses,
            }
            (folder / "result.json").write_text(json.dumps(result))


class OwnLoopWith:
    """distrib's own loop over the copy, under another strategy or with other values in the section `train`."""

    def __init__(
        self, trainer: AlternatingTrainer, twin: nn.Module, strategy_name: str | None = None, **train: Any
    ) -> None:
        section = trainer.config.strategy
        if strategy_name is not None:
            section = StrategyConfig(name=strategy_name)
        changed = {"train": trainer.config.train.model_copy(update=train), "strategy": section}
        config = trainer.config.model_copy(update=changed)
        strategy = registry.create(config, trainer.world)
        strategy.wrap(twin, [], trainer.make_optimizer)
        self.engine, self.task = Engine(strategy, max_grad_norm=config.train.max_grad_norm), trainer.task
        self.windows, self.steps = trainer.uninterrupted.windows(0), trainer.steps_a_block

    def run_block(self, block: int) -> None:
        for window in islice(self.windows, self.steps):
            self.loss = torch.tensor(train_step(self.engine, self.task, window, self.engine.base_rate).read().loss)


def measure(script: str, processes: int, target: float, *arguments: str) -> dict[str, Any]:
    """Start one case, `script --member FOLDER *arguments`, wait for it, and compute its ratios."""
    command = [sys.executable, "-m", "distrib", "launch", "--processes", str(processes), str(Path(script).resolve())]
    with tempfile.TemporaryDirectory() as folder:
        command += ["--member", folder, *arguments]
        # Its output is not passed on, or the progress display would draw its bar where ours is a terminal.
        root = Path(script).resolve().parents[1]
        done = subprocess.run(command, cwd=root, stdout=subprocess.PIPE, text=True)
        if done.returncode:
            sys.exit(f"{done.stdout}{' '.join(command)} ended with exit code {done.returncode}")
        if "--profile" in arguments:
            print(f"{processes} process(es)\n{done.stdout}")
        case: dict[str, Any] = json.loads((Path(folder) / "result.json").read_text())
    times = case["milliseconds"]
    ratios = [ours / plain for ours, plain in zip(times["distrib"], times["plain"], strict=True)]
    case["medians"] = {loop: statistics.median(values) for loop, values in times.items()}
    case["ratios"] = ratios
    case["ratio"] = {"median": statistics.median(ratios), "min": min(ratios), "max": max(ratios)}
    case["target"] = target
    return case


def each_strategy(
    script: str,
    run_member: Callable[[Path, str], None],
    strategies: Sequence[str],
    processes: int,
    target: float,
    results: tuple[str, str, str, str],
) -> None:
    """Parse a script's command line, and measure it under each strategy, or under the one that is asked for.

    `run_member`: trains in one process, given the folder for its result and the strategy. `results`: name, title,
    description and the other loop's name, for `write_results`.
    """
    parser = argparse.ArgumentParser(description=results[1])
    parser.add_argument("--only", choices=strategies, help="print the time under one strategy, and write no results")
    parser.add_argument("--member", nargs=2, metavar=("FOLDER", "STRATEGY"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.member is not None:
        run_member(Path(arguments.member[0]), arguments.member[1])
    elif arguments.only is not None:
        case = measure(script, processes, target, arguments.only)
        print(case["medians"], case["ratio"])
    else:
        name, title, what, plain = results
        cases = {strategy: measure(script, processes, target, strategy) for strategy in strategies}
        write_results(name, title, what, "strategy", plain, cases)


def write_results(name: str, title: str, what: str, column: str, plain: str, cases: dict[Any, dict[str, Any]]) -> None:
    """Write benchmarks/results/DATE-name.json and .md. `cases`: results by the value of the first column, `column`."""
    versions = [case.pop("versions") for case in cases.values()].pop()
    rows = [
        f"| {column} | {plain}, ms a step | distrib, ms a step | distrib / {plain} (min to max) | target |",
        "|---|---|---|---|---|",
    ]
    for key, case in cases.items():
        medians, ratio = case["medians"], case["ratio"]
        verdict = "met" if ratio["median"] <= case["target"] else "missed"
        rows.append(
            f"| {key} | {medians['plain']:.3f} | {medians['distrib']:.3f} "
            f"| {ratio['median']:.3f} ({ratio['min']:.3f} to {ratio['max']:.3f}) | {case['target']:.2f} {verdict} |"
        )
    write_table(name, title, what, rows, {"cases": cases}, versions)


def write_table(
    name: str, title: str, what: str, rows: list[str], figures: dict[str, Any], versions: dict[str, str]
) -> Path:
    """Write benchmarks/results/DATE-name.json with the figures, and .md with the rows of a table. Return the path of
    the first."""
    result: dict[str, Any] = {
        "date": date.today().isoformat(),
        "machine": _describe_machine(),
        "git_commit": _describe_commit(),
        "versions": versions,
        **figures,
    }
    machine = result["machine"]
    packages = ", ".join(f"{package} {number}" for package, number in versions.items())
    text = "\n".join(
        [
            f"# {title}, {result['date']}\n",
            f"{what}\n",
            *rows,
            f"\nMachine: {machine['cores']} cores, {machine['cpu']}, load {_LOAD_BEFORE} before. {packages}.",
            f"Commit {result['git_commit']}.\n",
        ]
    )
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{result['date']}-{name}.json"
    path.write_text(json.dumps(result, indent=2) + "\n")
    path.with_suffix(".md").write_text(text)
    print(f"{text}\n{path.relative_to(ROOT)}", flush=True)
    return path


@contextmanager
def folder_on_disk() -> Iterator[Path]:
    """Make a temporary folder in runs/, because the system's temporary folder may be in memory."""
    runs = Path.cwd() / "runs"
    runs.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=runs) as folder:
        yield Path(folder)


_LOAD_BEFORE = round(os.getloadavg()[0], 2)


def _describe_machine() -> dict[str, Any]:
    """Return cores, CPU, and the load before the benchmark started."""
    cpu_info = Path("/proc/cpuinfo")
    lines = cpu_info.read_text().splitlines() if cpu_info.exists() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return {"cores": os.cpu_count(), "cpu": models[0] if models else platform.processor(), "load_before": _LOAD_BEFORE}


def _describe_commit() -> str:
    """Return the measured commit, with '-dirty' if tracked files differ from it."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout.strip() or "unknown"
