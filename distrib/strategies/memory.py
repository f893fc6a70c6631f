"""Counts the bytes that a rank holds. Works on torch's meta device, where nothing is allocated."""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

MakeOptimizer = Callable[[list[tuple[str, nn.Parameter]]], Optimizer]


def size_in_bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def empty_like(parameter: nn.Parameter, *shape: int) -> nn.Parameter:
    """A parameter of another shape, such as the shard of one."""
    return nn.Parameter(torch.empty(shape, dtype=parameter.dtype, device=parameter.device))


def optimizer_state(make_optimizer: MakeOptimizer, params: list[tuple[str, nn.Parameter]]) -> int:
    """Bytes that the optimizer keeps after a step over these parameters."""
    for _, parameter in params:
        parameter.grad = torch.zeros_like(parameter)
    optimizer = make_optimizer(params)
    optimizer.step()
    states = optimizer.state.values()
    return size_in_bytes(value for state in states for value in state.values() if isinstance(value, Tensor))
