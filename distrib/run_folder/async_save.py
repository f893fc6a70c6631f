"""Saves while training goes on: the loop pays for a copy to CPU memory, a thread of each rank for the rest."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from distrib.errors import CheckpointError
from distrib.processes.world import World
from distrib.run_folder import checkpoint
from distrib.run_folder.checkpoint import Part, Shard


class Saver:
    """Writes checkpoints of all ranks, one at a time, over a process group that nobody else uses.

    The ranks call its methods alike. An error of the background save is raised on every rank, by the next call.
    """

    def __init__(self, folder: Path, world: World, keep: int, keep_every: int, durable: list[Path]) -> None:
        """`durable`: files that must be on disk before a checkpoint counts, such as the ledger."""
        self.folder, self.world, self.keep, self.keep_every, self.durable = folder, world, keep, keep_every, durable
        self._staged: dict[str, Tensor] = {}
        self._thread: threading.Thread | None = None
        self._error: str | None = None
        self._saved: list[dict[str, Any]] = []

    def save(self, step: int, shards: dict[str, Shard], manifest: dict[str, Any]) -> None:
        """Begin to save; returns when `shards` may change again. Waits for the save before, if it is not done.

        `manifest`: what it shall say besides the tensors.
        """
        started = time.perf_counter()
        self.wait()
        part = checkpoint.part_of(shards, self.world.rank, self.world.world_size)
        part = Part(part.rank, self._stage(part.tensors), part.places)
        manifest = {"step": step, **manifest}
        stall = time.perf_counter() - started
        self._thread = threading.Thread(target=self._work, args=(step, part, manifest, stall), daemon=True)
        self._thread.start()

    def completed(self) -> list[dict[str, Any]]:
        """What was saved since the last call: step, path, seconds and the seconds that training waited.

        Raises CheckpointError where a save failed. Waits for nothing.
        """
        if self._error is not None:
            error, self._error = self._error, None
            raise CheckpointError(error)
        saved, self._saved = self._saved, []
        return saved

    def wait(self) -> None:
        """Until the save that is under way, if there is one, has ended. Raises CheckpointError where it failed."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._error is not None:
            self.completed()

    @contextmanager
    def completed_first(self) -> Iterator[None]:
        """If what is done here fails, raise it when the save that is under way has ended: the process ends then."""
        try:
            yield
        except Exception:
            with suppress(CheckpointError):
                self.wait()
            raise

    def _stage(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Copies in CPU memory, also of what lies there: the next update changes that. Kept for the next save, since
        touching new memory takes longer than copying."""
        pinned = not self.world.use_cpu
        for name, tensor in tensors.items():
            staged = self._staged.get(name)
            if staged is None or staged.shape != tensor.shape:
                staged = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=pinned)
            self._staged[name] = staged.copy_(tensor, non_blocking=True)
        if pinned:
            torch.accelerator.synchronize()
        return {name: self._staged[name] for name in tensors}

    def _work(self, step: int, part: Part, manifest: dict[str, Any], stall: float) -> None:
        started = time.perf_counter()
        try:
            path = self._write(step, part, manifest)
        except CheckpointError as error:
            self._error = str(error)
        except Exception as error:  # a rank that is gone
            self._error = f"{self.folder}: the checkpoint of step {step} was not saved: {error}"
        else:
            seconds = round(time.perf_counter() - started, 3)
            self._saved.append({"step": step, "path": path.name, "seconds": seconds, "stall": round(stall, 4)})

    def _write(self, step: int, part: Part, manifest: dict[str, Any]) -> Path:
        partial = self._agreed(lambda: checkpoint.prepare(self.folder, step))
        mine: dict[str, Any] | str
        try:
            file = checkpoint.write_part(partial, part)
            mine = {"file": file, "tensors": checkpoint.describe(part)}
        except CheckpointError as error:
            mine = str(error)
        parts = self._gathered(mine)

        def commit() -> Path:
            if failed := [said for said in parts if isinstance(said, str)]:
                raise CheckpointError(failed[0])
            checkpoint.sync(self.durable)
            tensors = checkpoint.merge([said["tensors"] for said in parts])
            path = checkpoint.commit(partial, {**manifest, "tensors": tensors}, [said["file"] for said in parts])
            checkpoint.prune(self.folder, self.keep, self.keep_every)
            return path

        return self._agreed(commit)

    def _agreed(self, work: Callable[[], Path]) -> Path:
        """What `work` gives on rank 0, or the error that it raises there, on every rank."""
        return self.world.on_rank_0(work, group=self.world.background)

    def _gathered(self, said: Any) -> list[Any]:
        if self.world.background is None:
            return [said]
        everyone: list[Any] | None = [None] * self.world.world_size if self.world.is_rank_0 else None
        dist.gather_object(said, everyone, dst=0, group=self.world.background)
        return everyone or []
