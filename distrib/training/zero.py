"""zero0 to zero3: DeepSpeed's ZeRO stages. DeepSpeed shards and updates; what a step means stays the engine's."""

import logging
import math
import os
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from torch import Tensor, nn

from distrib.training.placement import MakeOptimizer, Placement
from distrib.training.totals import SummedTotals
from distrib.world import World


class Zero(Placement):
    """A DeepSpeedEngine, made from `deepspeed_config.compile_config`'s JSON.

    At stages 1 to 3 the normalisation by the window's count goes in as DeepSpeed's loss scale, by which it divides
    where it clips; at stage 0 DeepSpeed leaves whole gradients in `p.grad`, and the update is that of ddp.
    """

    def __init__(
        self, world: World, module: nn.Module, make_optimizer: MakeOptimizer | None, config: dict[str, Any]
    ) -> None:
        super().__init__(world, module)
        self.stage: int = config["zero_optimization"]["stage"]
        self.forward_is_collective = self.stage == 3
        self.totals = SummedTotals(world)
        if make_optimizer is None and self.stage < 3:  # nothing is sharded that a forward needs
            self.model = self.evaluation_model = module.to(world.device)
            return
        world.require_group()
        self.use_optimizer(make_optimizer)
        deepspeed = _import_deepspeed(world)
        engine, *_ = deepspeed.initialize(model=module, optimizer=self.optimizer, config=config)
        self.model = engine
        self.evaluation_model = engine if self.stage == 3 else module
        self._engine: Any = engine
        # For fp16 DeepSpeed would bring a scaler of its own, which finds another scale under each stage.
        engine.torch_autocast_z0_gradscaler = None
        self._sharded_optimizer: Any = engine.optimizer if self.stage else None
        self._discarding = False
        self._watch_use()
        if self.optimizer is not None and self.stage:
            engine.optimizer.torch_autocast_gradscaler = None
            self.optimizer.step = self._unless_discarding(self.optimizer.step)  # type: ignore[method-assign]

    def accumulate(self, last: bool) -> AbstractContextManager[object]:
        self._engine.set_gradient_accumulation_boundary(last)
        return nullcontext()

    def zero_grad(self) -> None:
        if self._sharded_optimizer is None:
            super().zero_grad()  # at the other stages DeepSpeed has cleared them in its step

    def backward(self, total: Tensor, shares: Tensor, last: bool) -> None:
        assert isinstance(self.totals, SummedTotals)
        self.totals.add(shares, last)
        if self._sharded_optimizer is not None:
            self._sharded_optimizer.override_loss_scale(1.0)
        self._engine.backward(total, scale_wrt_gas=False)
        self._require_use()

    def update(self, factor: float, max_grad_norm: float | None) -> float:
        if self._sharded_optimizer is None:
            return super().update(factor, max_grad_norm)
        # max_grad_norm stands in the JSON
        self._sharded_optimizer.override_loss_scale(1.0 / factor)
        self._engine.step()
        return math.inf if self._sharded_optimizer.overflow else float(self._engine.get_global_grad_norm())

    def discard(self) -> None:
        if self._sharded_optimizer is not None:  # it has gradients to forget
            self._discarding = True
            self._engine.step()
            self._discarding = False

    def state(self) -> dict[str, Tensor] | None:
        if self.stage < 3:
            return super().state()
        import deepspeed

        gathered = deepspeed.zero.GatheredParameters
        state: dict[str, Tensor] = {}
        for name, value in self.module.state_dict(keep_vars=True).items():
            with gathered([value]) if hasattr(value, "ds_id") else nullcontext():
                if self.world.is_rank_0:
                    state[name] = value.detach().cpu().clone()
        return state if self.world.is_rank_0 else None

    def _unless_discarding(self, step: Callable[..., Any]) -> Callable[..., Any]:
        """DeepSpeed offers no way to end a window without an update; its sharded optimizer calls this one's step."""

        def step_or_not(*args: Any, **kwargs: Any) -> Any:
            return None if self._discarding else step(*args, **kwargs)

        return step_or_not


def _import_deepspeed(world: World) -> Any:
    """DeepSpeed on this device; on CPU without the extension that it would compile for half a minute."""
    if world.use_cpu:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    os.environ.setdefault("LOCAL_RANK", str(world.local_rank))  # it wants one where no launcher started us, too
    logger = logging.getLogger("DeepSpeed")
    logger.setLevel(logging.WARNING)
    logger.addFilter(lambda record: "untested optimizer" not in record.getMessage())  # tests/distributed test ours
    warnings.filterwarnings("ignore", message=r"`torch\.distributed\.\w+` is deprecated", category=FutureWarning)
    import deepspeed
    import deepspeed.ops
    from deepspeed.runtime import torch_autocast

    torch_autocast.TORCH_AUTOCAST_INITIALIZED = False  # of a run before in this process, or its dtypes would be ours
    if world.use_cpu:
        vars(deepspeed.ops)["__compatible_ops__"] = {}
    return deepspeed
