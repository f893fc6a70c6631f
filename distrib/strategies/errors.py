"""Errors in forward, loss or backward that the strategy causes: each becomes one line that names the way out."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from distrib.errors import ConfigError
from distrib.strategies.base import Strategy

_NO_GRAPH = "does not require grad and does not have a grad_fn"


@contextmanager
def recognised(strategy: Strategy) -> Iterator[None]:
    """Around forward, loss and backward. Raises ConfigError in place of an error that the strategy causes."""
    try:
        yield
    except (AttributeError, RuntimeError, IndexError) as error:
        if (reason := _reason(error, strategy)) is None:
            raise
        raise ConfigError(reason) from error


def _reason(error: Exception, strategy: Strategy) -> str | None:
    if isinstance(error, AttributeError):
        wrapped = strategy.model is not strategy.module and error.obj is strategy.model
        if not wrapped or not hasattr(strategy.module, str(error.name)):
            return None
        return (
            f"task: reads model.{error.name}, but {strategy.name} reduces the gradients of what goes through model(…) "
            f"alone; use {error.name} in the model's forward"
        )
    if _NO_GRAPH in str(error) and not torch.is_grad_enabled():
        return (
            "task: takes a gradient in evaluation, which runs under torch.no_grad(); write `with torch.enable_grad():` "
            "around what is differentiated"
        )
    return strategy.explain_error(error)
