"""Checks before wrapping whether a stage of ZeRO can train a model, and counts the bytes that a rank would hold."""

import math

import torch
from torch import Tensor, nn

from distrib.errors import ConfigError
from distrib.plan import Memory
from distrib.strategies.memory import MakeOptimizer, empty_like, optimizer_state, size_in_bytes
from distrib.strategies.parameters import dtype_name, refusal, trainable

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)  # DeepSpeed's


def check(module: nn.Module, stage: int, strategy: str) -> None:
    """Raise ConfigError if the stage cannot train the module. `strategy`: the name of the strategy."""
    trained = (torch.float32,) if stage else _DTYPES
    for name, parameter in module.named_parameters():
        if not parameter.ndim and stage == 3:
            others = ("ddp", "zero0", "zero1", "zero2")
            raise refusal(name, f"is a scalar, which {strategy} cannot cut", "give it the shape [1]", others)
        if not parameter.numel() and (stage == 3 or (stage and parameter.requires_grad)):
            what = f"has no elements, which {strategy} cannot cut"
            raise refusal(name, what, "make it a buffer", ("ddp", "zero0"))
        if (stage == 3 and parameter.dtype not in _DTYPES) or (
            parameter.requires_grad and parameter.dtype not in trained
        ):
            raise _dtype_refusal(name, parameter, stage, strategy)


def memory(module: nn.Module, stage: int, world_size: int, whole: int, make_optimizer: MakeOptimizer) -> Memory:
    """Return the bytes that the fullest rank holds at stage 1, 2 or 3.

    ZeRO cuts all parameters as one flat tensor. The optimizer updates a rank's shard of it in fp32. `whole`: at stage 3
    a rank also holds each parameter of up to this many elements whole.
    """
    trained, flat = trainable(module), largest_shards(module, world_size)
    shard = sum(p.numel() for p in flat.values()) * torch.float32.itemsize
    parameters = size_in_bytes(module.parameters())
    if stage == 3:
        parameters = sum(
            (math.ceil(p.numel() / world_size) + (p.numel() if p.numel() <= whole else 0)) * p.element_size()
            for p in module.parameters()
        )
    gradients = size_in_bytes(p for _, p in trained) if stage == 1 else shard
    return Memory(parameters, gradients, shard + optimizer_state(make_optimizer, trained, flat, world_size))


def largest_shards(module: nn.Module, world_size: int) -> dict[str, nn.Parameter]:
    """Return what the fullest rank updates of each trained parameter at stage 1, 2 or 3."""
    return {name: empty_like(p, math.ceil(p.numel() / world_size)) for name, p in trainable(module)}


def _dtype_refusal(name: str, parameter: Tensor, stage: int, strategy: str) -> ConfigError:
    what = f"is {dtype_name(parameter.dtype)}"
    if not parameter.requires_grad:
        return refusal(name, f"{what}, which {strategy} cannot cut", "make it a buffer", ("ddp", "fsdp2"))
    if parameter.is_complex():
        todo = "store it as torch.view_as_real does"
        return refusal(name, f"{what}, which {strategy} cannot update", todo, ("ddp",))
    if not stage:
        return refusal(name, f"{what}, which zero0 cannot reduce", "make it float32", ("ddp", "fsdp2"))
    todo = "make it float32"
    if parameter.dtype in _DTYPES:
        precision = "bf16" if parameter.dtype == torch.bfloat16 else "fp16"
        todo = f"leave the weights in float32 and set train.mixed_precision: {precision}"
    what = f"{what}, and {strategy} would update a float32 copy that is not saved"
    return refusal(name, what, todo, ("ddp", "fsdp2"))
