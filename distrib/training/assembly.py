"""The parts of a run, made from its task and its config: what training, evaluating and explaining have in common."""

from typing import Any

import torch
from torch import nn
from torch.utils.data import Dataset, IterableDataset

from distrib.config import Compile, Config, StrategyConfig
from distrib.errors import ConfigError
from distrib.task import Task
from distrib.training import evaluation
from distrib.training.engine import Engine
from distrib.training.optimizers import build_optimizer
from distrib.training.placement import MakeOptimizer
from distrib.world import World


def model(task: Task, seed: int) -> nn.Module:
    """With the initial weights that belong to `seed`."""
    torch.manual_seed(seed)
    return task.model()


def blocks(task: Task, module: nn.Module, strategy: StrategyConfig, compile: Compile = False) -> list[nn.Module]:
    """The task's blocks. Raises ConfigError where something is to be done to each and there are none."""
    found = task.blocks(module)
    needed = {"strategy.activation_checkpointing": strategy.activation_checkpointing, "train.compile": compile}
    for key, value in needed.items():
        if value in (True, "blocks") and not found:
            raise ConfigError(
                f"{key}: {type(module).__name__} has no repeated blocks that distrib finds; name them in "
                "Task.blocks(model)"
            )
    return found


def train_dataset(task: Task) -> tuple[Dataset[Any], int | None]:
    """And how many samples it has; a stream (an IterableDataset) does not say. Raises ConfigError."""
    dataset = task.train_dataset()
    if isinstance(dataset, IterableDataset):
        return dataset, None
    return _sized(dataset, "train_dataset"), len(dataset)  # type: ignore[arg-type]


def eval_dataset(task: Task) -> Dataset[Any] | None:
    """Raises ConfigError where it has no length, or no samples."""
    dataset = task.eval_dataset()
    if dataset is not None and len(_sized(dataset, "eval_dataset")) == 0:  # type: ignore[arg-type]
        raise ConfigError("task.eval_dataset: it has no samples; return None for no evaluation")
    return dataset


def optimizer_maker(task: Task, config: Config) -> MakeOptimizer:
    """Makes the task's own optimizer, or the config's, over the parameters that it is given."""
    return lambda params: task.optimizer(params) or build_optimizer(config.optim, params, task.decays)


def loading(config: Config, world: World) -> dict[str, Any]:
    """How a DataLoader reads."""
    return {
        "num_workers": config.data.num_workers,
        "prefetch_factor": config.data.prefetch_factor,
        "pin_memory": not world.use_cpu,
    }


def evaluate(engine: Engine, task: Task, dataset: Dataset[Any], config: Config) -> dict[str, float]:
    """The metrics under the names that the run folder has for them."""
    metrics = evaluation.evaluate(engine, task, dataset, config.data.micro_batch_size, **loading(config, engine.world))
    return {f"eval/{key}": value for key, value in metrics.items()}


def _sized(dataset: Dataset[Any], name: str) -> Dataset[Any]:
    if not hasattr(dataset, "__len__"):
        raise ConfigError(f"task.{name}: {type(dataset).__name__} has no __len__; its order could not be repeated")
    return dataset


def batch_norms(module: nn.Module) -> str:
    """The kinds of batch normalisation in it, in words. Their running statistics are those of rank 0's micro-batches,
    so that they depend on the number of processes."""
    kinds = {type(m).__name__ for m in module.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)}
    return ", ".join(sorted(kinds))
