"""Measures what `train.compile` gains: the time of a step relative to uncompiled, in the same processes.

python benchmarks/compiling.py    measure, write results/DATE-compiling.json and .md
"""

import argparse
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from alternating import ROOT, AlternatingTrainer, Loop, measure, write_results
from torch import nn

from distrib import Config
from distrib.strategies import registry
from distrib.task import load_task
from distrib.training.engine import Engine
from distrib.training.loop import train_step

CASES = [(processes, mode) for processes in (1, 2) for mode in ("blocks", "model")]
BLOCKS, STEPS = 8, 4


class Uncompiled:
    """distrib's own loop, with train.compile: false."""

    def __init__(self, trainer: "CompilingTrainer", twin: nn.Module) -> None:
        config = trainer.config
        uncompiled = config.model_copy(update={"train": config.train.model_copy(update={"compile": False})})
        strategy = registry.create(uncompiled, trainer.world)
        strategy.wrap(twin, [], trainer.make_optimizer)
        self.engine, self.task = Engine(strategy, max_grad_norm=config.train.max_grad_norm), trainer.task
        self.windows = trainer.uninterrupted.windows(0)

    def run_block(self, block: int) -> None:
        for window in islice(self.windows, STEPS):
            self.loss = torch.tensor(train_step(self.engine, self.task, window, self.engine.base_rate).read().loss)


class CompilingTrainer(AlternatingTrainer):
    blocks_timed, steps_a_block = BLOCKS, STEPS
    learned = 4.0  # of 5.5, the loss of guessing a byte

    def other_loop(self, twin: nn.Module) -> Loop:
        return Uncompiled(self, twin)


def run_member(folder: Path, mode: str) -> None:
    steps = (1 + BLOCKS) * STEPS + 1
    overrides = ["tracking.wandb=off", "optim.schedule=constant", f"train.steps={steps}", f"train.compile={mode}"]
    config = Config.load(ROOT / "configs/gpt-tiny.yaml", [*overrides, "optim.warmup_steps=0", "eval.every_steps=0"])
    trainer = CompilingTrainer(load_task(config.task), config, folder / "run")
    trainer.evaluations.sets.clear()  # it takes longer than all the steps
    trainer.fit()
    trainer.finish_member(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description="a compiled step's time against an uncompiled one's")
    parser.add_argument("--member", type=Path, help=argparse.SUPPRESS)  # how we start ourselves
    parser.add_argument("--mode", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.member is not None:
        run_member(arguments.member, arguments.mode)
        return
    cases: dict[str, dict[str, Any]] = {}
    for processes, mode in CASES:
        cases[f"{processes}, {mode}"] = measure(__file__, processes, 1.0, "--mode", mode)
    what = (
        "configs/gpt-tiny.yaml, 0.8 million parameters, fp32: steps compiled by blocks or as a whole model against the "
        f"same steps uncompiled; medians of {BLOCKS} alternating blocks of {STEPS} steps, and of the ratios of "
        "neighbouring blocks. The first block, in which everything is compiled, is not counted."
    )
    write_results("compiling", "What train.compile gains", what, "processes, compiled", "uncompiled", cases)


if __name__ == "__main__":
    main()
