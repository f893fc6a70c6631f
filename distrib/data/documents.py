"""Tokenised documents in memory-mapped .npy files, and the datasets that read samples from them.

A split has three files. `tokens`: all documents, one after the other. `starts`: the index of each document's first
token, and at the end the number of tokens. `numbers`: one integer for each document, whose meaning the dataset defines.
"""

from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from distrib.data.token_cache import TokenWriter

NOT_COUNTED = -100  # torch's cross-entropy ignores targets of this value

IntArray = NDArray[np.int64]


class DocumentWriter:
    """Writes the three files of a split into `folder`. Use it as a context manager."""

    def __init__(self, folder: Path, split: str, dtype: str) -> None:
        self._tokens = TokenWriter(folder / f"{split}.tokens.npy", dtype)
        self._starts = TokenWriter(folder / f"{split}.starts.npy", "<i8")
        self._numbers = TokenWriter(folder / f"{split}.numbers.npy", "<i8")

    def add(self, tokens: Sequence[int], number: int) -> None:
        self._starts.write([self._tokens.length])
        self._numbers.write([number])
        self._tokens.write(tokens)

    def __enter__(self) -> "DocumentWriter":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._starts.write([self._tokens.length])
        for writer in (self._tokens, self._starts, self._numbers):
            writer.__exit__(kind, error, at)


class Documents(Dataset[Any]):
    """Base class: opens the files of a split. Subclasses define `__len__` and `__getitems__`."""

    def __init__(self, folder: Path, split: str) -> None:
        self.tokens, self.starts, self.numbers = (
            np.load(folder / f"{split}.{name}.npy", mmap_mode="r") for name in ("tokens", "starts", "numbers")
        )

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """Return one sample, without the batch dimension."""
        number = range(len(self))[index]  # type: ignore[arg-type]  # raises the IndexError that ends an iteration
        return {key: value[0] for key, value in self.__getitems__([number]).items()}

    def __getitems__(self, indices: list[int]) -> dict[str, Tensor]:
        """Return the samples at `indices` as one batch: tensors whose first dimension is `len(indices)`."""
        raise NotImplementedError


class TokenWindows(Documents):
    """Samples for a causal language model: `input_ids`, `position_ids` and `targets`, each int64 of shape (length,).

    The number of a document is the index of its first token that is a target: 1, or more if the document begins with a
    prompt. If `packed`, a window may span several documents, and positions restart with each document. Otherwise a
    window holds one document, or a part of a longer one. A token is a target in at most one window. A document that is
    cut at the end of a window continues in the next window without the earlier context.
    """

    def __init__(self, folder: Path, split: str, length: int, packed: bool) -> None:
        super().__init__(folder, split)
        self.folder, self.split, self.length, self.packed = folder, split, length, packed
        sizes = np.array([len(self.tokens)]) if packed else np.diff(self.starts)
        self._windows_before = np.concatenate([[0], np.cumsum(-(-np.maximum(sizes - 1, 0) // length))])

    def __len__(self) -> int:
        return int(self._windows_before[-1])

    def __getitems__(self, indices: list[int]) -> dict[str, Tensor]:
        windows: IntArray = np.array(indices, np.int64)
        row = np.searchsorted(self._windows_before, windows, side="right") - 1  # document; if packed, always 0
        bounds = np.array([0, len(self.tokens)]) if self.packed else self.starts
        first = bounds[row] + (windows - self._windows_before[row]) * self.length
        token_indices: IntArray = first[:, None] + np.arange(self.length + 1)
        within = token_indices < bounds[row + 1][:, None]
        token_indices = np.minimum(token_indices, len(self.tokens) - 1)
        document = np.searchsorted(self.starts, token_indices, side="right") - 1
        since_start = token_indices - self.starts[document]
        position = np.minimum(since_start, token_indices - first[:, None])
        tokens = self.tokens[token_indices].astype(np.int64)
        counted = within & (since_start >= self.numbers[document])
        targets = np.where(counted, tokens, NOT_COUNTED)[:, 1:]
        return {
            "input_ids": torch.from_numpy(tokens[:, :-1]),
            "position_ids": torch.from_numpy(position[:, :-1]),
            "targets": torch.from_numpy(targets),
        }

    def __reduce__(self) -> tuple[Any, ...]:
        return TokenWindows, (self.folder, self.split, self.length, self.packed)  # a worker maps the files itself


class Classified(Documents):
    """Samples for a classifier: a document, padded with `filler` to the longest of its batch, and its class (its
    number)."""

    def __init__(self, folder: Path, split: str, filler: int) -> None:
        super().__init__(folder, split)
        self.folder, self.split, self.filler = folder, split, filler

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitems__(self, indices: list[int]) -> dict[str, Tensor]:
        first, end = self.starts[indices], self.starts[np.array(indices) + 1]
        token_indices: IntArray = first[:, None] + np.arange((end - first).max())
        within = token_indices < end[:, None]
        tokens = self.tokens[np.minimum(token_indices, len(self.tokens) - 1)].astype(np.int64)
        return {
            "input_ids": torch.from_numpy(np.where(within, tokens, self.filler)),
            "attention_mask": torch.from_numpy(within.astype(np.int64)),
            "labels": torch.from_numpy(self.numbers[indices].astype(np.int64)),
        }

    def __reduce__(self) -> tuple[Any, ...]:
        return Classified, (self.folder, self.split, self.filler)
