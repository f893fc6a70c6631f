"""The config's strategy, turned into accelerate's plugins. One way only."""

from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, GradientAccumulationPlugin

from distrib.errors import ConfigError, LaunchError
from distrib.world import World


def resolve(name: str, mixed_precision: str, world: World) -> str:
    """The strategy that runs: `auto` follows the launcher, and a contradiction is refused with both sides named."""
    if world.asked_strategy is not None:
        raise LaunchError(
            f"accelerate launch was told to use {world.asked_strategy}, strategy.name is {name}; this version of "
            "distrib runs single and ddp: take launch/ddp.yaml, or distrib launch"
        )
    if world.asked_precision not in (None, mixed_precision):
        raise LaunchError(
            f"accelerate launch was told to use mixed_precision {world.asked_precision}, but train.mixed_precision is "
            f"{mixed_precision}; give the same to both"
        )
    if name == "single" and world.world_size > 1:
        raise ConfigError(
            f"strategy.name: single, but {world.launcher} started {world.world_size} processes; use ddp or auto, "
            "or start one process"
        )
    if name == "auto":
        return "ddp" if world.world_size > 1 else "single"
    return name


def accelerator(world: World) -> Accelerator:
    """An Accelerator that wraps and places models, and leaves the window and the precision to the engine.

    accelerate ignores fp16 on CPU without a word, so autocast and the loss scale are the engine's on every device.
    """
    return Accelerator(
        cpu=world.use_cpu,
        mixed_precision="no",
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),
        kwargs_handlers=[DistributedDataParallelKwargs(gradient_as_bucket_view=True)],
    )
