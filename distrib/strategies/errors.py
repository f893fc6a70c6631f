"""Errors in forward, loss or backward that the strategy causes: each becomes one line that names the way out."""

import re
import traceback
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from distrib.errors import ConfigError
from distrib.strategies.base import Strategy

_UNREDUCED = "Expected to have finished reduction in the prior iteration"
_NOT_GATHERED = ("mixed torch.Tensor and DTensor", "out of bounds for storage of size 0")
_NO_GRAPH = "does not require grad and does not have a grad_fn"
_EMPTY_SHAPE = re.compile(r"\(0\)|\[0\]|multiplied \(.*\b0x\d")  # of a parameter that zero3 has not gathered
_OWN_BACKWARD = re.compile(r"Loss scaling is required|Direct calls to tensor.backward\(\)")  # DeepSpeed's words


@contextmanager
def recognised(placement: Strategy) -> Iterator[None]:
    """Around forward, loss and backward. Raises ConfigError in place of an error that the strategy causes."""
    try:
        yield
    except (AttributeError, RuntimeError, IndexError) as error:
        if (reason := _reason(error, placement)) is None:
            raise
        raise ConfigError(reason) from error


def _reason(error: Exception, placement: Strategy) -> str | None:
    name, text = placement.name, str(error)
    if isinstance(error, AttributeError):
        wrapped = placement.model is not placement.module and error.obj is placement.model
        if not wrapped or not hasattr(placement.module, str(error.name)):
            return None
        return (
            f"task: reads model.{error.name}, but {name} reduces the gradients of what goes through model(…) alone; "
            f"use {error.name} in the model's forward"
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
    if name.startswith("zero") and (_OWN_BACKWARD.search(text) or _is_deepspeeds(error)):
        return (
            f"task: takes a gradient of the model's output in forward or loss, which {name} takes for the backward; "
            "take it in the model's forward, or take strategy.name ddp"
        )
    if (name == "fsdp2" and any(part in text for part in _NOT_GATHERED)) or (
        name == "zero3" and _EMPTY_SHAPE.search(text)
    ):
        return (
            f"task: uses parameters that {name} has not gathered ({text.splitlines()[0]}); it gathers a module's when "
            "forward is called, so call methods, read parameters and take gradients of gradients in the model's "
            "forward, or take strategy.name ddp"
        )
    return None


def _is_deepspeeds(error: Exception) -> bool:
    """An IndexError inside a hook of DeepSpeed's: zero2 has no bucket for a gradient before the backward."""
    frames = traceback.extract_tb(error.__traceback__)
    return isinstance(error, IndexError) and "deepspeed" in frames[-1].filename
