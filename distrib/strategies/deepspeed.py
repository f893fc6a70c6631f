"""zero0 to zero3: DeepSpeed's ZeRO stages. DeepSpeed shards and updates; the engine defines a step."""

import functools
import json
import math
import re
import traceback
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, Literal

from pydantic import Field
from torch import Tensor, nn

from distrib.config import Config
from distrib.plan import Memory
from distrib.processes.world import World
from distrib.run_folder.checkpoint import Shard, replicated
from distrib.strategies import deepspeed_model
from distrib.strategies.base import Number, Strategy
from distrib.strategies.deepspeed_config import compile_config, offload_of, persistence_threshold
from distrib.strategies.deepspeed_library import import_deepspeed, record_evaluation_apart, release_whole, unless
from distrib.strategies.fsdp2 import not_gathered
from distrib.strategies.memory import MakeOptimizer
from distrib.strategies.optimizer_state import step_over_zeros
from distrib.strategies.parameters import make_contiguous, trainable
from distrib.strategies.step_sums import AllReducedSums

_EMPTY_SHAPE = re.compile(r"\(0\)|\[0\]|multiplied \(.*\b0x\d")  # the shape of a parameter that zero3 has not gathered
_OWN_BACKWARD = re.compile(r"Loss scaling is required|Direct calls to tensor.backward\(\)")  # DeepSpeed's messages


class _Options(Strategy.Options):
    deepspeed: dict[str, Any] | str = Field(
        default_factory=dict
    )  # more options of DeepSpeed, or the path of a JSON file with them


class ZeRO(Strategy):
    """Uses a DeepSpeedEngine, made from the JSON of `deepspeed_config.compile_config`. Each stage is a class below.

    At stages 1 to 3, the window's count is passed to DeepSpeed as its loss scale, because DeepSpeed divides by that
    when it clips. At stage 0, DeepSpeed leaves whole gradients in `p.grad`, and the update is the same as under ddp.
    """

    stage: int
    cuts_updates = True
    # DeepSpeed replaces Adagrad by its own, which ignores parameter groups and schedule.
    refused_optimizers: tuple[str, ...] = ("adagrad",)

    def __init__(self, config: Config, world: World) -> None:
        super().__init__(config, world)
        self.offload = getattr(self.options, "offload", "none")
        if self.offload == "none":
            self.offload = offload_of(self.options.deepspeed, self.name)

    def check(self) -> None:
        self._json()

    def _json(self) -> dict[str, Any]:
        return compile_config(self.config, self.stage, self.offload, self.options.deepspeed, self.batches)

    def describe(self) -> str:
        return f"DeepSpeed's JSON:\n{json.dumps(self._json(), indent=2)}"

    def check_model(self, module: nn.Module, blocks: list[nn.Module]) -> None:
        deepspeed_model.check(module, self.stage, self.name)

    def memory(self, module: nn.Module, make_optimizer: MakeOptimizer) -> Memory:
        if not self.stage:
            return super().memory(module, make_optimizer)
        whole = persistence_threshold(self.options.deepspeed)
        return deepspeed_model.memory(module, self.stage, self.world.world_size, whole, make_optimizer)

    def largest_shards(self, module: nn.Module) -> dict[str, nn.Parameter]:
        if not self.stage:
            return super().largest_shards(module)
        return deepspeed_model.largest_shards(module, self.world.world_size)

    def explain_error(self, error: Exception) -> str | None:
        if _OWN_BACKWARD.search(str(error)) or _is_deepspeeds(error):
            return (
                f"task: takes a gradient of the model's output in forward or loss, which {self.name} takes for the "
                "backward; take it in the model's forward, or take strategy.name ddp"
            )
        return not_gathered(self.name, error) if self.stage == 3 and _EMPTY_SHAPE.search(str(error)) else None

    def wrap(self, module: nn.Module, blocks: list[nn.Module], make_optimizer: MakeOptimizer | None) -> None:
        super().wrap(module, blocks, make_optimizer)
        if make_optimizer is None and self.stage < 3:  # the parameters are whole, so a forward needs no engine
            module.to(self.world.device)
            self._sharded_optimizer: Any = None
            return
        self.world.require_group()
        make_contiguous(module)
        self.broadcast_state()
        self.use_optimizer(make_optimizer)
        deepspeed = import_deepspeed(self.world)
        # At stage 3, gather a compiled module as a whole, so that there are no hooks inside it.
        for part in self.compiled if self.stage == 3 else ():
            deepspeed.utils.set_z3_leaf_module(part, True)
        engine, *_ = deepspeed.initialize(model=module, optimizer=self.optimizer, config=self._json())
        self.model = engine
        self.evaluation_model = engine if self.stage == 3 else module
        self._engine: Any = engine
        # For fp16, DeepSpeed would use its own scaler, which finds another scale at each stage.
        engine.torch_autocast_z0_gradscaler = None
        self._sharded_optimizer = engine.optimizer if self.stage and make_optimizer is not None else None
        self._discarding = False
        if self.stage == 3 and make_optimizer is not None:
            record_evaluation_apart(engine.optimizer.parameter_offload, module)
        self.watch.begin(module)
        if self.optimizer is not None and self.stage:
            engine.optimizer.torch_autocast_gradscaler = None
            self.give_owners()
            self.optimizer.step = unless(lambda: self._discarding, self.optimizer.step)  # type: ignore[method-assign]

    def accumulate(self, last: bool) -> AbstractContextManager[object]:
        self._engine.set_gradient_accumulation_boundary(last)
        return nullcontext()

    def zero_grad(self) -> None:
        if self._sharded_optimizer is None:
            super().zero_grad()  # at other stages, DeepSpeed clears them in its step

    def backward(self, total: Tensor, sums: Tensor, last: bool) -> None:
        assert isinstance(self.sums, AllReducedSums)
        self.sums.add(sums, last)
        if self._sharded_optimizer is not None:
            self._sharded_optimizer.override_loss_scale(1.0)
        self._engine.backward(total, scale_wrt_gas=False)
        self.watch.require_all()

    @property
    def can_update_on_device(self) -> bool:
        return self._sharded_optimizer is None and super().can_update_on_device

    def update(self, factor: Number, max_grad_norm: float | None) -> Number:
        factor = factor * self.world.world_size  # DeepSpeed averages over the ranks
        if self._sharded_optimizer is None:
            return super().update(factor, max_grad_norm)
        assert isinstance(factor, float), "DeepSpeed waits for the device"
        # DeepSpeed reads max_grad_norm from the JSON
        self._sharded_optimizer.override_loss_scale(1.0 / factor)
        self._engine.step()
        return math.inf if self._sharded_optimizer.overflow else float(self._engine.get_global_grad_norm())

    def discard(self) -> None:
        if self._sharded_optimizer is not None:  # it holds gradients, which it must drop
            self._discarding = True
            self._engine.step()
            self._discarding = False

    def load(self, path: Path, manifest: dict[str, Any], reset_optimizer: bool = False) -> None:
        super().load(path, manifest, reset_optimizer)
        if self.stage == 3:
            for _, parameter in trainable(self.module) if self._sharded_optimizer is not None else ():
                stretch, shard = self._stretches_at_stage_3(parameter)
                stretch.copy_(shard)
            release_whole(self.module)
        elif self.stage and self.optimizer is not None:
            for _, parameter in trainable(self.module):
                if (mapping := vars(parameter)["_hp_mapping"]) is not None:
                    mapping.update_hp()

    def shard_of(self, tensor: Tensor) -> Shard:
        if not hasattr(tensor, "ds_tensor"):
            return super().shard_of(tensor)
        return self._cut_at_stage_3(tensor, tensor.ds_tensor.data)

    def publish(self) -> None:
        if self.stage == 3:
            for _, parameter in trainable(self.module):
                stretch, shard = self._stretches_at_stage_3(parameter)
                shard.copy_(stretch)
            release_whole(self.module)
        elif self._sharded_optimizer is not None:
            self._sharded_optimizer.update_lp_params()

    def pieces(self) -> Iterator[tuple[str, Tensor, Callable[[Tensor], Shard | None]]]:
        if self._sharded_optimizer is None:
            yield from super().pieces()
            return
        names = {id(parameter): name for name, parameter in trainable(self.module)}
        for flat, group in zip(self._flat(), self._groups(), strict=True):
            for parameter in group:
                yield names[id(parameter)], flat, functools.partial(self._cut, parameter, flat)

    def make_optimizer_state(self) -> None:
        if self._sharded_optimizer is None or self.optimizer is None:
            super().make_optimizer_state()
        elif self.stage < 3:
            step_over_zeros(self.optimizer, self._flat())
        else:
            self._sharded_optimizer._set_fp32_optimizer_param_groups()
            step_over_zeros(self.optimizer, self._flat())
            self._sharded_optimizer._clear_fp32_optimizer_param_groups()

    def _groups(self) -> list[list[nn.Parameter]]:
        """Return the parameters in each flat tensor that the optimizer updates."""
        optimizer = self._sharded_optimizer
        return optimizer.fp16_groups if self.stage == 3 else optimizer.bit16_groups  # type: ignore[no-any-return]

    def _flat(self) -> list[Tensor]:
        optimizer = self._sharded_optimizer
        flat: list[Tensor] = (
            optimizer.fp32_partitioned_groups_flat if self.stage == 3 else optimizer.single_partition_of_fp32_groups
        )
        return flat

    def _cut(self, parameter: Any, flat: Tensor, value: Tensor) -> Shard | None:
        """Return the part of the flat `value` that belongs to `parameter`; None if there is none."""
        if value.shape != flat.shape:
            return replicated(value)  # a step count, one for the whole group
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
        """Return the tensor without the padding, which the last rank has at its end."""
        size, whole = stretch.numel(), parameter.ds_numel
        first = min(whole, self.world.rank * size)
        return Shard(stretch[: min(size, whole - first)], tuple(parameter.ds_shape), first)

    def _stretches_at_stage_3(self, parameter: Any) -> tuple[Tensor, Tensor]:
        """Return what this rank updates of `parameter`, and the shard that forwards gather."""
        flat, start, size = self._place_at_stage_3(parameter)
        return flat.narrow(0, start, size).data, parameter.ds_tensor.data

    def _place_at_stage_3(self, parameter: Any) -> tuple[Tensor, int, int]:
        """Return the flat tensor with the part of `parameter` that this rank updates, and the place of that part."""
        optimizer = self._sharded_optimizer
        group, start, size = optimizer.grad_position[optimizer.get_param_id(parameter)]
        return self._flat()[group], start, size


class ZeRO0(ZeRO):
    """Every rank holds the whole model."""

    Options = _Options
    cuts_updates = False
    refused_optimizers = ()
    stage = 0


class ZeRO1(ZeRO):
    """Optimizer state is sharded."""

    class Options(_Options):
        offload: Literal["none", "optimizer"] = "none"  # the tensors in CPU memory

    stage = 1


class ZeRO2(ZeRO):
    """Optimizer state and gradients are sharded."""

    Options = ZeRO1.Options
    stage = 2


class ZeRO3(ZeRO):
    """Optimizer state, gradients and parameters are sharded."""

    class Options(_Options):
        offload: Literal["none", "optimizer", "all"] = "none"  # the tensors in CPU memory; all: parameters too

    evaluates_as = "zero3"
    forward_is_collective = True
    stage = 3


def _is_deepspeeds(error: Exception) -> bool:
    """Return whether a hook of DeepSpeed raised IndexError before the backward: zero2 has no gradient bucket yet."""
    frames = traceback.extract_tb(error.__traceback__)
    in_backward = any(frame.name == "backward" and frame.filename == __file__ for frame in frames)
    return isinstance(error, IndexError) and "deepspeed" in frames[-1].filename and not in_backward
