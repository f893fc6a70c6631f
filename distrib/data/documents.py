"""Datasets that read samples from packed documents through memory maps. distrib/data/packing.py describes the files."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

NOT_COUNTED = -100  # torch's cross-entropy ignores targets of this value

IntArray = NDArray[np.int64]


class Documents(Dataset[Any]):
    """Base class: opens the files of a split. Subclasses define `__len__` and `__getitems__`.

    Pickling sends the constructor's arguments, not the tokens: a worker process opens the files itself. So a subclass
    passes all its arguments to this constructor.
    """

    def __init__(self, folder: Path, split: str, *options: Any) -> None:
        self._arguments = (folder, split, *options)
        self.tokens, self.starts, self.numbers = (
            np.load(folder / f"{split}.{name}.npy", mmap_mode="r") for name in ("tokens", "starts", "numbers")
        )

    def __getitem__(self, index: int) -> Any:
        """Return one sample, without the batch dimension."""
        number = range(len(self))[index]  # type: ignore[arg-type]  # raises the IndexError that ends an iteration
        batch = self.__getitems__([number])
        return {key: value[0] for key, value in batch.items()} if isinstance(batch, dict) else batch[0]

    def __getitems__(self, indices: list[int]) -> Any:
        """Return the samples at `indices` as one batch: tensors whose first dimension is `len(indices)`."""
        raise NotImplementedError

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), self._arguments


class PaddedWindows(Documents):
    """Samples of `length + 1` tokens, int64, which may span several documents.

    Neighbours overlap by one, so each token but the first is a target once. The last window is padded with `filler`,
    at least once, so that each document is followed by a token.
    """

    def __init__(self, folder: Path, split: str, length: int, filler: int) -> None:
        super().__init__(folder, split, length, filler)
        self.length, self.filler = length, filler

    def __len__(self) -> int:
        return -(-len(self.tokens) // self.length)

    def __getitems__(self, indices: list[int]) -> Tensor:
        token_indices = np.array(indices, np.int64)[:, None] * self.length + np.arange(self.length + 1)
        tokens = self.tokens[np.minimum(token_indices, len(self.tokens) - 1)].astype(np.int64)
        tokens[token_indices >= len(self.tokens)] = self.filler
        return torch.from_numpy(tokens)


class TokenWindows(Documents):
    """Samples for a causal language model: `input_ids`, `position_ids` and `targets`, each int64 of shape (length,).

    The number of a document is the index of its first token that is a target: 1, or more if the document begins with a
    prompt. If `packed`, a window may span several documents, and positions restart with each document. Otherwise a
    window holds one document, or a part of a longer one. A token is a target in at most one window. A document that is
    cut at the end of a window continues in the next window without the earlier context.
    """

    def __init__(self, folder: Path, split: str, length: int, packed: bool) -> None:
        super().__init__(folder, split, length, packed)
        self.length, self.packed = length, packed
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


class WholeDocuments(Documents):
    """Samples like those of TokenWindows, of documents with a mask that are never cut.

    A document has at most `length + 1` tokens. If `packed`, a window takes the next documents in order for as long as
    they fit, and positions restart with each document; otherwise it holds one. The targets are the tokens that the
    mask counts, except a document's first. A document without tokens is a row that was left out, and in no window.
    """

    def __init__(self, folder: Path, split: str, length: int, packed: bool) -> None:
        super().__init__(folder, split, length, packed)
        self.length, self.packed = length, packed
        self.learned = np.load(folder / f"{split}.learned.npy", mmap_mode="r")
        self._bounds = np.unique(self.starts)  # of the documents that have tokens
        self._windows = self._next_fit() if packed else self._bounds

    def _next_fit(self) -> IntArray:
        """Return the index of each window's first token, and at the end the number of tokens."""
        windows = [0]
        while windows[-1] < len(self.tokens):
            fits = np.searchsorted(self._bounds, windows[-1] + self.length + 1, side="right") - 1
            windows.append(int(self._bounds[fits]))
        return np.array(windows, np.int64)

    def __len__(self) -> int:
        return len(self._windows) - 1

    def __getitems__(self, indices: list[int]) -> dict[str, Tensor]:
        windows: IntArray = np.array(indices, np.int64)
        first, end = self._windows[windows][:, None], self._windows[windows + 1][:, None]
        token_indices: IntArray = first + np.arange(self.length + 1)
        within = token_indices < end
        token_indices = np.minimum(token_indices, end - 1)
        document = np.searchsorted(self._bounds, token_indices, side="right") - 1
        position = np.where(within, token_indices - self._bounds[document], 0)
        tokens = self.tokens[token_indices].astype(np.int64)
        targets = np.where(within & (position > 0) & self.learned[token_indices], tokens, NOT_COUNTED)
        return {
            "input_ids": torch.from_numpy(tokens[:, :-1]),
            "position_ids": torch.from_numpy(position[:, :-1]),
            "targets": torch.from_numpy(targets[:, 1:]),
        }


class Classified(Documents):
    """Samples for a classifier: a document, padded with `filler` to the longest of its batch, and its class (its
    number)."""

    def __init__(self, folder: Path, split: str, filler: int) -> None:
        super().__init__(folder, split, filler)
        self.filler = filler

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
