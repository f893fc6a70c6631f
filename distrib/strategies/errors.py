"""Explains errors in forward, loss or backward that the strategy causes: one line that says what to do."""

import torch

from distrib.strategies.base import Strategy

_NO_GRAPH = "does not require grad and does not have a grad_fn"


def explain(error: Exception, strategy: Strategy) -> str | None:
    """Return one line for an error in forward, loss or backward; None if the strategy did not cause it."""
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
    return strategy.explain_error(error) if isinstance(error, RuntimeError | IndexError) else None
