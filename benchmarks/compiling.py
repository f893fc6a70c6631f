"""Measures what `train.compile` gains: the time of a step relative to uncompiled, in the same processes.

python benchmarks/compiling.py    measure, write results/DATE-compiling.json and .md
"""

import argparse
from pathlib import Path
from typing import Any

from alternating import ROOT, AlternatingTrainer, Loop, OwnLoopWith, measure, write_results
from torch import nn

from distrib import Config
from distrib.task import load_task

CASES = [(processes, mode) for processes in (1, 2) for mode in ("blocks", "model")]
BLOCKS, STEPS = 8, 4


class CompilingTrainer(AlternatingTrainer):
    blocks_timed, steps_a_block = BLOCKS, STEPS
    learned = 4.0  # of 5.5, the loss of guessing a byte

    def other_loop(self, twin: nn.Module) -> Loop:
        return OwnLoopWith(self, twin, compile=False)


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
