"""The parameters of a module: finds those that are trained, makes them contiguous, and checks their gradients."""

from collections.abc import Callable

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from distrib.errors import ConfigError, TrainingError


def trainable(module: nn.Module) -> list[tuple[str, nn.Parameter]]:
    return [(name, p) for name, p in module.named_parameters() if p.requires_grad]


def make_contiguous(module: nn.Module) -> None:
    """Convert weights of another memory format (channels_last) to torch's default one, in place.

    Strategies cut shards from the default format. The weights stay equal; results may differ by rounding.
    """
    for parameter in module.parameters():
        parameter.data = parameter.data.contiguous()


class GradientWatch:
    """Finds parameters that got no gradient from a micro-batch.

    With such a parameter, a sharded reduction would silently mix gradients of different parameters.
    """

    def __init__(self, rank: int) -> None:
        self._rank = rank
        self._names: list[str] = []
        self._hooks: list[RemovableHandle] = []
        self._used: set[str] = set()  # the parameters that got a gradient from this micro-batch

    def begin(self, module: nn.Module) -> None:
        """Watch all trained parameters. Call this after the optimizer has been created."""
        for name, parameter in trainable(module):
            used: Callable[..., None] = lambda _, name=name: self._used.add(name)  # noqa: E731
            self._hooks.append(parameter.register_post_accumulate_grad_hook(used))  # type: ignore[no-untyped-call]
            self._names.append(name)

    def end(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._names, self._hooks = [], []

    def next_micro_batch(self) -> None:
        self._used.clear()

    def require_all(self) -> None:
        """Raise TrainingError if a parameter got no gradient since the last call. Call it after a backward."""
        if len(self._used) < len(self._names):
            unused = [name for name in self._names if name not in self._used]
            raise TrainingError(
                f"rank {self._rank}: {len(unused)} parameter(s) got no gradient from a micro-batch, first "
                f"{unused[0]}, which this strategy cannot reduce; freeze them, or take strategy.name ddp with "
                "strategy.find_unused_parameters: true"
            )
        self._used.clear()


def refusal(name: str, what: str, todo: str, strategies: tuple[str, ...] = ()) -> ConfigError:
    """Return an error: what is wrong with a parameter, what to do, and which `strategies` can train it unchanged."""
    *most, last = strategies or ("",)
    others = f", or take strategy.name {', '.join(most)}{' or ' if most else ''}{last}" if last else ""
    return ConfigError(f"task.model: {name} {what}; {todo}{others}")


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
