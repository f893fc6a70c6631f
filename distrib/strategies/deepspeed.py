"""zero0 to zero3: DeepSpeed's ZeRO stages. DeepSpeed shards and updates; what a step means stays the engine's."""

import functools
import logging
import math
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from distrib.processes import variables
from distrib.processes.world import World
from distrib.run_folder.checkpoint import Shard, replicated
from distrib.strategies.base import MakeOptimizer, Number, Strategy, make_contiguous, trainable
from distrib.strategies.step_sums import AllReducedSums


class ZeRO(Strategy):
    """A DeepSpeedEngine, made from `deepspeed_config.compile_config`'s JSON.

    At stages 1 to 3 the normalisation by the window's count goes in as DeepSpeed's loss scale, by which it divides
    where it clips; at stage 0 DeepSpeed leaves whole gradients in `p.grad`, and the update is that of ddp.
    """

    def __init__(
        self,
        world: World,
        module: nn.Module,
        make_optimizer: MakeOptimizer | None,
        config: dict[str, Any],
        whole: list[nn.Module],
    ) -> None:
        """`whole`: modules whose parameters stage 3 is to gather at once, so that no hook of its is inside."""
        super().__init__(world, module)
        self.stage: int = config["zero_optimization"]["stage"]
        self.forward_is_collective = self.stage == 3
        self.sums = AllReducedSums(world)
        if make_optimizer is None and self.stage < 3:  # nothing is sharded that a forward needs
            self.model = self.evaluation_model = module.to(world.device)
            self._sharded_optimizer: Any = None
            return
        world.require_group()
        make_contiguous(module)
        self.broadcast_state()
        self.use_optimizer(make_optimizer)
        deepspeed = _import_deepspeed(world)
        for part in whole if self.stage == 3 else ():
            deepspeed.utils.set_z3_leaf_module(part, True)
        engine, *_ = deepspeed.initialize(model=module, optimizer=self.optimizer, config=config)
        self.model = engine
        self.evaluation_model = engine if self.stage == 3 else module
        self._engine: Any = engine
        # For fp16 DeepSpeed would bring a scaler of its own, which finds another scale under each stage.
        engine.torch_autocast_z0_gradscaler = None
        self._sharded_optimizer = engine.optimizer if self.stage and make_optimizer is not None else None
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

    def backward(self, total: Tensor, sums: Tensor, last: bool) -> None:
        assert isinstance(self.sums, AllReducedSums)
        self.sums.add(sums, last)
        if self._sharded_optimizer is not None:
            self._sharded_optimizer.override_loss_scale(1.0)
        self._engine.backward(total, scale_wrt_gas=False)
        self._require_use()

    @property
    def can_update_on_device(self) -> bool:
        return self._sharded_optimizer is None and super().can_update_on_device

    def update(self, factor: Number, max_grad_norm: float | None) -> Number:
        factor = factor * self.world.world_size  # DeepSpeed leaves the mean over the ranks
        if self._sharded_optimizer is None:
            return super().update(factor, max_grad_norm)
        assert isinstance(factor, float), "DeepSpeed waits for the device"
        # max_grad_norm stands in the JSON
        self._sharded_optimizer.override_loss_scale(1.0 / factor)
        self._engine.step()
        return math.inf if self._sharded_optimizer.overflow else float(self._engine.get_global_grad_norm())

    def discard(self) -> None:
        if self._sharded_optimizer is not None:  # it has gradients to forget
            self._discarding = True
            self._engine.step()
            self._discarding = False

    def load(self, path: Path, manifest: dict[str, Any], reset_optimizer: bool = False) -> None:
        super().load(path, manifest, reset_optimizer)
        if self.stage == 3:
            parameters: list[Any] = list(self.module.parameters())
            for parameter in parameters:
                if self._sharded_optimizer is not None and parameter.requires_grad:
                    flat, start, size = self._place_at_stage_3(parameter)
                    flat.narrow(0, start, size).data.copy_(parameter.ds_tensor)
            if whole := [parameter for parameter in parameters if parameter.ds_persist]:  # as it was before
                whole[0].partition(whole)
        elif self.stage and self.optimizer is not None:
            for _, parameter in trainable(self.module):
                if (mapping := vars(parameter)["_hp_mapping"]) is not None:
                    mapping.update_hp()

    def _shard(self, tensor: Tensor) -> Shard:
        if not hasattr(tensor, "ds_tensor"):
            return super()._shard(tensor)
        return self._cut_at_stage_3(tensor, tensor.ds_tensor.data)

    def _states(self) -> Iterator[tuple[str, dict[str, Any], Callable[[Tensor], Shard | None]]]:
        if self._sharded_optimizer is None or self.optimizer is None:
            yield from super()._states()
            return
        names = {id(parameter): name for name, parameter in trainable(self.module)}
        for number, group in enumerate(self._groups()):
            for parameter in group:
                flat = self._flat()[number]
                if flat in self.optimizer.state:
                    cut = functools.partial(self._cut, parameter, flat)
                    yield names[id(parameter)], self.optimizer.state[flat], cut

    def _make_states(self) -> None:
        if self._sharded_optimizer is None:
            super()._make_states()
        elif self.stage < 3:
            self._step_over_zeros(self._flat())
        else:
            self._sharded_optimizer._set_fp32_optimizer_param_groups()
            self._step_over_zeros(self._flat())
            self._sharded_optimizer._clear_fp32_optimizer_param_groups()

    def _groups(self) -> list[list[nn.Parameter]]:
        """The parameters of each flat tensor that the optimizer updates."""
        optimizer = self._sharded_optimizer
        return optimizer.fp16_groups if self.stage == 3 else optimizer.bit16_groups  # type: ignore[no-any-return]

    def _flat(self) -> list[Tensor]:
        optimizer = self._sharded_optimizer
        flat: list[Tensor] = (
            optimizer.fp32_partitioned_groups_flat if self.stage == 3 else optimizer.single_partition_of_fp32_groups
        )
        return flat

    def _cut(self, parameter: Any, flat: Tensor, value: Tensor) -> Shard | None:
        """What of the flat `value` belongs to `parameter`; None where nothing does."""
        if value.shape != flat.shape:
            return replicated(value)  # a count of steps, one for the group
        if self.stage == 3:
            _, start, size = self._place_at_stage_3(parameter)
            return self._cut_at_stage_3(parameter, value.narrow(0, start, size))
        mapping = parameter._hp_mapping
        if mapping is None:
            return None
        place = mapping.get_hp_fragment_address()
        return Shard(
            value.narrow(0, place.start, place.numel), tuple(parameter.shape), mapping.lp_fragment_address.start
        )

    def _cut_at_stage_3(self, parameter: Any, stretch: Tensor) -> Shard:
        """Without the padding at the end of the last rank's."""
        size, whole = stretch.numel(), parameter.ds_numel
        first = min(whole, self.world.rank * size)
        return Shard(stretch[: min(size, whole - first)], tuple(parameter.ds_shape), first)

    def _place_at_stage_3(self, parameter: Any) -> tuple[Tensor, int, int]:
        """The flat tensor that holds what this rank updates of `parameter`, and where."""
        optimizer = self._sharded_optimizer
        group, start, size = optimizer.grad_position[optimizer.get_param_id(parameter)]
        return self._flat()[group], start, size

    def _unless_discarding(self, step: Callable[..., Any]) -> Callable[..., Any]:
        """DeepSpeed offers no way to end a window without an update; its sharded optimizer calls this one's step."""

        def step_or_not(*args: Any, **kwargs: Any) -> Any:
            return None if self._discarding else step(*args, **kwargs)

        return step_or_not


def _import_deepspeed(world: World) -> Any:
    """DeepSpeed on this device; on CPU without the extension that it would compile for half a minute."""
    if world.use_cpu:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    variables.provide("LOCAL_RANK", str(world.local_rank))  # DeepSpeed reads it also if no launcher set it
    logger = logging.getLogger("DeepSpeed")
    logger.setLevel(logging.WARNING)
    logger.addFilter(lambda record: "untested optimizer" not in record.getMessage())  # tests/distributed test ours
    warnings.filterwarnings("ignore", message=r"`torch\.distributed\.\w+` is deprecated", category=FutureWarning)
    import deepspeed
    import deepspeed.ops
    from deepspeed.runtime import torch_autocast

    torch_autocast.TORCH_AUTOCAST_INITIALIZED = False  # of a run before in this process, or its dtypes would be ours
    deepspeed.DeepSpeedEngine._broadcast_model = lambda _: None  # it takes no scalars; broadcast_state has done it
    if world.use_cpu:
        vars(deepspeed.ops)["__compatible_ops__"] = {}
    return deepspeed
