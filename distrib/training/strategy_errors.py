"""Errors in forward, loss or backward that the strategy causes: each becomes one line that names the way out."""

import re
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from distrib.errors import ConfigError
from distrib.training.placement import Placement

_UNREDUCED = "Expected to have finished reduction in the prior iteration"
_MIXED = "mixed torch.Tensor and DTensor"
_NO_GRAPH = "does not require grad and does not have a grad_fn"
_EMPTY_SHAPE = re.compile(r"\(0\)|\[0\]|\b0x\d|\dx0\b")  # of a parameter that zero3 has not gathered


@contextmanager
def recognised(placement: Placement) -> Iterator[None]:
    """Around forward, loss and backward. Raises ConfigError in place of an error that the strategy causes."""
    try:
        yield
    except (AttributeError, RuntimeError, AssertionError) as error:
        if (reason := _reason(error, placement)) is None:
            raise
        raise ConfigError(reason) from error


def _reason(error: Exception, placement: Placement) -> str | None:
    name, text = placement.name, str(error)
    if isinstance(error, AttributeError):
        wrapped = placement.model is not placement.module and error.obj is placement.model
        if not wrapped or not hasattr(placement.module, str(error.name)):
            return None
        return (
            f"task: reads model.{error.name}, but {name} reduces the gradients of what goes through model(…) alone; "
            f"call {error.name} in the model's forward"
        )
    if _NO_GRAPH in text and not torch.is_grad_enabled():
        return (
            "task: takes a gradient in evaluation, which runs under torch.no_grad(); write `with torch.enable_grad():` "
            "around what is differentiated"
        )
    if _UNREDUCED in text:
        return (
            "task: in a step some parameters got no gradient, for which ddp waits; use them in every step, freeze "
            "them, or set strategy.find_unused_parameters: true"
        )
    if (name == "fsdp2" and _MIXED in text) or (name == "zero3" and _EMPTY_SHAPE.search(text)):
        return (
            f"task: uses parameters that {name} has not gathered ({text.splitlines()[0]}); it gathers a module's when "
            "forward is called, so call methods, read parameters and take gradients of gradients in the model's "
            "forward, or take strategy.name ddp"
        )
    return None
