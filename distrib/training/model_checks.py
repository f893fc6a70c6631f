"""Models that a strategy cannot train: refused before training, with the parameter and what to do."""

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from distrib.config import Config, StrategyConfig
from distrib.errors import ConfigError
from distrib.strategies.base import named_state

_SHARDED = ("zero1", "zero2", "zero3")
_CUT = (*_SHARDED, "fsdp2")
_DEEPSPEED = (torch.float32, torch.float16, torch.bfloat16)
_TRAINED_BY: dict[str, tuple[torch.dtype, ...]] = {"zero0": _DEEPSPEED, **dict.fromkeys(_SHARDED, (torch.float32,))}


def check_module(
    module: nn.Module, config: Config, strategy: StrategyConfig, blocks: list[nn.Module], world_size: int
) -> None:
    """Raise ConfigError if the resolved strategy cannot train the module's parameters, or no checkpoint hold them."""
    name = strategy.name
    bitwise = config.train.determinism == "bitwise"
    for key, tensor in [*module.named_parameters(), *module.named_buffers()]:
        if is_lazy(tensor):
            raise _refusal(key, "has no shape yet (a lazy module)", "run a batch through the model in Task.model")
        if tensor.is_meta:
            raise _refusal(key, "is on the meta device and has no values", "give it values in Task.model")
    _check_state(module)
    for key, parameter in module.named_parameters():
        if not _is_dense(parameter):
            raise _refusal(key, "shares memory between its elements, or has gaps", "take a copy, .contiguous()")
        if not parameter.ndim and name in ("zero3", "fsdp2"):
            others = ("ddp", "zero0", "zero1", "zero2")
            raise _refusal(key, f"is a scalar, which {name} cannot cut", "give it the shape [1]", others)
        if not parameter.numel() and (name == "zero3" or (parameter.requires_grad and name in _CUT)):
            raise _refusal(key, f"has no elements, which {name} cannot cut", "make it a buffer", ("ddp", "zero0"))
        if name == "zero3" and parameter.dtype not in _DEEPSPEED:
            raise _dtype_refusal(key, parameter, name)
        if parameter.requires_grad and parameter.dtype not in _TRAINED_BY.get(name, (parameter.dtype,)):
            raise _dtype_refusal(key, parameter, name)
    if name == "fsdp2":
        _check_groups(module, blocks)
    for key, part in module.named_modules():
        embeds = isinstance(part, nn.Embedding | nn.EmbeddingBag)
        if embeds and part.sparse and part.weight.requires_grad and not bitwise:
            raise _refusal(f"{key}.weight", "has sparse gradients", "build the embedding with sparse=False")
        if isinstance(part, nn.SyncBatchNorm) and world_size > 1:
            raise ConfigError(
                f"task.model: {key} is a SyncBatchNorm, which normalises over as many micro-batches as there are "
                "processes; take BatchNorm, whose running statistics are those of all micro-batches anyway"
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


def _check_groups(module: nn.Module, blocks: list[nn.Module]) -> None:
    """Raise ConfigError if fully_shard would have to gather trained parameters of several dtypes at once."""
    owner = {id(parameter): block for block in blocks for parameter in block.parameters()}
    first: dict[int, tuple[str, nn.Parameter]] = {}
    for key, parameter in module.named_parameters():
        if parameter.requires_grad:
            other, like = first.setdefault(id(owner.get(id(parameter), module)), (key, parameter))
            if parameter.dtype != like.dtype:
                raise _refusal(
                    key,
                    f"is {_text(parameter.dtype)} and {other} {_text(like.dtype)}, and fsdp2 gathers both at once",
                    "give them one dtype, or separate Task.blocks",
                    ("ddp",),
                )


def _dtype_refusal(key: str, parameter: Tensor, name: str) -> ConfigError:
    what = f"is {_text(parameter.dtype)}"
    if not parameter.requires_grad:
        return _refusal(key, f"{what}, which {name} cannot cut", "make it a buffer", ("ddp", "fsdp2"))
    if parameter.is_complex():
        return _refusal(key, f"{what}, which {name} cannot update", "store it as torch.view_as_real does", ("ddp",))
    if name == "zero0":
        return _refusal(key, f"{what}, which zero0 cannot reduce", "make it float32", ("ddp", "fsdp2"))
    todo = "make it float32"
    if parameter.dtype in _DEEPSPEED:
        precision = "bf16" if parameter.dtype == torch.bfloat16 else "fp16"
        todo = f"leave the weights in float32 and set train.mixed_precision: {precision}"
    return _refusal(key, f"{what}, and {name} would update a float32 copy that is not saved", todo, ("ddp", "fsdp2"))


def _refusal(key: str, what: str, todo: str, strategies: tuple[str, ...] = ()) -> ConfigError:
    *most, last = strategies or ("",)
    others = f", or take strategy.name {', '.join(most)}{' or ' if most else ''}{last}" if last else ""
    return ConfigError(f"task.model: {key} {what}; {todo}{others}")


def _text(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _is_dense(tensor: Tensor) -> bool:
    """Return whether the elements fill a piece of memory, each of them once, in any order of dimensions."""
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1 and stride != expected:
            return not tensor.numel()
        expected *= size
    return True
