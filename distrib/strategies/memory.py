"""Counts the bytes that a rank holds. This works on torch's meta device, which allocates no memory."""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from distrib.strategies.optimizer_state import is_elementwise, members_of
from distrib.strategies.owners import assign

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
    world_size: int = 1,
) -> int:
    """Return the bytes of the optimizer's state after a step that updates the parameters; with their `shards`, those of
    the fullest of `world_size` ranks.

    The optimizer is always created with the whole parameters, because a task may group them by shape.
    """
    optimizer = make_optimizer(params)
    whole: set[Tensor] = set()
    if shards is not None:
        groups = [group for one in members_of(optimizer) if not is_elementwise(one) for group in one.param_groups]
        whole.update(parameter for group in groups for parameter in group["params"])
        exchange(optimizer, {id(parameter): shards[name] for name, parameter in params if parameter not in whole})
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    sizes = {
        parameter: size_in_bytes(value for value in state.values() if isinstance(value, Tensor))
        for parameter, state in optimizer.state.items()
    }
    owned = {name: parameter for name, parameter in params if parameter in whole}
    ranks = [0] * world_size
    for name, owner in assign({name: tuple(one.shape) for name, one in owned.items()}, world_size).items():
        ranks[owner] += sizes.get(owned[name], 0)
    return sum(size for parameter, size in sizes.items() if parameter not in whole) + max(ranks)
