"""fsdp2: torch's fully_shard. Parameters, gradients and optimizer state are cut along their first dimension."""

import math
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor

from distrib.config import StrategyConfig
from distrib.processes.world import World
from distrib.run_folder.checkpoint import Shard
from distrib.strategies.base import DTYPES, MakeOptimizer, Number, Strategy, make_contiguous
from distrib.strategies.step_sums import AllReducedSums


class FSDP2(Strategy):
    """Each block is gathered for its forward and backward. Gradients are reduced after each micro-batch, so that they
    are never held whole."""

    forward_is_collective = True

    def __init__(
        self,
        world: World,
        module: nn.Module,
        make_optimizer: MakeOptimizer | None,
        config: StrategyConfig,
        blocks: list[nn.Module],
        mixed_precision: str,
    ) -> None:
        super().__init__(world, module)
        world.require_group()
        make_contiguous(module)
        self.broadcast_state()
        compressed = config.communication_dtype == "bf16"
        options: dict[str, Any] = {
            "mesh": init_device_mesh(world.device.type, (world.world_size,)),
            # Autocast decides the precision of each operation, as under every strategy; parameters lie in fp32.
            "mp_policy": MixedPrecisionPolicy(
                param_dtype=DTYPES.get(mixed_precision) if compressed else None,
                reduce_dtype=torch.bfloat16 if compressed else None,
            ),
            "offload_policy": CPUOffloadPolicy(pin_memory=not world.use_cpu)
            if config.offload == "all"
            else OffloadPolicy(),
        }
        for block in blocks:
            fully_shard(block, reshard_after_forward=config.reshard_after_forward, **options)
        fully_shard(module, **options)  # for what is in no block, resharding after forward would not pay
        self.model = self.evaluation_model = module
        self.sums = AllReducedSums(world)
        self.use_optimizer(make_optimizer)  # over the shards
        self._watch_use()

    def backward(self, total: Tensor, sums: Tensor, last: bool) -> None:
        super().backward(total, sums, last)
        self._require_use()

    def update(self, factor: Number, max_grad_norm: float | None) -> Number:
        return super().update(factor * self.world.world_size, max_grad_norm)  # torch leaves the mean over the ranks

    def _shard(self, tensor: Tensor) -> Shard:
        if not isinstance(tensor, DTensor):
            return super()._shard(tensor)
        rows, *others = tensor.shape
        first = min(rows, self.world.rank * math.ceil(rows / self.world.world_size))
        local = cast(DTensor, tensor.detach()).to_local()
        return Shard(local, tuple(tensor.shape), offset=first * math.prod(others))

    def _gradients(self) -> list[Tensor]:
        return [g.to_local() if isinstance(g, DTensor) else g for g in super()._gradients()]

    def _norm(self, gradients: list[Tensor]) -> Tensor:
        square = super()._norm(gradients).double() ** 2
        if self.world.world_size > 1:
            dist.all_reduce(square, group=self.world.control if square.device.type == "cpu" else None)
        return square.sqrt()
