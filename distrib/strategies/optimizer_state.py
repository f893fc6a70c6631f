"""What distrib has to know of an optimizer: how it scales gradients, and whether a checkpoint holds its state."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from distrib.errors import MismatchError

_ELEMENTWISE = ("Adadelta", "Adagrad", "Adam", "Adamax", "AdamW", "ASGD", "NAdam", "RAdam", "RMSprop", "SGD")
_DEVICES_THAT_SCALE = ("cpu", "cuda")  # Metal's kernels ignored both until 2026 (pytorch/pytorch#186360)


def members_of(optimizer: Any) -> list[Any]:
    """Return the optimizers that it is made of: those of several classes, or itself."""
    return getattr(optimizer, "members", [optimizer])


def is_elementwise(optimizer: Any) -> bool:
    """Return whether the optimizer treats each element by itself, so that it updates a shard as it would the whole.

    True for the classes of torch.optim that do so, and for any class with the attribute `elementwise = True`.
    """
    known = tuple(getattr(torch.optim, name) for name in _ELEMENTWISE)
    return isinstance(optimizer, known) or getattr(optimizer, "elementwise", False) is True


def scales_itself(optimizer: Any) -> bool:
    """Return whether the optimizer divides by `grad_scale` and skips if `found_inf`, as torch's own fused ones do."""
    return (
        type(optimizer) in (torch.optim.Adam, torch.optim.AdamW, torch.optim.SGD, torch.optim.Adagrad)
        and getattr(optimizer, "_step_supports_amp_scaling", False)
        and not optimizer._optimizer_step_pre_hooks  # of the task, and to see the gradient that is applied
        and optimizer.param_groups[0]["params"][0].device.type in _DEVICES_THAT_SCALE
    )


def can_skip(optimizer: Optimizer, parameters: list[nn.Parameter]) -> bool:
    """Return whether an update that is skipped on the device changes nothing.

    No if torch's SGD has no momentum yet: it would keep whatever lay in memory (seen).
    """
    if not any(group.get("momentum") for group in optimizer.param_groups):
        return True
    state = optimizer.state
    return all(state[p].get("momentum_buffer") is not None for p in parameters if p.grad is not None)


@contextmanager
def without_rates(optimizer: Optimizer) -> Iterator[None]:
    """Return a context in which all learning rates are 0."""
    rates = [group["lr"] for group in optimizer.param_groups]
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    yield
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate


def step_over_zeros(optimizer: Optimizer, parameters: list[Tensor]) -> None:
    """Make a step in which the gradients of the parameters are 0."""
    before = [parameter.grad for parameter in parameters]
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for parameter, gradient in zip(parameters, before, strict=True):
        parameter.grad = gradient


def fit_state(
    path: Path, manifest: dict[str, Any], trained: list[str], states: list[tuple[str, dict[str, Any], Any]]
) -> None:
    """Let the optimizer's state have what the checkpoint has: take its numbers, and drop what a parameter has not got
    yet, because it had no gradient. The tensors are loaded later. Raises MismatchError as `require_same_state`."""
    kept = {*manifest["tensors"], *manifest["numbers"]}
    require_same_state(path, kept, trained, states)
    for name, state, _ in states:
        for key in list(state):
            entry = f"optimizer.{key}.{name}"
            if entry in manifest["numbers"]:
                state[key] = manifest["numbers"][entry]
            elif entry not in kept and state[key] is not None:
                del state[key]


def require_same_state(
    path: Path, kept: set[str], trained: list[str], states: Iterable[tuple[str, dict[str, Any], Any]]
) -> None:
    """Raise MismatchError if the optimizer's state for a parameter has other keys than the checkpoint's.

    `kept`: the names in the checkpoint. If it has no state for a parameter, that parameter was not updated yet.
    `states`: the optimizer's state for each of the `trained` parameters. Several parameters may share one state.
    """
    saved: dict[str, set[str]] = {}
    for entry in kept:
        kind, _, rest = entry.partition(".")
        if kind == "optimizer":
            key, _, name = rest.partition(".")
            saved.setdefault(name, set()).add(key)
    current = {name: state for name, state, _ in states}
    sharing: dict[int, str] = {}
    for name in trained:
        state = current.get(name, {})
        keys = {key for key, value in state.items() if isinstance(value, Tensor | int | float)}
        if (name in saved and keys != saved[name]) or (keys and not saved):
            raise MismatchError(
                f"{path}: of another optimizer: it holds {_listed(saved.get(name, ()))} for {name}, and the config's "
                f"keeps {_listed(keys)}; take the same optim.name and optim.options, or --reset-optimizer with --fork"
            )
        if name in saved:
            sharing[id(state)] = name
    for name in trained:
        if name not in saved and (other := sharing.get(id(current.get(name)))) is not None:
            raise MismatchError(
                f"{path}: holds optimizer state for {other} and none for {name}, of which this strategy keeps one for "
                "both; take strategy.name ddp or fsdp2, or --reset-optimizer with --fork"
            )


def _listed(keys: Iterable[str]) -> str:
    return ", ".join(sorted(keys)) or "nothing"
