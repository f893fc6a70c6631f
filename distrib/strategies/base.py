"""Where parameters, gradients and optimizer state lie, and how the ranks' gradients are reduced.

A step computes the same under every strategy. The engine decides what is summed, what it is divided by, and whether
the update is applied. Above a strategy all gradients are sums. registry.py chooses the class.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from distrib.errors import ConfigError, TrainingError
from distrib.processes.world import World
from distrib.run_folder import checkpoint
from distrib.run_folder.checkpoint import Shard, replicated
from distrib.strategies.optimizer_state import require_same_state
from distrib.strategies.step_sums import AllReducedSums

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
MakeOptimizer = Callable[[list[tuple[str, nn.Parameter]]], Optimizer]
_DEVICES_THAT_SCALE = ("cpu", "cuda")  # Metal's kernels ignored both until 2026 (pytorch/pytorch#186360)
Number = TypeVar("Number", float, Tensor)  # known here, or on the device alone


class SumsOfWindow(Protocol):
    """Adds up the window's loss and count, see step_sums.py."""

    def result(self) -> Tensor:
        """Return the sums over window and ranks, shape (SIZE,), after the last backward."""


class Strategy:
    """What every strategy has in common: gradients in `p.grad`, normalised, clipped and applied here."""

    forward_is_collective = False  # then every rank must run as many forwards as the others, in evaluation too
    learns_from_its_first_backward = False
    name = ""  # the strategy's
    model: nn.Module  # what the task's forward calls in training
    evaluation_model: nn.Module
    sums: SumsOfWindow

    def __init__(self, world: World, module: nn.Module) -> None:
        self.world = world
        self.module = module  # the user's own
        self.optimizer: Optimizer | None = None  # none: only evaluates
        self._scales = False  # the optimizer's kernel: what it updates with, and whether at all
        self._parameters: list[nn.Parameter] = []
        self._watched: list[str] = []
        self._watching: list[RemovableHandle] = []
        self._used: set[str] = set()  # by the micro-batch at hand

    def broadcast_state(self) -> None:
        """Give every rank rank 0's parameters and buffers, as DDP does by itself."""
        for tensor in self.module.state_dict().values():
            self.world.broadcast(tensor)

    def use_optimizer(self, make_optimizer: MakeOptimizer | None) -> None:
        """Build the optimizer over the module's parameters as they are now."""
        if make_optimizer is None:
            return
        self.optimizer = make_optimizer(trainable(self.module))
        groups = self.optimizer.param_groups
        self._parameters = [p for group in groups for p in group["params"] if p.requires_grad]
        self._scales = _scales_itself(self.optimizer)

    def accumulate(self, last: bool) -> AbstractContextManager[object]:
        """Around forward and backward of a micro-batch; gradients meet the other ranks' at the latest on the last."""
        return nullcontext()

    def zero_grad(self) -> None:
        """Once a window, before its first backward."""
        for parameter in self._parameters:
            parameter.grad = None

    def backward(self, total: Tensor, sums: Tensor, last: bool) -> None:
        """Add the gradient of `total`, and this micro-batch's sums."""
        assert isinstance(self.sums, AllReducedSums), "SumsInBuckets overrides this"
        self.sums.add(sums, last)
        total.backward()  # type: ignore[no-untyped-call]

    @property
    def can_update_on_device(self) -> bool:
        """Can `update` take a factor that only the device knows? Not where gradients lie elsewhere (offloaded), and not
        where torch's SGD has no momentum yet: were that update skipped, it would keep whatever lay in memory (seen)."""
        if self.optimizer is None or not self._scales or self._parameters[0].device.type != self.world.device.type:
            return False
        if not any(group.get("momentum") for group in self.optimizer.param_groups):
            return True
        state = self.optimizer.state
        return all(state[p].get("momentum_buffer") is not None for p in self._parameters if p.grad is not None)

    def update(self, factor: Number, max_grad_norm: float | None) -> Number:
        """Multiply the gradient by `factor`, clip it, update. Returns the norm before clipping.

        The gradient is the sum over the window and the ranks. A strategy whose library leaves the mean over the ranks
        overrides this and multiplies `factor` by the number of ranks. If the norm is not finite on a rank, no rank
        updates. If `factor` is a tensor on the device, so is the norm, and nothing waits for the device.
        """
        gradients = self._gradients()
        grad_norm: Any = self._norm(gradients)
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
        """Update with the gradients times `factor`, in the optimizer's own kernel where it can: GradScaler's way."""
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
        """For how long gradients were on their way with no backward left to run beside them, in a late step; None where
        the library that moves them does not say."""
        return None

    def shards(self) -> dict[str, Shard]:
        """What this rank holds of parameters, buffers and optimizer state, under the checkpoint's names. Views: what
        is read into them is there."""
        named, _ = named_state(self.module)
        result = {f"model.{name}": self._shard(tensor) for name, tensor in named.items()}
        for name, state, shard in self._states():
            for key, value in state.items():
                if isinstance(value, Tensor) and (own := shard(value)) is not None:
                    result[f"optimizer.{key}.{name}"] = own
        return result

    def numbers(self) -> dict[str, float]:
        """What optimizers keep as numbers; torch's own keep tensors."""
        return {
            f"optimizer.{key}.{name}": value
            for name, state, _ in self._states()
            for key, value in state.items()
            if isinstance(value, int | float)
        }

    def load(self, path: Path, manifest: dict[str, Any], reset_optimizer: bool = False) -> None:
        """Take over a checkpoint, by whatever strategy it was written; without an optimizer only the weights.

        `reset_optimizer`: leave the optimizer's state as it is. Raises MismatchError if the checkpoint is of another
        model or optimizer.
        """
        if reset_optimizer:
            weights = {name: shard for name, shard in self.shards().items() if name.startswith("model.")}
            checkpoint.load(path, manifest, weights)
            return
        kept = {*manifest["tensors"], *manifest["numbers"]}
        if self.optimizer is not None and (manifest["applied"] or any(name.startswith("optimizer.") for name in kept)):
            rates = [group["lr"] for group in self.optimizer.param_groups]
            for group in self.optimizer.param_groups:
                group["lr"] = 0.0
            self._make_states()
            for group, rate in zip(self.optimizer.param_groups, rates, strict=True):
                group["lr"] = rate
            require_same_state(path, kept, [name for name, _ in trainable(self.module)], self._states())
            for name, state, _ in self._states():
                for key in list(state):
                    entry = f"optimizer.{key}.{name}"
                    if entry in manifest["numbers"]:
                        state[key] = manifest["numbers"][entry]
                    elif entry not in kept and state[key] is not None:
                        del state[key]  # it had not got a gradient yet
        checkpoint.load(path, manifest, self.shards())

    def _shard(self, tensor: Tensor) -> Shard:
        """Of a parameter, a buffer, or a tensor that the optimizer keeps for a parameter."""
        return replicated(tensor)

    def _states(self) -> Iterator[tuple[str, dict[str, Any], Callable[[Tensor], Shard | None]]]:
        """For each parameter its name, the optimizer's state that holds for it, and what of a tensor there is its."""
        if self.optimizer is not None:
            for name, parameter in trainable(self.module):
                if parameter in self.optimizer.state:
                    yield name, self.optimizer.state[parameter], self._shard

    def _make_states(self) -> None:
        """Have the optimizer make its state, by a step over gradients of 0; what it changes is read over."""
        assert self.optimizer is not None, "this engine only evaluates"
        self._step_over_zeros([p for group in self.optimizer.param_groups for p in group["params"]])

    def _step_over_zeros(self, parameters: list[Tensor]) -> None:
        assert self.optimizer is not None, "this engine only evaluates"
        before = [parameter.grad for parameter in parameters]
        for parameter in parameters:
            parameter.grad = torch.zeros_like(parameter)
        self.optimizer.step()
        for parameter, gradient in zip(parameters, before, strict=True):
            parameter.grad = gradient

    def _watch_use(self) -> None:
        """Note which parameters get a gradient, once they are the optimizer's."""
        for name, parameter in trainable(self.module):
            used: Callable[..., None] = lambda _, name=name: self._used.add(name)  # noqa: E731
            self._watching.append(parameter.register_post_accumulate_grad_hook(used))  # type: ignore[no-untyped-call]
            self._watched.append(name)

    def _watch_no_more(self) -> None:
        """For DDP: it raises by itself if a later step leaves a parameter out, but one step too late."""
        for hook in self._watching:
            hook.remove()
        self._watched, self._watching = [], []

    def _require_use(self) -> None:
        """After a micro-batch's backward. Of a parameter without a gradient a sharded reduction would go on with what
        other ranks have of other parameters, and say nothing."""
        if len(self._used) < len(self._watched):
            unused = [name for name in self._watched if name not in self._used]
            raise TrainingError(
                f"rank {self.world.rank}: {len(unused)} parameter(s) got no gradient from a micro-batch, first "
                f"{unused[0]}, which this strategy cannot reduce; freeze them, or take strategy.name ddp with "
                "strategy.find_unused_parameters: true"
            )
        self._used.clear()

    def _gradients(self) -> list[Tensor]:
        """What this rank holds of the gradient."""
        return [p.grad for p in self._parameters if p.grad is not None]

    def _norm(self, gradients: list[Tensor]) -> Tensor:
        """As torch's get_total_norm, which takes half as long again to group tensors that lie on one device."""
        if not gradients:
            return torch.zeros((), device=self.world.device)
        norm: Tensor = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients)))
        return norm


def _scales_itself(optimizer: Any) -> bool:
    """Does its kernel divide the gradient by `grad_scale`, and leave all as it is where `found_inf` says so? Those of
    torch's fused optimizers do; a class derived from one, or one that wraps it, may make of it what it likes."""
    return (
        type(optimizer) in (torch.optim.Adam, torch.optim.AdamW, torch.optim.SGD, torch.optim.Adagrad)
        and getattr(optimizer, "_step_supports_amp_scaling", False)
        and not optimizer._optimizer_step_pre_hooks  # of the task, and to see the gradient that is applied
        and optimizer.param_groups[0]["params"][0].device.type in _DEVICES_THAT_SCALE
    )


def named_state(module: nn.Module) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Parameters and persistent buffers, each under its first name; and further names of tied ones, by theirs."""
    named: dict[str, Tensor] = {}
    tied: dict[str, str] = {}
    first: dict[int, str] = {}
    for name, value in module.state_dict(keep_vars=True).items():
        if not isinstance(value, Tensor):
            raise ConfigError(
                f"task.model: {name} in its state_dict is a {type(value).__name__}, no tensor, and would not be saved; "
                "keep it in a buffer, or leave it out of get_extra_state"
            )
        if id(value) in first:
            tied[name] = first[id(value)]
        else:
            named[name] = value
            first[id(value)] = name
    return named, tied


def make_contiguous(module: nn.Module) -> None:
    """Copy weights of another memory format (channels_last) into torch's default one, in place.

    Shards are cut from the default one. The values are the same; what is computed from them, up to rounding.
    """
    for parameter in module.parameters():
        parameter.data = parameter.data.contiguous()


def trainable(module: nn.Module) -> list[tuple[str, nn.Parameter]]:
    return [(name, p) for name, p in module.named_parameters() if p.requires_grad]
