"""Describes a batch or a sample for messages."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

_SHOWN = 6


def describe(value: Any) -> str:
    """Return its structure, with shapes and dtypes of tensors: `(Tensor (16, 8) float32, Tensor (16) int64)`."""
    if isinstance(value, Mapping):
        return f"{{{_few([f'{key!r}: {describe(part)}' for key, part in value.items()])}}}"
    if isinstance(value, list | tuple):
        parts = _few([describe(part) for part in value])
        return f"[{parts}]" if isinstance(value, list) else f"({parts})"
    if isinstance(value, Tensor) or (hasattr(value, "shape") and hasattr(value, "dtype")):
        shape = ", ".join(str(size) for size in value.shape)
        return f"{type(value).__name__} ({shape}) {str(value.dtype).removeprefix('torch.')}"
    return "None" if value is None else type(value).__name__


def _few(parts: list[str]) -> str:
    return ", ".join(parts[:_SHOWN]) + (", …" if len(parts) > _SHOWN else "")
