"""Counts the bytes that a rank holds. This works on torch's meta device, which allocates no memory."""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

MakeOptimizer = Callable[[list[tuple[str, nn.Parameter]]], Optimizer]


def size_in_bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def averaged_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of the average of such weights: at least fp32."""
    return torch.promote_types(dtype, torch.float32)


def empty_like(parameter: nn.Parameter, *shape: int) -> nn.Parameter:
    """Return a parameter of another shape, for example a shard."""
    return nn.Parameter(torch.empty(shape, dtype=parameter.dtype, device=parameter.device))


def exchange(optimizer: Optimizer, shards: dict[int, nn.Parameter]) -> None:
    """Replace the parameters of an optimizer by their shards. `shards`: a shard for the `id` of each parameter.

    Some optimizers (Adagrad) have state before the first step. It is cut to the shape of the shard.
    """
    for group in optimizer.param_groups:
        for index, parameter in enumerate(group["params"]):
            shard = shards.get(id(parameter), parameter)
            group["params"][index] = shard
            for key, value in optimizer.state.pop(parameter, {}).items():
                fits = isinstance(value, Tensor) and value.shape == parameter.shape
                optimizer.state[shard][key] = value.flatten()[: shard.numel()].view_as(shard).clone() if fits else value


def optimizer_state(
    make_optimizer: MakeOptimizer,
    params: list[tuple[str, nn.Parameter]],
    shards: dict[str, nn.Parameter] | None = None,
) -> int:
    """Return the bytes of the optimizer's state after a step that updates the parameters, or their `shards`.

    The optimizer is always created with the whole parameters, because a task may group them by shape.
    """
    optimizer = make_optimizer(params)
    if shards is not None:
        exchange(optimizer, {id(parameter): shards[name] for name, parameter in params})
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    states = optimizer.state.values()
    return size_in_bytes(value for state in states for value in state.values() if isinstance(value, Tensor))
