"""Measures a step with Muon where ranks hold shards, relative to one under ddp, in the same processes.

python benchmarks/muon.py                 measure, write results/DATE-muon.json and .md
python benchmarks/muon.py --only fsdp2    print the time under one strategy
"""

from pathlib import Path

from alternating import AlternatingTrainer, Loop, OwnLoopWith, each_strategy
from bitwise import LENGTH, Bytes
from torch import nn

from distrib import Config

PROCESSES, TARGET = 2, 1.15
STRATEGIES = ("fsdp2", "zero2", "zero3")
WIDTH, DEPTH = 528, 6  # 20 million parameters
GLOBAL_BATCH_SIZE, MICRO_BATCH_SIZE = 16, 8
MUON = {"match": "1.layers.*", "ndim": 2, "name": "muon", "lr": 0.01}
BLOCKS, STEPS = 15, 2


class MuonTrainer(AlternatingTrainer):
    blocks_timed, steps_a_block = BLOCKS, STEPS
    learned = 4.0  # of 5.5, the loss of guessing a byte

    def other_loop(self, twin: nn.Module) -> Loop:
        return OwnLoopWith(self, twin, strategy_name="ddp")


def run_member(folder: Path, strategy: str) -> None:
    config = Config.from_dict(
        {
            "name": "muon",
            "data": {"global_batch_size": GLOBAL_BATCH_SIZE, "micro_batch_size": MICRO_BATCH_SIZE},
            "optim": {"name": "adamw", "lr": 0.0005, "groups": [MUON]},
            "tracking": {"wandb": "off"},  # see tracking.py
            "train": {"steps": (1 + BLOCKS) * STEPS + 1},
            "strategy": {"name": strategy},
        }
    )
    trainer = MuonTrainer(Bytes(WIDTH, DEPTH), config, folder / "run")
    trainer.fit()
    trainer.finish_member(folder)


def main() -> None:
    what = (
        f"Next byte of Python's library, transformer of 20 million parameters, the matrices of its blocks with Muon "
        f"and the rest with AdamW, {LENGTH} bytes a sample, global batch {GLOBAL_BATCH_SIZE} on {PROCESSES} processes. "
        f"Medians of {BLOCKS} alternating blocks of {STEPS} steps, and of the ratios of neighbouring blocks."
    )
    results = ("muon", "Muon over shards", what, "ddp")
    each_strategy(__file__, run_member, STRATEGIES, PROCESSES, TARGET, results)


if __name__ == "__main__":
    main()
