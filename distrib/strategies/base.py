"""Strategy: where parameters, gradients and optimizer state lie, and how the ranks' gradients are reduced.

A step computes the same under every strategy. The engine decides what is summed, what it is divided by, and whether
the update is applied. Above a strategy all gradients are sums. docs/extending.md shows how to write one.
"""

import functools
import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.checkpoint import checkpoint as recompute

from distrib.config import Config
from distrib.config_section import Section
from distrib.plan import BatchPlan, Memory
from distrib.processes.world import World
from distrib.run_folder import checkpoint
from distrib.run_folder.checkpoint import Shard, named_state, replicated
from distrib.run_folder.frozen import FrozenBase
from distrib.strategies.compile import compile_forwards
from distrib.strategies.memory import MakeOptimizer, optimizer_state, size_in_bytes
from distrib.strategies.optimizer_state import can_skip, fit_state, scales_itself, step_over_zeros, without_rates
from distrib.strategies.owners import OnOwners, with_owners
from distrib.strategies.parameters import GradientWatch, trainable
from distrib.strategies.step_sums import AllReducedSums, SumsOfWindow

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
Number = TypeVar("Number", float, Tensor)  # known here, or on the device alone


class Strategy:
    """Whole on every rank, and nothing is reduced. Derive a class, and override what your strategy does otherwise."""

    class Options(Section):
        """The keys of the config's section `strategy` that belong to this strategy."""

    evaluates_as = "auto"  # the strategy under which `distrib evaluate` runs such a model, on any number of processes
    forward_is_collective = False  # then every rank must run as many forwards as the others, in evaluation too
    learns_from_its_first_backward = False
    takes_sparse_gradients = False
    cuts_updates = False  # the optimizer updates shards; then owners do so if it needs whole tensors
    refused_optimizers: tuple[str, ...] = ()  # classes, in lower case, that cannot update its shards
    model: nn.Module  # what the task's forward calls in training
    evaluation_model: nn.Module
    module: nn.Module  # the user's own
    sums: SumsOfWindow

    def __init__(self, config: Config, world: World) -> None:
        """`config`: its section strategy is resolved, so that its name is this strategy's. Raises ConfigError."""
        self.config, self.world = config, world
        self.batches = BatchPlan.of(config, world.world_size)
        self.name = config.strategy.name
        self.options: Any = config.strategy.options()
        self.optimizer: Optimizer | None = None  # none: only evaluates
        self._owners: list[OnOwners] = []
        self._scales = False  # the optimizer's kernel: what it updates with, and whether at all
        self._parameters: list[nn.Parameter] = []
        self.watch = GradientWatch(world.rank)

    @classmethod
    def bitwise(cls) -> type["Strategy"] | None:
        """Return the class that runs in place of this one under `train.determinism: bitwise`; None if there is none."""
        return None

    def check(self) -> None:
        """Raise ConfigError if config, options and number of processes do not fit this strategy. The model is not
        there yet."""

    def check_model(self, module: nn.Module, blocks: list[nn.Module]) -> None:
        """Raise ConfigError if this strategy cannot train the module. `blocks`: the task's."""

    def memory(self, module: nn.Module, make_optimizer: MakeOptimizer) -> Memory:
        """Return the bytes that the fullest rank holds. `module` lies on torch's meta device; not changed."""
        trained = trainable(module)
        return Memory(
            parameters=size_in_bytes(module.parameters()),
            gradients=size_in_bytes(parameter for _, parameter in trained),
            optimizer_state=optimizer_state(make_optimizer, trained),
        )

    def largest_shards(self, module: nn.Module) -> dict[str, nn.Parameter]:
        """Return what the fullest rank updates of each trained parameter. `module` as in `memory`."""
        return dict(trainable(module))

    def describe(self) -> str:
        """Return what `distrib explain` prints below the plan."""
        return ""

    def explain_error(self, error: Exception) -> str | None:
        """Return one line for an error in forward, loss or backward that this strategy causes; None for all others."""
        return None

    def wrap(self, module: nn.Module, blocks: list[nn.Module], make_optimizer: MakeOptimizer | None) -> None:
        """Spread the module over the ranks. Collective. Overrides call this first.

        `blocks`: the module's repeated parts, of which each may be compiled, or computed again in the backward.
        `make_optimizer`: none if the model is only evaluated.
        """
        self.module = self.model = self.evaluation_model = module
        self.frozen = FrozenBase.of(module, self.world)
        self.sums = AllReducedSums(self.world)
        self.compiled: list[nn.Module] = []
        if make_optimizer is None:
            return
        if mode := self.config.train.compile:
            self.compiled = blocks if mode == "blocks" else [module]
            compile_forwards(self.compiled)
        if self.config.strategy.activation_checkpointing:
            for block in blocks:
                block.forward = functools.partial(recompute, block.forward, use_reentrant=False)

    def broadcast_state(self) -> None:
        """Give every rank rank 0's parameters and buffers, as DDP does by itself."""
        for tensor in self.module.state_dict().values():
            self.world.broadcast(tensor)

    def use_optimizer(self, make_optimizer: MakeOptimizer | None) -> None:
        """Build the optimizer over the module's parameters as they are now (whole, or shards)."""
        if make_optimizer is None:
            return
        self.optimizer = make_optimizer(trainable(self.module))
        if self.cuts_updates:
            self.optimizer, self._owners = with_owners(self.optimizer, trainable(self.module))
        groups = self.optimizer.param_groups
        self._parameters = [p for group in groups for p in group["params"] if p.requires_grad]
        self._scales = scales_itself(self.optimizer)

    def give_owners(self) -> None:
        """Give owners to the tensors that an optimizer must update whole. Call it when the `pieces` are there."""
        for owners in self._owners:
            owners.begin(self.pieces(), self.world)

    def accumulate(self, last: bool) -> AbstractContextManager[object]:
        """Return a context for forward and backward of a micro-batch. `last`: of the window, after which the gradients
        must be summed over the ranks."""
        return nullcontext()

    def zero_grad(self) -> None:
        """Clear the gradients, once a window, before its first backward."""
        for parameter in self._parameters:
            parameter.grad = None

    def backward(self, total: Tensor, sums: Tensor, last: bool) -> None:
        """Add the gradient of `total`, and this micro-batch's sums, shape (SIZE,), see step_sums.py.

        After the `last` backward of a window the gradients are summed over the ranks, and `self.sums` knows the sums.
        """
        assert isinstance(self.sums, AllReducedSums), "a strategy with other sums overrides this"
        self.sums.add(sums, last)
        total.backward()  # type: ignore[no-untyped-call]

    @property
    def can_update_on_device(self) -> bool:
        """Can `update` take a factor that only the device knows? No if gradients lie elsewhere (offloaded)."""
        if self.optimizer is None or not self._scales or self._parameters[0].device.type != self.world.device.type:
            return False
        return can_skip(self.optimizer, self._parameters)

    def update(self, factor: Number, max_grad_norm: float | None) -> Number:
        """Multiply the gradient by `factor`, clip it, update. Returns the norm before clipping.

        The gradient is the sum over the window and the ranks. A strategy whose library leaves the mean over the ranks
        overrides this and multiplies `factor` by the number of ranks. If the norm is not finite on a rank, no rank
        updates. If `factor` is a tensor on the device, so is the norm, and nothing waits for the device.
        """
        grad_norm: Any = self.norm(gradients := self.gradients())
        if isinstance(factor, Tensor):
            grad_norm *= factor
            if max_grad_norm is not None:
                factor = factor * torch.clamp(max_grad_norm / (grad_norm + 1e-6), max=1.0)
            self._apply(gradients, factor, skipped=~grad_norm.isfinite())
        else:
            grad_norm = grad_norm.item() * factor
            if math.isfinite(grad_norm):
                if max_grad_norm is not None:
                    factor *= min(1.0, max_grad_norm / (grad_norm + 1e-6))  # as torch's clip_grad_norm_
                self._apply(gradients, factor)
        return grad_norm  # type: ignore[no-any-return]

    def _apply(self, gradients: list[Tensor], factor: float | Tensor, skipped: Tensor | None = None) -> None:
        """Update with the gradients times `factor`, in the optimizer's own kernel if it can, as GradScaler does."""
        optimizer: Any = self.optimizer
        if self._scales and gradients:
            optimizer.grad_scale = torch.as_tensor(1.0 / factor, dtype=torch.float32, device=gradients[0].device)
            optimizer.found_inf = None if skipped is None else skipped.float()
        else:
            torch._foreach_mul_(gradients, factor)
        optimizer.step()

    def discard(self) -> None:
        """End the window without an update."""

    def communication_seconds(self) -> float | None:
        """Return for how many seconds of a late step only the communication of gradients ran; None if unknown."""
        return None

    def shards(self) -> dict[str, Shard]:
        """Return what this rank holds of parameters, buffers and optimizer state, by the checkpoint's names.

        They are views: what is written into them is in the model and the optimizer. Not those of a frozen base.
        """
        named, _ = named_state(self.module)
        left_out = set() if self.frozen is None else set(self.frozen.names(self.module))
        result = {f"model.{name}": self.shard_of(tensor) for name, tensor in named.items() if name not in left_out}
        for name, state, shard in self._states():
            for key, value in state.items():
                if isinstance(value, Tensor) and (own := shard(value)) is not None:
                    result[f"optimizer.{key}.{name}"] = own
        return result

    def numbers(self) -> dict[str, float]:
        """Return what the optimizer keeps as numbers; torch's own keep tensors. Collective."""
        found = {
            f"optimizer.{key}.{name}": value
            for name, state, _ in self._states()
            for key, value in state.items()
            if isinstance(value, int | float)
        }
        if not self._owners:
            return found
        return {key: value for one in self.world.all_gather_object(found) for key, value in one.items()}

    def load(self, path: Path, manifest: dict[str, Any], reset_optimizer: bool = False) -> None:
        """Load a checkpoint, whichever strategy wrote it. Without an optimizer only the weights.

        `reset_optimizer`: leave the optimizer's state as it is. Raises MismatchError if the checkpoint is of another
        model or optimizer, or over another frozen base.
        """
        kept, optimizer = {*manifest["tensors"], *manifest["numbers"]}, None if reset_optimizer else self.optimizer
        if optimizer is not None and (manifest["applied"] or any(name.startswith("optimizer.") for name in kept)):
            with without_rates(optimizer):
                self.make_optimizer_state()
            elsewhere = {name for owners in self._owners for name in owners.elsewhere()}
            trained = [name for name, _ in trainable(self.module) if name not in elsewhere]
            fit_state(path, manifest, trained, list(self._states()))
        shards = (self.frozen or FrozenBase({})).loaded(path, manifest, self.module, self.shards())
        weights_only = {name: shard for name, shard in shards.items() if name.startswith("model.")}
        checkpoint.load(path, manifest, weights_only if reset_optimizer else shards)

    def shard_of(self, tensor: Tensor) -> Shard:
        """Return what this rank holds of a parameter, a buffer, or a tensor of a parameter's optimizer state."""
        return replicated(tensor)

    def pieces(self) -> Iterator[tuple[str, Tensor, Callable[[Tensor], Shard | None]]]:
        """For each trained parameter: its name, the tensor in which the optimizer updates it on this rank, and what
        cuts its shard from a tensor like that one (None: this rank has nothing of it). Every rank yields all names.

        Several parameters may lie in one tensor. They stay the same tensors during a run.
        """
        for name, parameter in self.module.named_parameters():
            if parameter.requires_grad:
                yield name, parameter, self.shard_of

    def updated_shards(self) -> dict[str, Shard]:
        """Return what the optimizer updates of each trained parameter on this rank, by name. They are views."""
        return {name: own for name, tensor, cut in self.pieces() if (own := cut(tensor)) is not None}

    def publish(self) -> None:
        """Let forwards use what was written into the `updated_shards`. Collective."""

    def _states(self) -> Iterator[tuple[str, dict[str, Any], Callable[[Tensor], Shard | None]]]:
        """For each parameter whose state this rank has: its name, its state, and what cuts a shard from it."""
        if self.optimizer is None:
            return
        for name, tensor, cut in self.pieces():
            if tensor in self.optimizer.state:
                yield name, self.optimizer.state[tensor], cut
        for owners in self._owners:
            yield from owners.states()

    def make_optimizer_state(self) -> None:
        """Let the optimizer make its state, by a step over gradients of 0. A checkpoint is then read over it."""
        assert self.optimizer is not None, "this engine only evaluates"
        step_over_zeros(self.optimizer, [p for group in self.optimizer.param_groups for p in group["params"]])

    def gradients(self) -> list[Tensor]:
        """Return what this rank holds of the gradient."""
        return [p.grad for p in self._parameters if p.grad is not None]

    def norm(self, gradients: list[Tensor]) -> Tensor:
        """Return the norm of the whole gradient, shape (), on the device.

        As torch's get_total_norm, which takes 1.5 times as long because it groups tensors by device.
        """
        if not gradients:
            return torch.zeros((), device=self.world.device)
        norm: Tensor = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients)))
        return norm
