"""Reads the folder of an offline wandb run, without wandb's service and without a network.

wandb has no reader in Python. The file is a log in LevelDB's format, which is parsed here; its records are wandb's own
protobuf messages.
"""

import json
import os
import re
import struct
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from distrib.errors import RunDirError

# LevelDB's log has blocks of chunks: checksum, length, kind, data. A record is one chunk, or one chunk a block.
_HEADER = b":W&B\xe1\xbe\x00"
_BLOCK = 32768
_CHUNK = struct.Struct("<IHB")
_BEFORE_ID = re.compile(r".*run-\d+_\d+-")  # the folder's name up to the run's id
_FULL, _FIRST, _LAST = 1, 2, 4


@dataclass
class OfflineRun:
    """What wandb recorded of one start of a run."""

    id: str = ""
    name: str = ""
    project: str = ""
    config: dict[str, Any] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)  # each with `_step`; nested keys as outer.inner
    summary: dict[str, Any] = field(default_factory=dict)
    system: dict[str, float] = field(default_factory=dict)  # the newest metrics of the machine
    exit_code: int | None = None  # None: it has not ended, or was killed
    preempting: bool = False


def offline_folders(path: Path) -> list[Path]:
    """Return the folders of a run's starts, oldest first: `path` itself, those in it, or those in `path`/wandb.

    The list is empty if there are none. Raises RunDirError if they belong to several runs.
    """
    for folder in (path, path / "wandb"):
        if any(folder.glob("run-*.wandb")):
            return [folder]
        found = sorted({file.parent for file in folder.glob("*run-*/run-*.wandb") if not file.parent.is_symlink()})
        if len({_BEFORE_ID.sub("", each.name) for each in found}) > 1:
            raise RunDirError(f"{path}: holds several runs of wandb; give one of them, for example {found[0]}")
        if found:
            return found
    return []


def read_offline(folder: Path) -> OfflineRun:
    """Read one offline folder. A record that a killed process wrote in part is left out. Raises RunDirError."""
    file = next(iter(sorted(folder.glob("run-*.wandb"))), None)
    if file is None:
        raise RunDirError(f"{folder}: not an offline run of wandb, there is no run-*.wandb in it")
    from google.protobuf.message import DecodeError  # these take half a second
    from wandb.proto.wandb_internal_pb2 import Record  # type: ignore[attr-defined]

    run = OfflineRun()
    try:
        for _, data in _records(file.read_bytes()):
            _take(run, Record.FromString(data))
    except OSError as error:
        raise RunDirError(f"{file}: cannot be read: {error.strerror}") from None
    except (DecodeError, ValueError) as error:
        raise RunDirError(f"{file}: cannot be read as wandb's records: {error}") from None
    return run


def mend(folder: Path) -> None:
    """Cut off a record that a killed process wrote in part. Otherwise `wandb sync` would stop there."""
    for file in folder.glob("run-*.wandb"):
        data = file.read_bytes()
        whole = max((end for end, _ in _records(data)), default=0) if data.startswith(_HEADER) else 0
        if not whole:
            file.unlink()
        elif whole < len(data):
            os.truncate(file, whole)


def _records(data: bytes) -> Iterator[tuple[int, bytes]]:
    """Yield where each record ends, and its bytes, up to a torn chunk in the last block.

    Raises ValueError if an earlier chunk is damaged.
    """
    if _HEADER.startswith(data):  # the header is not complete yet
        return
    if not data.startswith(_HEADER):
        raise ValueError("it does not begin as such a file does")
    place, record = len(_HEADER), b""
    while place + _CHUNK.size <= len(data):
        left = _BLOCK - place % _BLOCK
        if left < _CHUNK.size:  # padding: no chunk fits here
            place += left
            continue
        checksum, length, kind = _CHUNK.unpack_from(data, place)
        start = place + _CHUNK.size
        chunk = data[start : start + length]
        if len(chunk) < length or checksum != zlib.crc32(chunk, zlib.crc32(bytes([kind]))):
            if place // _BLOCK < (len(data) - 1) // _BLOCK:
                raise ValueError(f"damaged at byte {place}")
            return  # torn: the process was killed while it wrote
        place = start + length
        record = chunk if kind in (_FULL, _FIRST) else record + chunk
        if kind in (_FULL, _LAST):
            yield place, record


def _take(run: OfflineRun, record: Any) -> None:
    kind = record.WhichOneof("record_type")
    if kind == "run":
        run.id, run.name, run.project = record.run.run_id, record.run.display_name, record.run.project
        _configure(run, record.run.config.update)
    elif kind == "config":
        _configure(run, record.config.update)
    elif kind == "history":
        run.history.append({"_step": record.history.step.num, **dict(_values(record.history.item))})
    elif kind == "summary":
        run.summary.update(_values(record.summary.update))
    elif kind == "stats":
        run.system.update({item.key: json.loads(item.value_json) for item in record.stats.item})
    elif kind == "exit":
        run.exit_code = record.exit.exit_code
    elif kind == "preempting":
        run.preempting = True


def _configure(run: OfflineRun, items: Iterable[Any]) -> None:
    for item in items:
        *sections, last = item.nested_key or [item.key]
        inner = run.config
        for section in sections:
            inner = inner.setdefault(section, {})
        if sections or last != "_wandb":  # wandb's own notes
            inner[last] = json.loads(item.value_json)


def _values(items: Iterable[Any]) -> Iterator[tuple[str, Any]]:
    for item in items:
        yield ".".join(item.nested_key) or item.key, json.loads(item.value_json)
