"""Tokenised documents as one memory-mapped row, and the samples that are cut from it.

On disk lie, for a split: its `tokens`; `starts`, the place of each document's first token, and the number of tokens;
and `numbers`, one that belongs to each document (what it is, its reader says).
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

NOT_COUNTED = -100  # a target that torch's cross-entropy leaves out

Places = NDArray[np.int64]


class DocumentWriter:
    """Writes the documents of a split to `folder`."""

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
    """What the samples are read from, a micro-batch at a time."""

    def __init__(self, folder: Path, split: str) -> None:
        self.tokens, self.starts, self.numbers = (
            np.load(folder / f"{split}.{name}.npy", mmap_mode="r") for name in ("tokens", "starts", "numbers")
        )

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """One sample, as a batch of one has it."""
        number = range(len(self))[index]  # type: ignore[arg-type]  # an IndexError ends who iterates
        return {key: value[0] for key, value in self.__getitems__([number]).items()}

    def __getitems__(self, indices: list[int]) -> dict[str, Tensor]:
        raise NotImplementedError


class TokenWindows(Documents):
    """For a causal language model: `length` tokens, their positions, and the targets that follow them, int64 each.

    A document's number is the first of its tokens, from 0, that is a target: 1, or more where it begins with a prompt.
    Packed, windows cover the row, whatever documents lie in them, and positions begin anew with each document;
    otherwise each window holds one document, or the next part of one that is longer. Either way each token is a target
    in one window at most, and a window's end cuts a document: what follows begins without it.
    """

    def __init__(self, folder: Path, split: str, length: int, packed: bool) -> None:
        super().__init__(folder, split)
        self.folder, self.split, self.length, self.packed = folder, split, length, packed
        sizes = np.array([len(self.tokens)]) if packed else np.diff(self.starts)
        self._windows_before = np.concatenate([[0], np.cumsum(-(-np.maximum(sizes - 1, 0) // length))])

    def __len__(self) -> int:
        return int(self._windows_before[-1])

    def __getitems__(self, indices: list[int]) -> dict[str, Tensor]:
        windows: Places = np.array(indices, np.int64)
        row = np.searchsorted(self._windows_before, windows, side="right") - 1  # the document, or 0 where all are one
        bounds = np.array([0, len(self.tokens)]) if self.packed else self.starts
        first = bounds[row] + (windows - self._windows_before[row]) * self.length
        places: Places = first[:, None] + np.arange(self.length + 1)
        within = places < bounds[row + 1][:, None]
        places = np.minimum(places, len(self.tokens) - 1)
        document = np.searchsorted(self.starts, places, side="right") - 1
        since_start = places - self.starts[document]
        position = np.minimum(since_start, places - first[:, None])
        tokens = self.tokens[places].astype(np.int64)
        counted = within & (since_start >= self.numbers[document])
        targets = np.where(counted, tokens, NOT_COUNTED)[:, 1:]
        return {
            "input_ids": torch.from_numpy(tokens[:, :-1]),
            "position_ids": torch.from_numpy(position[:, :-1]),
            "targets": torch.from_numpy(targets),
        }

    def __reduce__(self) -> tuple[Any, ...]:
        return TokenWindows, (self.folder, self.split, self.length, self.packed)  # what is mapped stays here


class Classified(Documents):
    """For a classifier: a document, filled up to the longest of its micro-batch, and its number, the class."""

    def __init__(self, folder: Path, split: str, filler: int) -> None:
        super().__init__(folder, split)
        self.folder, self.split, self.filler = folder, split, filler

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitems__(self, indices: list[int]) -> dict[str, Tensor]:
        first, end = self.starts[indices], self.starts[np.array(indices) + 1]
        places: Places = first[:, None] + np.arange((end - first).max())
        within = places < end[:, None]
        tokens = self.tokens[np.minimum(places, len(self.tokens) - 1)].astype(np.int64)
        return {
            "input_ids": torch.from_numpy(np.where(within, tokens, self.filler)),
            "attention_mask": torch.from_numpy(within.astype(np.int64)),
            "labels": torch.from_numpy(self.numbers[indices].astype(np.int64)),
        }

    def __reduce__(self) -> tuple[Any, ...]:
        return Classified, (self.folder, self.split, self.filler)
