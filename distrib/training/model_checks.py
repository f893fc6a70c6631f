"""Models that a strategy cannot train: refused before training, with the parameter and what to do."""

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer

from distrib.errors import ConfigError
from distrib.run_folder.checkpoint import named_state
from distrib.strategies.base import Strategy
from distrib.strategies.optimizer_state import members_of
from distrib.strategies.parameters import refusal, trainable


def check_module(module: nn.Module, strategy: Strategy, blocks: list[nn.Module]) -> None:
    """Raise ConfigError if the strategy cannot train the module's parameters, or no checkpoint could hold them."""
    if not trainable(module):
        raise ConfigError(f"task.model: {type(module).__name__} has no parameter to train")
    for key, tensor in [*module.named_parameters(), *module.named_buffers()]:
        if is_lazy(tensor):
            raise refusal(key, "has no shape yet (a lazy module)", "run a batch through the model in Task.model")
        if tensor.is_meta:
            raise refusal(key, "is on the meta device and has no values", "give it values in Task.model")
    _check_state(module)
    for key, parameter in module.named_parameters():
        if not _is_dense(parameter):
            raise refusal(key, "shares memory between its elements, or has gaps", "take a copy, .contiguous()")
    strategy.check_model(module, blocks)
    for key, part in module.named_modules():
        embeds = isinstance(part, nn.Embedding | nn.EmbeddingBag)
        if embeds and part.sparse and part.weight.requires_grad and not strategy.takes_sparse_gradients:
            raise refusal(f"{key}.weight", "has sparse gradients", "build the embedding with sparse=False")
        if isinstance(part, nn.SyncBatchNorm) and strategy.world.world_size > 1:
            raise ConfigError(
                f"task.model: {key} is a SyncBatchNorm, which normalises over as many micro-batches as there are "
                "processes; take BatchNorm, whose running statistics are those of all micro-batches anyway"
            )


def refuse_optimizer(optimizer: Optimizer, strategy: Strategy, own: bool) -> None:
    """Raise ConfigError if the optimizer cannot update the strategy's shards. `own`: the task made it."""
    for member in members_of(optimizer):
        classes = {kind.__name__.lower() for kind in type(member).__mro__}
        if not classes & set(strategy.refused_optimizers):
            continue
        key = "task.optimizer" if own else "optim.name" if member is optimizer else "optim.groups"
        raise ConfigError(
            f"{key}: {type(member).__name__} cannot update the shards of {strategy.name}; take another optimizer, "
            "or strategy.name ddp"
        )


def _check_state(module: nn.Module) -> None:
    """Raises ConfigError if a checkpoint could not hold the module, or would hold only some of it."""
    named, _ = named_state(module)
    saved = {id(tensor) for tensor in named.values()}
    dtypes: dict[torch.dtype, str] = {}
    for name, tensor in named.items():
        if tensor.layout != torch.strided:
            raise ConfigError(f"task.model: {name} is a tensor of layout {tensor.layout}, which cannot be saved")
        dtypes.setdefault(tensor.dtype, name)
    for dtype, name in dtypes.items():
        try:
            safetensors.torch.save({name: torch.empty(1, dtype=dtype)})
        except (KeyError, TypeError, ValueError, SafetensorError):
            raise ConfigError(f"task.model: {name} is a tensor of {dtype}, which cannot be saved") from None
    for name, parameter in module.named_parameters():
        if id(parameter) not in saved:
            raise ConfigError(
                f"task.model: the parameter {name} is not in the model's state_dict, and would not be saved; return "
                "all parameters from it, export only some of them in Task.export"
            )
    for name, part in module.named_modules():
        for key, buffer in part._buffers.items():
            if buffer is not None and key not in part._non_persistent_buffers_set and id(buffer) not in saved:
                raise ConfigError(
                    f"task.model: the buffer {f'{name}.{key}'.lstrip('.')} is not in the model's state_dict, and would "
                    "not be saved; register it with persistent=False if that is meant"
                )


def _is_dense(tensor: Tensor) -> bool:
    """Return whether the elements fill a piece of memory, each of them once, in any order of dimensions."""
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1 and stride != expected:
            return not tensor.numel()
        expected *= size
    return True
