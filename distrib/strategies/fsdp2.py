"""fsdp2: torch's fully_shard. It cuts parameters, gradients and optimizer state along their first dimension."""

import math
from typing import Any, Literal, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor

from distrib.plan import Memory
from distrib.run_folder.checkpoint import Shard
from distrib.strategies.base import DTYPES, Number, Strategy
from distrib.strategies.memory import MakeOptimizer, empty_like, optimizer_state, size_in_bytes
from distrib.strategies.parameters import dtype_name, make_contiguous, refusal, trainable

_NOT_GATHERED = ("mixed torch.Tensor and DTensor", "out of bounds for storage of size 0")


class FSDP2(Strategy):
    """Gathers each block for its forward and backward. Gradients are reduced after each micro-batch, so no rank holds
    them whole."""

    class Options(Strategy.Options):
        offload: Literal["none", "all"] = "none"  # all: parameters and optimizer state are in CPU memory
        reshard_after_forward: bool = True  # false: a block stays gathered until its backward

    evaluates_as = "fsdp2"
    forward_is_collective = True
    cuts_updates = True

    @property
    def shard_size(self) -> int:
        """The number of ranks that hold one copy of the model."""
        return self.world.world_size

    @property
    def copies(self) -> int:
        """The number of copies of the model."""
        return self.world.world_size // self.shard_size

    def mesh(self) -> DeviceMesh:
        """Return the mesh for fully_shard. Rank r holds shard r % shard_size of copy r // shard_size. Collective."""
        return init_device_mesh(self.world.device.type, (self.world.world_size,))

    def check_model(self, module: nn.Module, blocks: list[nn.Module]) -> None:
        for name, parameter in module.named_parameters():
            if not parameter.ndim:
                others = ("ddp", "zero0", "zero1", "zero2")
                raise refusal(name, f"is a scalar, which {self.name} cannot cut", "give it the shape [1]", others)
            if not parameter.numel() and parameter.requires_grad:
                what = f"has no elements, which {self.name} cannot cut"
                raise refusal(name, what, "make it a buffer", ("ddp", "zero0"))
        # Parameters that are gathered together must have the same dtype.
        owner = {id(parameter): block for block in blocks for parameter in block.parameters()}
        first: dict[int, tuple[str, nn.Parameter]] = {}
        for name, parameter in trainable(module):
            other, like = first.setdefault(id(owner.get(id(parameter), module)), (name, parameter))
            if parameter.dtype != like.dtype:
                raise refusal(
                    name,
                    f"is {dtype_name(parameter.dtype)} and {other} {dtype_name(like.dtype)}, and {self.name} gathers "
                    "both at once",
                    "give them one dtype, or separate Task.blocks",
                    ("ddp",),
                )

    def memory(self, module: nn.Module, make_optimizer: MakeOptimizer) -> Memory:
        """Count shards: each parameter is cut along its first dimension, and padded so that all shards are equal."""
        shards = self.largest_shards(module)
        return Memory(
            parameters=sum(size_in_bytes([p[:1]]) * self._rows(p) for p in module.parameters()),
            gradients=size_in_bytes(shards.values()),
            optimizer_state=optimizer_state(make_optimizer, trainable(module), shards, self.world.world_size),
        )

    def largest_shards(self, module: nn.Module) -> dict[str, nn.Parameter]:
        return {name: empty_like(p, self._rows(p), *p.shape[1:]) for name, p in trainable(module)}

    def _rows(self, parameter: nn.Parameter) -> int:
        return math.ceil(parameter.shape[0] / self.shard_size)

    def explain_error(self, error: Exception) -> str | None:
        if not any(part in str(error) for part in _NOT_GATHERED):
            return None
        return not_gathered(self.name, error)

    def wrap(self, module: nn.Module, blocks: list[nn.Module], make_optimizer: MakeOptimizer | None) -> None:
        super().wrap(module, blocks, make_optimizer)
        self.world.require_group()
        make_contiguous(module)
        self.broadcast_state()
        compressed = self.config.strategy.communication_dtype == "bf16"
        options: dict[str, Any] = {
            "mesh": self.mesh(),
            # Parameters are stored in fp32. Autocast sets the precision of each operation, as under every strategy.
            "mp_policy": MixedPrecisionPolicy(
                param_dtype=DTYPES.get(self.config.train.mixed_precision) if compressed else None,
                reduce_dtype=torch.bfloat16 if compressed else None,
            ),
            "offload_policy": CPUOffloadPolicy(pin_memory=not self.world.use_cpu)
            if self.options.offload == "all"
            else OffloadPolicy(),
        }
        for block in blocks:
            fully_shard(block, reshard_after_forward=self.options.reshard_after_forward, **options)
        fully_shard(module, **options)  # the parameters outside of blocks: resharding these after forward would not pay
        self.use_optimizer(make_optimizer)  # its parameters are the shards
        self.give_owners()
        self.watch.begin(module)

    def backward(self, total: Tensor, sums: Tensor, last: bool) -> None:
        super().backward(total, sums, last)
        self.watch.require_all()

    def update(self, factor: Number, max_grad_norm: float | None) -> Number:
        return super().update(factor * self.world.world_size, max_grad_norm)  # torch averages over the ranks

    def shard_of(self, tensor: Tensor) -> Shard:
        if not isinstance(tensor, DTensor):
            return super().shard_of(tensor)
        rows, *others = tensor.shape
        copy, shard = divmod(self.world.rank, self.shard_size)
        first = min(rows, shard * math.ceil(rows / self.shard_size))
        local = cast(DTensor, tensor.detach()).to_local()
        return Shard(local, tuple(tensor.shape), first * math.prod(others), copy, self.copies)

    def publish(self) -> None:
        for part in self.module.modules():
            if isinstance(part, FSDPModule):
                part.reshard()  # some stay gathered after a forward

    def gradients(self) -> list[Tensor]:
        return [g.to_local() if isinstance(g, DTensor) else g for g in super().gradients()]

    def norm(self, gradients: list[Tensor]) -> Tensor:
        square = super().norm(gradients).double() ** 2
        if self.world.world_size > 1:
            dist.all_reduce(square, group=self.world.control if square.device.type == "cpu" else None)
        return (square / self.copies).sqrt()


def not_gathered(strategy: str, error: Exception) -> str:
    """Return the line for an error that occurs if the task uses a parameter of which this rank holds only a shard."""
    return (
        f"task: uses parameters that {strategy} has not gathered ({str(error).splitlines()[0]}); it gathers a module's "
        "when forward is called, so call methods, read parameters and take gradients of gradients in the model's "
        "forward, or take strategy.name ddp"
    )
