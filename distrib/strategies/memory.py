"""Bytes that a rank holds under a strategy, counted on torch's meta device: nothing is allocated."""

import math
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from distrib.config import StrategyConfig
from distrib.errors import DistribError
from distrib.plan import Memory
from distrib.strategies.base import MakeOptimizer, trainable
from distrib.strategies.deepspeed_config import persistence_threshold
from distrib.task import Task
from distrib.tracebacks import first_line


def plan_memory(
    task: Task,
    strategy: StrategyConfig,
    world_size: int,
    make_optimizer: MakeOptimizer,
    warn: Callable[[str], None] = lambda _: None,
) -> Memory:
    """Of the task's model under a resolved strategy, whose offload moves some of it to the CPU's memory.

    Models and optimizers that look at values cannot be built on the meta device; they are built on the CPU, which
    `warn` is told first.
    """
    try:
        with torch.device("meta"):
            module = task.model()
        return _count(module, strategy, world_size, make_optimizer)
    except DistribError:
        raise
    except Exception as error:
        warn(f"the model is built in memory, as it cannot be built on torch's meta device: {first_line(error)}")
        return _count(task.model(), strategy, world_size, make_optimizer)


def _count(module: nn.Module, strategy: StrategyConfig, world_size: int, make_optimizer: MakeOptimizer) -> Memory:
    parameters, trained = list(module.parameters()), trainable(module)
    all_bytes = _bytes(parameters)
    name = strategy.name
    if name == "fsdp2":  # each is cut along its first dimension, and padded to equal shards
        shards = [(key, _empty(p, math.ceil(p.shape[0] / world_size), *p.shape[1:])) for key, p in trained]
        all_bytes = sum(_bytes([p[:1]]) * math.ceil(p.shape[0] / world_size) for p in parameters)
        return Memory(all_bytes, _bytes(p for _, p in shards), _optimizer_state(make_optimizer, shards))
    if name in ("zero1", "zero2", "zero3"):  # cut as one flat tensor, whose shard in fp32 is what the optimizer updates
        flat = [(key, _empty(p, math.ceil(p.numel() / world_size))) for key, p in trained]
        shard = sum(p.numel() for _, p in flat) * torch.float32.itemsize
        if name == "zero3":  # small ones stay whole beside their shards
            whole = persistence_threshold(strategy)
            all_bytes = sum(
                (math.ceil(p.numel() / world_size) + (p.numel() if p.numel() <= whole else 0)) * p.element_size()
                for p in parameters
            )
        gradients = _bytes(p for _, p in trained) if name == "zero1" else shard
        return Memory(all_bytes, gradients, shard + _optimizer_state(make_optimizer, flat))
    return Memory(all_bytes, _bytes(p for _, p in trained), _optimizer_state(make_optimizer, trained))


def _optimizer_state(make_optimizer: MakeOptimizer, params: list[tuple[str, nn.Parameter]]) -> int:
    """What the optimizer has made after a step."""
    for _, parameter in params:
        parameter.grad = torch.zeros_like(parameter)
    optimizer = make_optimizer(params)
    optimizer.step()
    return _bytes(value for state in optimizer.state.values() for value in state.values() if isinstance(value, Tensor))


def _empty(like: nn.Parameter, *shape: int) -> nn.Parameter:
    return nn.Parameter(torch.empty(shape, dtype=like.dtype, device=like.device))


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
