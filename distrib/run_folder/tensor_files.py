"""Reads slices of tensors from files, so that a rank reads what it holds and no more. Runs no code from the files."""

import pickle
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.serialization import add_safe_globals, clear_safe_globals, get_safe_globals

from distrib.errors import CheckpointError

OF_TORCH = (".pt", ".pth", ".bin")  # suffixes of files that torch.save wrote
_SAFETENSORS = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "BOOL": "bool",
    "C64": "complex64",
    **{f"I{bits}": f"int{bits}" for bits in (8, 16, 32, 64)},
    **{f"U{bits}": f"uint{bits}" for bits in (8, 16, 32, 64)},
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
}
# What torch.load raises for a file that is damaged, or is none of torch.save's.
_UNREADABLE = (OSError, RuntimeError, ValueError, TypeError, LookupError, AttributeError, EOFError)


@contextmanager
def open_tensors(path: Path) -> Iterator["TensorFile"]:
    """Open a file of safetensors or, by its suffix, of torch.save. Raises CheckpointError."""
    if path.suffix in OF_TORCH:
        yield TensorFile(_load_with_torch(path))
        return
    try:
        file = safe_open(path, framework="pt")
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())
        raise CheckpointError(f"{path}: cannot be read: {reason}") from None
    with file:
        yield TensorFile(_Slices(file))


class TensorFile:
    """The tensors of an open file. `bytes_read`: of their values, so far."""

    def __init__(self, tensors: Mapping[str, Any]) -> None:
        self._tensors = tensors
        self.bytes_read = 0

    def entries(self) -> dict[str, dict[str, Any]]:
        """Return dtype and shape of each tensor, by name. Reads no values."""
        return {name: {"dtype": _dtype(of), "shape": list(_shape(of))} for name, of in self._tensors.items()}

    def read(self, name: str, first: int, into: Tensor) -> None:
        """Read the elements of the flattened tensor from `first` on, as many as fit `into`, shape (elements,)."""
        of, at = self._tensors[name], 0
        for block in blocks(_shape(of), first, first + len(into)):
            part = of[block].reshape(-1)
            into[at : at + len(part)] = part
            at += len(part)
            self.bytes_read += part.numel() * part.element_size()


class _Slices(Mapping[str, Any]):
    """The tensors of a safetensors file, each as an object that reads a slice when it is taken."""

    def __init__(self, file: Any) -> None:
        self._file, self._names = file, list(file.keys())

    def __getitem__(self, name: str) -> Any:
        return self._file.get_slice(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def blocks(shape: tuple[int, ...], first: int, end: int) -> Iterator[tuple[slice, ...]]:
    """Yield the indices of blocks that together are the elements `first` to `end - 1` of a tensor in C order.

    A block is a range of rows. A row of which the interval has only a part is cut in the same way.
    """
    if first >= end:
        return
    if not shape:
        yield ()
        return
    row = prod(shape[1:])
    start, stop = -(-first // row), end // row  # the whole rows
    if start > stop:  # a part of one row
        yield from _within(stop, shape, first, end)
        return
    yield from _within(start - 1, shape, first, start * row)
    if start < stop:
        yield (slice(start, stop),)
    yield from _within(stop, shape, stop * row, end)


def _within(place: int, shape: tuple[int, ...], first: int, end: int) -> Iterator[tuple[slice, ...]]:
    before = place * prod(shape[1:])
    for block in blocks(shape[1:], first - before, end - before):
        yield (slice(place, place + 1), *block)


def _load_with_torch(path: Path) -> dict[str, Tensor]:
    """Map a file into memory, so that values are read when used. Names of nested dictionaries are joined by dots.

    Raises CheckpointError for a file that holds anything but plain data and tensors: no other class is called.
    """
    allowed = get_safe_globals()  # libraries allow classes of their own
    clear_safe_globals()
    try:
        with path.open("rb") as file:  # mmap needs one
            if not zipfile.is_zipfile(file):
                raise CheckpointError(
                    f"{path}: is no whole file of torch.save's, which since torch 1.6 writes zip archives"
                )
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        found = dict(_tensors_in(content, "")) if isinstance(content, dict) else {}
    except pickle.UnpicklingError:
        raise CheckpointError(
            f"{path}: holds Python objects besides tensors, and unpickling them can run code; save its state_dict "
            "alone, as safetensors or by torch.save"
        ) from None
    except _UNREADABLE as error:
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())[:200]
        raise CheckpointError(f"{path}: cannot be read: {reason}") from None
    finally:
        add_safe_globals(allowed)
    for name, tensor in found.items():
        if tensor.layout != torch.strided or tensor.is_quantized or tensor.is_meta:
            raise CheckpointError(f"{path}: {name} is not a dense tensor with values; save it as one")
    return found


def _tensors_in(value: Any, name: str) -> Iterator[tuple[str, Tensor]]:
    if isinstance(value, Tensor):
        yield name, value.detach()
    elif isinstance(value, dict):
        for key, inner in value.items():
            yield from _tensors_in(inner, f"{name}.{key}" if name else str(key))


def _shape(of: Any) -> tuple[int, ...]:
    return tuple(of.shape if isinstance(of, Tensor) else of.get_shape())


def _dtype(of: Any) -> str:
    if isinstance(of, Tensor):
        return str(of.dtype).removeprefix("torch.")
    stored: str = of.get_dtype()
    return _SAFETENSORS.get(stored, stored)
