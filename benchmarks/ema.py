"""Measures what `train.ema` costs: the time of a step whose weights are averaged, relative to one without, in the same
processes.

python benchmarks/ema.py                 measure, write results/DATE-ema.json and .md
python benchmarks/ema.py --only zero2    print the time under one strategy
"""

from pathlib import Path

from alternating import AlternatingTrainer, Loop, OwnLoopWith, each_strategy
from bitwise import LENGTH, Bytes
from torch import nn

from distrib import Config

PROCESSES, TARGET = 2, 1.05
STRATEGIES = ("ddp", "zero2")
WIDTH, DEPTH = 528, 6  # 20 million parameters
GLOBAL_BATCH_SIZE, MICRO_BATCH_SIZE = 16, 8
BLOCKS, STEPS = 25, 2


class AveragingTrainer(AlternatingTrainer):
    blocks_timed, steps_a_block = BLOCKS, STEPS
    learned = 4.0  # of 5.5, the loss of guessing a byte

    def other_loop(self, twin: nn.Module) -> Loop:
        return OwnLoopWith(self, twin, ema=None)


def run_member(folder: Path, strategy: str) -> None:
    config = Config.from_dict(
        {
            "name": "ema",
            "data": {"global_batch_size": GLOBAL_BATCH_SIZE, "micro_batch_size": MICRO_BATCH_SIZE},
            "optim": {"name": "adamw", "lr": 0.0005},
            "tracking": {"wandb": "off"},  # see tracking.py
            "train": {"steps": (1 + BLOCKS) * STEPS + 1, "ema": {"decay": 0.999}},
            "strategy": {"name": strategy},
        }
    )
    trainer = AveragingTrainer(Bytes(WIDTH, DEPTH), config, folder / "run")
    trainer.fit()
    trainer.finish_member(folder)


def main() -> None:
    what = (
        f"Next byte of Python's library, transformer of 20 million parameters with AdamW, {LENGTH} bytes a sample, "
        f"global batch {GLOBAL_BATCH_SIZE} on {PROCESSES} processes; the weights are averaged after each step. Medians "
        f"of {BLOCKS} alternating blocks of {STEPS} steps, and of the ratios of neighbouring blocks."
    )
    results = ("ema", "The price of an average of the weights", what, "without")
    each_strategy(__file__, run_member, STRATEGIES, PROCESSES, TARGET, results)


if __name__ == "__main__":
    main()
