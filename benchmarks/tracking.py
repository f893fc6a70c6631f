"""Measures what wandb costs a step: blocks in which its processes run, relative to blocks in which they are stopped.

python benchmarks/tracking.py   measure with 1 and with 2 processes, write results/DATE-tracking.json and .md
"""

import argparse
import os
import signal
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import psutil
import torch
import torch.distributed as dist
from alternating import AlternatingTrainer, measure, write_results
from torch import nn
from torch.utils.data import TensorDataset

from distrib import Config, Loss, Task
from distrib.data.loader import Window
from distrib.processes.world import World

TARGET = 1.01
BLOCKS, STEPS = 20, 150
SECONDS_TO_CATCH_UP = 1.5
BATCH, WIDTH, DEPTH = 32, 512, 9  # about 10 ms a step on one core


class Busy(Task):
    """Multiplies matrices, and learns to sum."""

    def train_dataset(self) -> TensorDataset:
        inputs = torch.randn(1024, WIDTH, generator=torch.Generator().manual_seed(0))
        return TensorDataset(inputs, inputs.sum(1, keepdim=True) / WIDTH**0.5)

    def model(self) -> nn.Module:
        layers = [layer for _ in range(DEPTH) for layer in (nn.Linear(WIDTH, WIDTH), nn.ReLU())]
        return nn.Sequential(*layers, nn.Linear(WIDTH, 1))

    def loss(self, output: Any, batch: Any) -> Loss:
        return Loss((output - batch[1]).square().sum(), len(output))


class TrackingTrainer(AlternatingTrainer):
    blocks_timed, steps_a_block, learned = BLOCKS, STEPS, 0.5

    def take_turns(self, windows: Iterator[Window]) -> Iterator[Window]:
        """`plain` blocks are distrib's too, with the tracking process and wandb's stopped; before the next block they
        have time to catch up."""
        self.milliseconds = {"plain": [], "distrib": []}
        self.losses = {"plain": [], "distrib": []}
        yield from islice(windows, STEPS)
        time.sleep(5)  # until wandb has begun
        for _ in range(1 + BLOCKS):
            for loop, number in (("plain", signal.SIGSTOP), ("distrib", signal.SIGCONT)):
                self._signal(number)
                if loop == "distrib":
                    time.sleep(SECONDS_TO_CATCH_UP)
                with self.timed(loop):
                    yield from islice(windows, STEPS)
                self.losses[loop].append(self.run_log.metrics.get("train/loss", 0.0))
        yield from windows

    def _signal(self, number: int) -> None:
        if self.world.is_rank_0:
            beside = [one for one in psutil.Process().children(recursive=True) if one.pid != os.getpid()]
            assert len(beside) >= 2, "the tracking process, and wandb's"
            for process in beside:
                process.send_signal(number)
        if self.world.world_size > 1:
            dist.barrier()


def run_member(folder: Path) -> None:
    """Run one process of one case."""
    config = Config.from_dict(
        {
            "data": {"global_batch_size": BATCH * World.detect().world_size, "micro_batch_size": BATCH},
            "optim": {"name": "adamw", "lr": 0.0001},
            "train": {"steps": (1 + 2 * (1 + BLOCKS)) * STEPS + 1},
            "tracking": {"wandb": "offline"},
        }
    )
    trainer = TrackingTrainer(Busy(), config, folder / "run")
    trainer.fit()
    trainer.finish_member(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description="what wandb costs a step")
    parser.add_argument("--member", type=Path, help=argparse.SUPPRESS)  # how we start ourselves
    arguments = parser.parse_args()
    if arguments.member is not None:
        run_member(arguments.member)
        return
    os.environ["OMP_NUM_THREADS"] = "1"
    cases = {processes: measure(__file__, processes, TARGET) for processes in (1, 2)}
    what = (
        "wandb offline, each step told; against the same with its processes stopped, which catch up before the next "
        f"block. One thread a process, so that with one process a core is free, with two none is. Medians of {BLOCKS} "
        f"alternating blocks of {STEPS} steps, and of the ratios of neighbouring blocks."
    )
    write_results("tracking", "What tracking costs a step", what, "processes", "without", cases)


if __name__ == "__main__":
    main()
