"""Measures what `train.determinism: bitwise` costs: the time of a step relative to ddp, in the same processes.

python benchmarks/bitwise.py    measure, write results/DATE-bitwise.json and .md
"""

import argparse
import sysconfig
from pathlib import Path
from typing import Any

import torch
from alternating import AlternatingTrainer, Loop, OwnLoopWith, measure, write_results
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

from distrib import Config, Loss, Task

PROCESSES, TARGET = 2, 1.10
WIDTH, DEPTH, LENGTH = 256, 4, 64
GLOBAL_BATCH_SIZE, MICRO_BATCH_SIZE = 32, 8
BLOCKS, STEPS = 11, 8


class Bytes(Task):
    """Predicts the next byte of Python's library with a transformer, by default of 3.3 million parameters."""

    def __init__(self, width: int = WIDTH, depth: int = DEPTH) -> None:
        self.width, self.depth = width, depth

    def train_dataset(self) -> TensorDataset:
        folder = Path(sysconfig.get_paths()["stdlib"])
        text = b"".join(path.read_bytes() for path in sorted(folder.glob("*.py")))[: LENGTH * 4096]
        tokens = torch.frombuffer(bytearray(text), dtype=torch.uint8).long().view(-1, LENGTH)
        return TensorDataset(tokens[:, :-1], tokens[:, 1:])

    def model(self) -> nn.Module:
        width = self.width
        layer = nn.TransformerEncoderLayer(width, 4, 4 * width, dropout=0.0, batch_first=True, norm_first=True)
        return nn.Sequential(nn.Embedding(256, width), nn.TransformerEncoder(layer, self.depth), nn.Linear(width, 256))

    def loss(self, output: Tensor, batch: Any) -> Loss:
        total = F.cross_entropy(output.flatten(0, 1), batch[1].flatten(), reduction="sum")
        return Loss(total, batch[1].numel())


class BitwiseTrainer(AlternatingTrainer):
    blocks_timed, steps_a_block = BLOCKS, STEPS
    learned = 4.0  # of 5.5, the loss of guessing a byte

    def other_loop(self, twin: nn.Module) -> Loop:
        return OwnLoopWith(self, twin, determinism="fast")


def run_member(folder: Path) -> None:
    config = Config.from_dict(
        {
            "name": "bitwise",
            "data": {"global_batch_size": GLOBAL_BATCH_SIZE, "micro_batch_size": MICRO_BATCH_SIZE},
            "optim": {"name": "adamw", "lr": 0.001},
            "tracking": {"wandb": "off"},  # see tracking.py
            "train": {"steps": (1 + BLOCKS) * STEPS + 1, "determinism": "bitwise"},
        }
    )
    trainer = BitwiseTrainer(Bytes(), config, folder / "run")
    trainer.fit()
    trainer.finish_member(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description="bitwise determinism's time a step against ddp's")
    parser.add_argument("--member", type=Path, help=argparse.SUPPRESS)  # how we start ourselves
    arguments = parser.parse_args()
    if arguments.member is not None:
        run_member(arguments.member)
        return
    case = measure(__file__, PROCESSES, TARGET)
    what = (
        f"Next byte of Python's library, transformer of 3.3 million parameters, {LENGTH} bytes a sample, global batch "
        f"{GLOBAL_BATCH_SIZE} in micro-batches of {MICRO_BATCH_SIZE}; medians of {BLOCKS} alternating blocks of "
        f"{STEPS} steps, and of the ratios of neighbouring blocks."
    )
    write_results("bitwise", "The price of bitwise determinism", what, "processes", "ddp", {PROCESSES: case})


if __name__ == "__main__":
    main()
