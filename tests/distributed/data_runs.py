"""The program that `distrib launch` runs on each rank for test_data_runs: `data_runs.py FOLDER`. It makes all runs that
the tests check: of each task under each strategy."""

import sys
from pathlib import Path
from typing import Any

from cases import SHARDED
from conftest import interrupted

from distrib import Config, Trainer, World
from distrib.training import build

STEPS, EVERY = 24, 9
TASKS = {
    "ragged": "data_tasks:Ragged",
    "weighted": "data_tasks:Weighted",
    "mixed": "data_tasks:Mixed",
    "sharded": "data_tasks:Sharded",
}
WORKERS = "sharded-workers"  # the run that reads with two workers
STRATEGIES = {
    "ragged": ("auto", "fsdp2"),
    "weighted": ("auto", *SHARDED),
    "mixed": ("auto",),  # the order of the samples is the strategy's concern as little as with weights
    "sharded": ("auto", "zero3"),
}


def values(task: str, strategy: str = "auto") -> dict[str, Any]:
    config: dict[str, Any] = {
        "name": "run",
        "seed": 7,
        "task": {"target": TASKS[task]},
        "data": {"global_batch_size": 16, "micro_batch_size": 4},
        "optim": {"name": "sgd", "lr": 0.5},  # Adam would hide a wrong scale of the gradient
        "train": {"steps": STEPS},
        "strategy": {"name": strategy},
        "checkpoint": {"every_steps": EVERY, "keep": 9},
    }
    if strategy == "zero3":  # by default each engine keeps a bucket of 2 GB
        config["strategy"]["deepspeed"] = {"zero_optimization": {"reduce_bucket_size": 10**6}}
    return config


def train(config: Config, folder: Path) -> None:
    Trainer(build.task(config), config, folder).fit()


def main() -> None:
    folder, world = Path(sys.argv[1]), World.detect()
    for task in TASKS:
        for strategy in STRATEGIES[task]:
            train(Config.from_dict(values(task, strategy)), folder / f"{task}-{strategy}")
        if task == "sharded":
            config = values(task)
            train(Config.from_dict({**config, "data": {**config["data"], "num_workers": 2}}), folder / WORKERS)
        if world.is_rank_0:
            interrupted(folder / f"{task}-auto", folder / f"{task}-resumed", after=EVERY)
        world.barrier()
        train(Config.from_dict(values(task)), folder / f"{task}-resumed")


if __name__ == "__main__":
    main()
