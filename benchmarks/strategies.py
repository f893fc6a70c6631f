"""Measures a step's time under each strategy, relative to the shortest loop that uses the same library directly.

python benchmarks/strategies.py                 measure all, write results/DATE-strategies.json and .md
python benchmarks/strategies.py --only zero3    print the time of one
"""

import argparse
from pathlib import Path
from typing import Any

import torch
from alternating import AlternatingTrainer, Loop, measure, write_results
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grad_norm_
from torch.utils.data import DataLoader, DistributedSampler

from distrib import Config
from distrib.processes.world import World
from distrib.tasks.digits import Digits

PROCESSES = 2
TARGET = 1.03  # the largest ratio of distrib's step time to the direct loop's
STRATEGIES = ("ddp", "zero0", "zero1", "zero2", "zero3", "fsdp2")
GLOBAL_BATCH_SIZE = 64
MAX_GRAD_NORM = 1.0
WIDTH, DEPTH = 256, 8
BLOCKS = 15
STEPS = 23  # a block of either, an epoch of the direct loop: 1,438 images, 64 a step


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 2 * WIDTH), nn.GELU(), nn.Linear(2 * WIDTH, WIDTH)
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layers(x)


class Deep(Digits):
    """Classifies digits with 2.1 million parameters in eight blocks."""

    def model(self) -> nn.Module:
        blocks = nn.Sequential(*(Block() for _ in range(DEPTH)))
        return nn.Sequential(nn.Flatten(), nn.Linear(64, WIDTH), blocks, nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 10))


class Direct:
    """Base class of the loops. A subclass for each strategy wraps the model and updates."""

    def __init__(self, module: nn.Module, dataset: Any, world: World) -> None:
        self.sampler = DistributedSampler(dataset, num_replicas=world.world_size, rank=world.rank)
        self.batch_size = GLOBAL_BATCH_SIZE // world.world_size
        self.loader = DataLoader(dataset, batch_size=self.batch_size, sampler=self.sampler)
        self.criterion = nn.CrossEntropyLoss()
        self.wrap(module, world)

    def wrap(self, module: nn.Module, world: World) -> None:
        raise NotImplementedError

    def run_block(self, block: int) -> None:
        self.sampler.set_epoch(block)
        for inputs, targets in self.loader:
            self.update(inputs, targets)

    def update(self, inputs: Tensor, targets: Tensor) -> None:
        self.optimizer.zero_grad()
        self.loss = self.criterion(self.model(inputs), targets)
        self.loss.backward()
        clip_grad_norm_(self.model.parameters(), MAX_GRAD_NORM)
        self.optimizer.step()


class DirectDdp(Direct):
    def wrap(self, module: nn.Module, world: World) -> None:
        self.model = DistributedDataParallel(module, gradient_as_bucket_view=True)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), fused=True)


class DirectFsdp(Direct):
    def wrap(self, module: nn.Module, world: World) -> None:
        mesh = init_device_mesh("cpu", (world.world_size,))
        for block in module[2]:
            fully_shard(block, mesh=mesh)
        self.model = fully_shard(module, mesh=mesh)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), fused=True)


class DirectZero(Direct):
    stage: int

    def wrap(self, module: nn.Module, world: World) -> None:
        import deepspeed  # distrib's engine in this process has configured it for this machine

        optimizer = torch.optim.AdamW(module.parameters(), fused=True)
        config = {
            "train_micro_batch_size_per_gpu": self.batch_size,
            "gradient_clipping": MAX_GRAD_NORM,
            "zero_optimization": {"stage": self.stage},
            "zero_allow_untested_optimizer": True,
        }
        self.model, *_ = deepspeed.initialize(model=module, optimizer=optimizer, config=config)

    def update(self, inputs: Tensor, targets: Tensor) -> None:
        self.loss = self.criterion(self.model(inputs), targets)
        self.model.backward(self.loss)
        self.model.step()


class StrategiesTrainer(AlternatingTrainer):
    blocks_timed, steps_a_block = BLOCKS, STEPS

    def other_loop(self, twin: nn.Module) -> Loop:
        name = self.strategy.name
        kinds = {"ddp": DirectDdp, "fsdp2": DirectFsdp}
        kind = kinds.get(name) or type("DirectZero", (DirectZero,), {"stage": int(name[-1])})
        return kind(twin, self.train_dataset, self.world)


def run_member(folder: Path, strategy: str) -> None:
    """Run one process of one case."""
    config = Config.from_dict(
        {
            "name": "strategies",
            "data": {"global_batch_size": GLOBAL_BATCH_SIZE, "micro_batch_size": GLOBAL_BATCH_SIZE // PROCESSES},
            "optim": {"name": "adamw", "lr": 0.001, "weight_decay": 0.01},  # torch's defaults, which the other has
            "tracking": {"wandb": "off"},  # see tracking.py
            "train": {"steps": (1 + BLOCKS) * STEPS + 1, "max_grad_norm": MAX_GRAD_NORM},
            "strategy": {"name": strategy},
        }
    )
    trainer = StrategiesTrainer(Deep(), config, folder / "run")
    trainer.fit()
    trainer.finish_member(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description="distrib's time a step against that of the library underneath")
    parser.add_argument("--only", choices=STRATEGIES, help="measure one, and write no results")
    parser.add_argument("--member", type=Path, help=argparse.SUPPRESS)  # how we start ourselves
    arguments = parser.parse_args()
    if arguments.member is not None:
        run_member(arguments.member, arguments.only)
        return
    if arguments.only:
        case = measure(__file__, PROCESSES, TARGET, "--only", arguments.only)
        print(arguments.only, case["medians"], case["ratio"])
        return
    cases = {name: measure(__file__, PROCESSES, TARGET, "--only", name) for name in STRATEGIES}
    what = (
        f"Digits, residual MLP of 2.1 million parameters in {DEPTH} blocks, global batch {GLOBAL_BATCH_SIZE}, "
        f"{PROCESSES} processes, clipping; medians of {BLOCKS} alternating blocks of {STEPS} steps, and of the ratios "
        "of neighbouring blocks."
    )
    write_results("strategies", "Strategies against the libraries underneath", what, "strategy", "direct loop", cases)


if __name__ == "__main__":
    main()
