"""single and ddp: every rank holds the whole model. Uses accelerate."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, GradientAccumulationPlugin
from torch import Tensor, nn

from distrib.errors import ConfigError
from distrib.strategies.base import Number, Strategy
from distrib.strategies.memory import MakeOptimizer
from distrib.strategies.step_sums import SumsInBuckets

_UNREDUCED = "Expected to have finished reduction in the prior iteration"


class DDP(Strategy):
    """Uses DDP if there are several processes. Gradients are all-reduced in the last micro-batch's backward."""

    class Options(Strategy.Options):
        find_unused_parameters: bool = False  # for models that do not use all parameters in each step
        static_graph: bool = False  # the model uses the same parameters in each step, so DDP may optimise

    @classmethod
    def bitwise(cls) -> type[Strategy]:
        from distrib.strategies.bitwise_ddp import BitwiseDDP

        return BitwiseDDP

    def check(self) -> None:
        require_one_process_for_single(self)

    def explain_error(self, error: Exception) -> str | None:
        if _UNREDUCED not in str(error):
            return None
        return (
            "task: in a step some parameters got no gradient, for which ddp waits; use them in every step, freeze "
            "them, or set strategy.find_unused_parameters: true"
        )

    def wrap(self, module: nn.Module, blocks: list[nn.Module], make_optimizer: MakeOptimizer | None) -> None:
        super().wrap(module, blocks, make_optimizer)
        world, options = self.world, self.options
        self.evaluation_model = module.to(world.device)
        compressed = self.config.strategy.communication_dtype == "bf16" and world.world_size > 1
        # SumsInBuckets is not used if there is one process, if bf16 would round the sums, or if DDP would treat the
        # parameter for the sums as unused.
        if world.world_size > 1 and not compressed and not options.find_unused_parameters:
            self.sums = self.model = SumsInBuckets(module).to(world.device)
        self._accelerator = Accelerator(
            cpu=world.use_cpu,
            dynamo_backend="no",  # otherwise accelerate reads ACCELERATE_DYNAMO_BACKEND; train.compile decides
            mixed_precision="no",  # the engine sets the precision; accelerate silently ignores fp16 on a CPU
            gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),  # the engine accumulates
            kwargs_handlers=[
                DistributedDataParallelKwargs(
                    gradient_as_bucket_view=True,
                    find_unused_parameters=options.find_unused_parameters,
                    static_graph=options.static_graph,
                )
            ],
        )
        self.use_optimizer(make_optimizer)
        self._is_first_step = world.world_size > 1
        if world.world_size > 1 and make_optimizer is not None:
            self.model = self._accelerator.prepare_model(self.model)
            # buffers.py keeps buffers equal. Set here, because torch 2.13 warns if it is an argument.
            self.model.broadcast_buffers = False  # type: ignore[assignment]
            self.learns_from_its_first_backward = True
            if not (options.find_unused_parameters or options.static_graph):
                self.watch.begin(module)
            if compressed:
                self.model.register_comm_hook(None, _mean_in_bf16)  # type: ignore[operator]
        # DDP learns a static graph from its first backward, which must reduce the gradients. This extra reduction does
        # not change the result: the mean of gradients that are equal on all ranks is the same gradient.
        self._graph_is_unknown = options.static_graph
        self._all_parameters = list(self.model.parameters())  # Module.zero_grad would walk through all modules

    def fix_bucket_order(self) -> None:
        """Let DDP build its final buckets now, in the reverse order of the parameters. Collective.

        By itself DDP rebuilds its buckets after the first backward, in the order of the gradients there. So the first
        step after a resume would be rounded differently than in an uninterrupted run. This is for a loop of the user's
        own, whose forward cannot be tried before; the trainer calls Engine.warm_up_ddp_buckets instead. A static graph
        is left alone, because DDP learns it from the first backward.
        """
        if not self.learns_from_its_first_backward or self.options.static_graph or self.options.find_unused_parameters:
            return
        reducer: Any = self.model.reducer
        reducer.prepare_for_forward()
        reducer.prepare_for_backward([])
        for parameter in reversed([parameter for parameter in self._all_parameters if parameter.requires_grad]):
            parameter.backward(torch.zeros_like(parameter))  # type: ignore[no-untyped-call]
        self.watch.next_micro_batch()
        self.zero_grad()

    def accumulate(self, last: bool) -> AbstractContextManager[object]:
        if last or self._graph_is_unknown:
            self._graph_is_unknown = False
            return nullcontext()
        context: AbstractContextManager[object] = self._accelerator.no_sync(self.model)
        return context

    def zero_grad(self) -> None:
        for parameter in self._all_parameters:
            parameter.grad = None

    def backward(self, total: Tensor, sums: Tensor, last: bool) -> None:
        if isinstance(self.sums, SumsInBuckets):
            sums = sums * self.world.world_size  # DDP averages over the ranks
            self.sums.add_to_backward(total, sums).backward()  # type: ignore[no-untyped-call]
        else:
            super().backward(total, sums, last)
        if self._is_first_step:  # in later steps, DDP itself refuses parameters without a gradient
            if last:
                self.watch.require_all()
                self.watch.end()
                self._is_first_step = False
            self.watch.next_micro_batch()

    def update(self, factor: Number, max_grad_norm: float | None) -> Number:
        return super().update(factor * self.world.world_size, max_grad_norm)  # DDP averages over the ranks

    def communication_seconds(self) -> float | None:
        if not isinstance(self.model, nn.parallel.DistributedDataParallel):
            return None
        measured: dict[str, float] = self.model._get_ddp_logging_data()  # type: ignore[no-untyped-call]
        if "backward_comm_time" not in measured:  # DDP measures its first steps, and then each 100th
            return None
        return max(0.0, measured["backward_comm_time"] - measured["backward_compute_comm_overlap_time"]) / 1e9


def require_one_process_for_single(strategy: Strategy) -> None:
    """Raise ConfigError if the strategy is single and there are several processes."""
    if strategy.name == "single" and strategy.world.world_size > 1:
        raise ConfigError(
            f"strategy.name: single, but {strategy.world.launcher} started {strategy.world.world_size} processes; use "
            "ddp or auto, or start one process"
        )


def _mean_in_bf16(
    _: object,
    bucket: dist.GradBucket,  # type: ignore[name-defined]
) -> torch.futures.Future[Tensor]:
    """Average a bucket over the ranks in bf16. DDP allows torch's own bf16_compress_hook only with nccl and xccl."""
    gradient = bucket.buffer()
    compressed = gradient.bfloat16() / dist.get_world_size()
    future = dist.all_reduce(compressed, async_op=True).get_future()
    mean: torch.futures.Future[Tensor] = future.then(lambda done: gradient.copy_(done.value()[0]))
    return mean
