"""What `Task.samples` returns, for people to look at: images, texts and tables."""

import csv
import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from distrib.errors import ConfigError

_CHANNELS = (1, 3, 4)
_LONGEST_VALUE = 100_000  # characters; Python's csv reads fields of up to 131,072
_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]*")  # of a file


@dataclass(frozen=True)
class Image:
    """A picture, written as PNG.

    `pixels`: a tensor or array of shape (H, W), (H, W, C) or (C, H, W) with 1, 3 or 4 channels, of bytes (uint8), or of
    floats or bools from 0 to 1; or a matplotlib Figure.
    """

    pixels: Any


@dataclass(frozen=True)
class Text:
    """A text, written as UTF-8."""

    text: str


@dataclass(frozen=True)
class Table:
    """A table, written as CSV: the names of its columns, and rows of as many values each."""

    columns: Sequence[str]
    rows: Sequence[Sequence[Any]]


def encode(samples: Any) -> dict[str, bytes]:
    """Return the files of what `Task.samples` returned, by name. Raises ConfigError if it is something else."""
    if not isinstance(samples, Mapping):
        raise ConfigError(
            f"task.samples: returned {type(samples).__name__}; return a dict of distrib.Image, Text and Table by name"
        )
    files = {}
    for name, sample in samples.items():
        if not isinstance(name, str) or not _NAME.fullmatch(name):
            raise ConfigError(f"task.samples: {name!r} is no name; give letters, digits, '_', '-', and later '.'")
        try:
            suffix, content = _content(sample)
        except (ValueError, TypeError) as error:
            raise ConfigError(f"task.samples: {name!r}: {error}") from error
        files[f"{name}{suffix}"] = content
    return files


def _content(sample: Any) -> tuple[str, bytes]:
    """Return the suffix and the content of a sample's file. Raises ValueError, TypeError."""
    if isinstance(sample, Image):
        return ".png", _png(sample.pixels)
    if isinstance(sample, Text):
        if not isinstance(sample.text, str):
            raise ValueError(f"the text is {type(sample.text).__name__}, not a string")
        return ".txt", sample.text.encode("utf-8", "replace")
    if isinstance(sample, Table):
        text = io.StringIO()
        rows = [list(sample.columns), *(list(row) for row in sample.rows)]
        for number, row in enumerate(rows):
            if len(row) != len(rows[0]):
                raise ValueError(f"row {number} of the table has {len(row)} values for {len(rows[0])} columns")
            for value in row:
                if len(str(value)) > _LONGEST_VALUE:
                    raise ValueError(f"row {number} of the table has a value of {len(str(value)):,} characters; cut it")
        csv.writer(text).writerows(rows)  # lines end with CRLF, as in RFC 4180
        return ".csv", text.getvalue().encode()
    raise ValueError(f"it is {type(sample).__name__}; give distrib.Image, distrib.Text or distrib.Table")


def _png(pixels: Any) -> bytes:
    content = io.BytesIO()
    if hasattr(pixels, "savefig"):
        pixels.savefig(content, format="png", metadata={"Software": None})  # the same bytes from every version
        return content.getvalue()
    from matplotlib.image import imsave

    options: dict[str, Any] = {"metadata": {"Software": None}, "cmap": "gray", "vmin": 0, "vmax": 255}
    imsave(content, _as_bytes(pixels), format="png", **options)
    return content.getvalue()


def _as_bytes(pixels: Any) -> Any:
    """Return shape (H, W) or (H, W, 3 or 4), as bytes."""
    import numpy as np

    array = np.asarray(pixels.detach().cpu() if hasattr(pixels, "detach") else pixels)
    if array.ndim == 3 and array.shape[0] in _CHANNELS and array.shape[2] not in _CHANNELS:
        array = array.transpose(1, 2, 0)
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[:, :, 0]
    if array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[2] not in _CHANNELS) or not array.size:
        raise ValueError(f"pixels of shape {array.shape}; give (H, W), (H, W, C) or (C, H, W) with 1, 3 or 4 channels")
    if array.dtype == np.uint8:
        return array
    if array.dtype.kind not in "fb" or not ((array >= 0) & (array <= 1)).all():
        raise ValueError(f"pixels of {array.dtype} that are not all from 0 to 1; give these, or bytes (uint8)")
    return (array.astype(np.float64) * 255).round().astype(np.uint8)
