"""Measures the time of distrib's step relative to the DDP loop of the PyTorch tutorial, see README.md.

python benchmarks/overhead.py             measure with 1 and with 2 processes, write results/DATE-overhead.json and .md
python benchmarks/overhead.py --profile   print where distrib's steps spend their time
"""

import argparse
import cProfile
from pathlib import Path

import profiles
from alternating import AlternatingTrainer, Loop, measure, write_results
from torch import nn, optim
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from distrib import Config
from distrib.processes.world import World
from distrib.task import load_task

TARGETS = {1: 0.90, 2: 1.00}  # by number of processes: the largest ratio of distrib's step time to the plain loop's
GLOBAL_BATCH_SIZE = 64
BLOCKS = 15
EPOCHS = 5  # of the plain loop, a block
STEPS = 23 * EPOCHS  # a block of either: 1,438 images, 64 a step


class PlainLoop:
    """The tutorial's Trainer, with AdamW: pytorch.org/tutorials/beginner/ddp_series_multigpu.html"""

    def __init__(self, model: nn.Module, dataset: TensorDataset, world: World) -> None:
        self.sampler = DistributedSampler(dataset, num_replicas=world.world_size, rank=world.rank)
        self.loader = DataLoader(dataset, batch_size=GLOBAL_BATCH_SIZE // world.world_size, sampler=self.sampler)
        self.model = DistributedDataParallel(model) if world.world_size > 1 else model
        self.optimizer = optim.AdamW(self.model.parameters())
        self.criterion = nn.CrossEntropyLoss()
        assert len(self.loader) * EPOCHS == STEPS, "the loops must make equally many steps"

    def run_block(self, block: int) -> None:
        for epoch in range(block * EPOCHS, (block + 1) * EPOCHS):
            self.sampler.set_epoch(epoch)
            for inputs, targets in self.loader:
                self.optimizer.zero_grad()
                output = self.model(inputs)
                self.loss = self.criterion(output, targets)
                self.loss.backward()
                self.optimizer.step()


class OverheadTrainer(AlternatingTrainer):
    blocks_timed, steps_a_block = BLOCKS, STEPS

    def other_loop(self, twin: nn.Module) -> Loop:
        return PlainLoop(twin, self.train_dataset, self.world)


def run_member(folder: Path, profiled: bool) -> None:
    """Run one process of one case."""
    config = Config.from_dict(
        {
            "name": "overhead",
            "task": {"target": "distrib.tasks.digits:Digits", "network": "mlp"},
            "data": {
                "global_batch_size": GLOBAL_BATCH_SIZE,
                "micro_batch_size": GLOBAL_BATCH_SIZE // World.detect().world_size,
            },
            "optim": {"name": "adamw", "lr": 0.001, "weight_decay": 0.01},  # torch's defaults, which the other has
            "tracking": {"wandb": "off"},  # see tracking.py
            "train": {"steps": (1 + BLOCKS) * STEPS + 1, "max_grad_norm": None},  # the tutorial does not clip
        }
    )
    trainer = OverheadTrainer(load_task(config.task), config, folder / "run")
    trainer.profile = cProfile.Profile() if profiled else None
    trainer.fit()
    trainer.finish_member(folder)
    if trainer.profile is not None and trainer.world.is_rank_0:
        print("\n".join(profiles.table(trainer.profile, (1 + BLOCKS) * STEPS, "rank 0")))


def main() -> None:
    parser = argparse.ArgumentParser(description="distrib's time a step against that of the plain DDP loop")
    parser.add_argument("--profile", action="store_true", help="print where distrib's steps spend their time")
    parser.add_argument("--member", type=Path, help=argparse.SUPPRESS)  # how we start ourselves
    arguments = parser.parse_args()
    if arguments.member is not None:
        run_member(arguments.member, arguments.profile)
        return
    profiling = ["--profile"] if arguments.profile else []
    cases = {processes: measure(__file__, processes, target, *profiling) for processes, target in TARGETS.items()}
    if arguments.profile:
        return
    what = (
        f"Digits MLP, global batch {GLOBAL_BATCH_SIZE}; medians of {BLOCKS} alternating blocks of {STEPS} steps, "
        "and of the ratios of neighbouring blocks."
    )
    write_results("overhead", "Overhead a step", what, "processes", "plain DDP loop", cases)


if __name__ == "__main__":
    main()
