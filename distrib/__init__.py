"""distrib: a training run is a function of its config.

The public names are imported when first used, so that `distrib --help` does not wait for torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from distrib.config import Config as Config
    from distrib.errors import DistribError as DistribError
    from distrib.monitor.observer import Observer as Observer
    from distrib.plan import RunPlan as RunPlan
    from distrib.processes.schedulers.base import Scheduler as Scheduler
    from distrib.processes.world import World as World
    from distrib.run_folder.checkpoint import Shard as Shard
    from distrib.samples import Image as Image
    from distrib.samples import Table as Table
    from distrib.samples import Text as Text
    from distrib.strategies.base import Strategy as Strategy
    from distrib.task import Loss as Loss
    from distrib.task import Task as Task
    from distrib.training.own_loop import OwnLoop as OwnLoop
    from distrib.training.trainer import Trainer as Trainer

__version__ = "0.1.0"

_HOME = {
    "Config": "distrib.config",
    "DistribError": "distrib.errors",
    "Image": "distrib.samples",
    "Loss": "distrib.task",
    "Observer": "distrib.monitor.observer",
    "OwnLoop": "distrib.training.own_loop",
    "RunPlan": "distrib.plan",
    "Scheduler": "distrib.processes.schedulers.base",
    "Shard": "distrib.run_folder.checkpoint",
    "Strategy": "distrib.strategies.base",
    "Table": "distrib.samples",
    "Task": "distrib.task",
    "Text": "distrib.samples",
    "Trainer": "distrib.training.trainer",
    "World": "distrib.processes.world",
}
__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'distrib' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
