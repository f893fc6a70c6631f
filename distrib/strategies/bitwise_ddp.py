"""single and ddp with `train.determinism: bitwise`: the same bits from any number of processes.

A floating-point sum depends on the order of its terms. So the gradients of a step's micro-batches are summed in a fixed
binary tree, whichever rank computed them. Within a rank, a binary counter does this: it keeps one partial sum for each
level of the tree. Across ranks, each rank sums one part of the gradient, in the order of the tree. The idea is from
EasyScale (SC'23): compute as a fixed number of virtual workers would.
"""

import torch
import torch.distributed as dist
from torch import Tensor, nn

from distrib.errors import ConfigError
from distrib.strategies.base import Strategy
from distrib.strategies.ddp import DDP, require_one_process_for_single
from distrib.strategies.memory import MakeOptimizer
from distrib.strategies.step_sums import SIZE

_BUCKET_BYTES = 4 << 20
_all_gather = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)  # the old name, until torch 2.12


class Bucket:
    """The gradients of some parameters in one flat tensor. Each `p.grad` is a view of it.

    A view has the strides of its parameter, because torch's fused optimizers assume that both have the same layout.
    """

    def __init__(
        self, parameters: list[nn.Parameter], world_size: int, extra: int = 0, device: torch.device | None = None
    ) -> None:
        """`extra`: how many elements to add after the gradients. `device`: used if there are no parameters."""
        self.parameters = parameters
        size = sum(parameter.numel() for parameter in parameters) + extra
        dtype, device = (parameters[0].dtype, parameters[0].device) if parameters else (torch.float32, device)
        self.flat = torch.zeros(-(-size // world_size) * world_size, dtype=dtype, device=device)
        self.extra = self.flat[size - extra : size]
        self.partial: list[tuple[int, Tensor]] = []  # the binary counter: (level, sum of 2^level micro-batches)
        self.missing = len(parameters)  # how many gradients the current backward has not computed yet
        self.received: Tensor | None = None
        self.work: dist.Work | None = None
        offset = 0
        for parameter in parameters:
            own = self.flat[offset : offset + parameter.numel()]
            parameter.grad = own.as_strided(parameter.shape, parameter.stride())
            offset += parameter.numel()

    def count(self) -> None:
        """Add the gradients of a micro-batch to the binary counter."""
        level, left = 0, None
        while self.partial and self.partial[-1][0] == level:
            _, left = self.partial.pop()
            self.flat.add_(left)
            level += 1
        self.partial.append((level, self.flat.clone() if left is None else left.copy_(self.flat)))

    def close(self) -> None:
        """Add all partial sums to the gradients of the last micro-batch."""
        while self.partial:
            self.flat.add_(self.partial.pop()[1])

    def scatter(self) -> None:
        """Start to send each rank its part of this rank's sum."""
        self.received = torch.empty_like(self.flat)
        self.work = dist.all_to_all_single(self.received, self.flat, async_op=True)

    def sum_and_gather(self, world_size: int) -> None:
        """Sum this rank's part over all ranks, in the order of the tree, and start to send the result to all ranks."""
        assert self.work is not None, "scatter comes first"
        assert self.received is not None, "scatter comes first"
        self.work.wait()
        sums = self.received.view(world_size, -1)
        while len(sums) > 1:
            sums = sums[0::2] + sums[1::2]
        self.work = _all_gather(self.flat, sums[0].contiguous(), async_op=True)

    def wait(self) -> None:
        assert self.work is not None, "sum_and_gather comes first"
        self.work.wait()
        self.work = self.received = None


class _Sums:
    """The step sums. They are in the last bucket, so that the loss is also summed in the order of the tree."""

    def __init__(self, bucket: Bucket) -> None:
        self._bucket = bucket

    def result(self) -> Tensor:
        return self._bucket.extra


class BitwiseDDP(Strategy):
    """Every rank holds the whole model. The ranks exchange full buckets while the last backward still runs."""

    Options = DDP.Options  # `check` refuses other values than the defaults
    takes_sparse_gradients = True

    def check(self) -> None:
        require_one_process_for_single(self)
        values = {"communication_dtype": (self.config.strategy.communication_dtype, "fp32")}
        fields = DDP.Options.model_fields
        values |= {key: (value, fields[key].default) for key, value in self.options}
        for key, (value, default) in values.items():
            if value != default:
                raise ConfigError(
                    f"strategy.{key}: {str(value).lower()} is not for train.determinism: bitwise, which reduces "
                    "gradients itself; leave it out"
                )
        micro_batches, data = self.batches.num_micro_batches, self.config.data
        if micro_batches & (micro_batches - 1):
            raise ConfigError(
                f"train.determinism: bitwise sums in a binary tree, and a step has {micro_batches} micro-batches "
                f"({data.global_batch_size} / {data.micro_batch_size}); make it a power of two"
            )

    def wrap(self, module: nn.Module, blocks: list[nn.Module], make_optimizer: MakeOptimizer | None) -> None:
        super().wrap(module, blocks, make_optimizer)
        world = self.world
        if world.use_cpu:
            torch.set_num_threads(1)  # the order in which a kernel sums depends on the number of threads
        else:
            torch.use_deterministic_algorithms(True)
        module.to(world.device)
        self.use_optimizer(make_optimizer)
        self._buckets: list[Bucket] = []
        self._last = False
        self._sent = 0  # how many buckets the current backward has sent
        if self.optimizer is None:
            return
        if world.world_size > 1:
            self.broadcast_state()
        self.watch.begin(module)
        groups = _in_buckets([p for p in reversed(list(module.parameters())) if p.requires_grad])
        if groups[-1][0].dtype not in (torch.float32, torch.float64):
            groups.append([])  # a bucket in float32, in which the step sums are exact
        for number, parameters in enumerate(groups):
            extra = SIZE if number == len(groups) - 1 else 0
            self._buckets.append(Bucket(parameters, world.world_size, extra, world.device))
        self.sums = _Sums(self._buckets[-1])
        for bucket in self._buckets:
            for parameter in bucket.parameters:
                parameter.register_post_accumulate_grad_hook(  # type: ignore[no-untyped-call]
                    lambda _, bucket=bucket: self._arrived(bucket)
                )

    def zero_grad(self) -> None:
        """Clear the gradients in place, because they are views of the buckets."""
        for bucket in self._buckets:
            bucket.flat.zero_()

    def backward(self, total: Tensor, sums: Tensor, last: bool) -> None:
        self._last, self._sent = last, 0
        for bucket in self._buckets:
            bucket.missing = len(bucket.parameters)
        self._buckets[-1].extra.copy_(sums)
        total.backward()  # type: ignore[no-untyped-call]
        self.watch.require_all()
        if not last:
            for bucket in self._buckets:
                bucket.count()
                bucket.flat.zero_()
        elif self.world.world_size > 1:
            for bucket in self._buckets:
                bucket.sum_and_gather(self.world.world_size)
            for bucket in self._buckets:
                bucket.wait()

    def _arrived(self, bucket: Bucket) -> None:
        """Count a gradient. In the last backward, send complete buckets, in an order that all ranks share."""
        bucket.missing -= 1
        while self._last and self._sent < len(self._buckets) and not self._buckets[self._sent].missing:
            full = self._buckets[self._sent]
            full.close()
            if self.world.world_size > 1:
                full.scatter()
            self._sent += 1


def _in_buckets(parameters: list[nn.Parameter]) -> list[list[nn.Parameter]]:
    """Group neighbouring parameters of the same dtype and device, up to a number of bytes."""
    buckets: list[list[nn.Parameter]] = []
    size = 0
    for parameter in parameters:
        like = buckets and (buckets[-1][-1].dtype, buckets[-1][-1].device) == (parameter.dtype, parameter.device)
        own = parameter.numel() * parameter.element_size()
        if not like or size + own > _BUCKET_BYTES:
            buckets.append([])
            size = 0
        buckets[-1].append(parameter)
        size += own
    return buckets
