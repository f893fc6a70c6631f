"""Saves checkpoints asynchronously: the training loop waits for a copy to CPU memory, a thread of each rank writes."""

import threading
import time
from collections.abc import Callable, Collection, Iterator
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
from distrib.run_folder.manifest import step_of, steps_of


class Saver:
    """Writes checkpoints of all ranks, one at a time. Its threads communicate over their own process group.

    All ranks call the same methods in the same order. An error in the background is raised on every rank, by the next
    call.
    """

    def __init__(self, folder: Path, world: World, keep: int, keep_every: int, durable: list[Path]) -> None:
        """`durable`: files, such as the ledger, that are synced to disk before a checkpoint is committed."""
        self.folder, self.world, self.keep, self.keep_every, self.durable = folder, world, keep, keep_every, durable
        self._staged: dict[str, Tensor] = {}
        self._thread: threading.Thread | None = None
        self._error: str | None = None
        self._saved: list[dict[str, Any]] = []

    def save(self, step: int, shards: dict[str, Shard], manifest: dict[str, Any], best: Collection[int] = ()) -> None:
        """Start to save, and return as soon as `shards` may change again. Waits until an earlier save has ended.

        `manifest`: its entries other than those about tensors and files. `best`: steps whose checkpoints are kept; each
        is this step, or was saved before. Raises CheckpointError if the earlier save failed.
        """
        started = time.perf_counter()
        self.wait()
        part = checkpoint.part_of(shards, self.world.rank, self.world.world_size)
        part = Part(part.rank, self._stage(part.tensors), part.places)
        manifest = {"step": step, **manifest}
        stall = time.perf_counter() - started
        self._thread = threading.Thread(target=self._work, args=(step, part, manifest, stall, best), daemon=True)
        self._thread.start()

    def has(self, step: int) -> bool:
        """Return whether the checkpoint of this step is there. Collective."""
        return self.world.on_rank_0(lambda: any(step_of(path) == step for path in steps_of(self.folder)))

    def completed(self) -> list[dict[str, Any]]:
        """Return the saves that have ended since the last call, without waiting.

        Each has `step`, `path`, `seconds`, and `stall`: the seconds that training waited. Raises CheckpointError if a
        save failed.
        """
        if self._error is not None:
            error, self._error = self._error, None
            raise CheckpointError(error)
        saved, self._saved = self._saved, []
        return saved

    def wait(self) -> None:
        """Wait until a save in progress has ended. Raises CheckpointError if it failed."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._error is not None:
            self.completed()

    @contextmanager
    def completed_first(self) -> Iterator[None]:
        """If the body raises, let a save in progress finish before the exception ends the process."""
        try:
            yield
        except Exception:
            with suppress(CheckpointError):
                self.wait()
            raise

    def _stage(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Copy tensors to CPU buffers. CPU tensors are copied too, because the next update changes them in place.

        The buffers are reused by the next save, because first use of new memory takes longer than the copy.
        """
        pinned = not self.world.use_cpu
        for name, tensor in tensors.items():
            staged = self._staged.get(name)
            if staged is None or staged.shape != tensor.shape:
                staged = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=pinned)
            self._staged[name] = staged.copy_(tensor, non_blocking=True)
        if pinned:
            torch.accelerator.synchronize()
        return {name: self._staged[name] for name in tensors}

    def _work(self, step: int, part: Part, manifest: dict[str, Any], stall: float, best: Collection[int]) -> None:
        started = time.perf_counter()
        try:
            path = self._write(step, part, manifest, best)
        except CheckpointError as error:
            self._error = str(error)
        except Exception as error:  # another rank has ended
            self._error = f"{self.folder}: the checkpoint of step {step} was not saved: {error}"
        else:
            seconds = round(time.perf_counter() - started, 3)
            self._saved.append({"step": step, "path": path.name, "seconds": seconds, "stall": round(stall, 4)})

    def _write(self, step: int, part: Part, manifest: dict[str, Any], best: Collection[int]) -> Path:
        partial = self._on_rank_0(lambda: checkpoint.prepare(self.folder, step))
        mine: dict[str, Any] | str
        try:
            file = checkpoint.write_part(partial, part)
            mine = {"file": file, "tensors": checkpoint.describe(part)}
        except CheckpointError as error:
            mine = str(error)
        parts = self._gather(mine)

        def commit() -> Path:
            if errors := [part for part in parts if isinstance(part, str)]:
                raise CheckpointError(errors[0])
            checkpoint.sync(self.durable)
            tensors = checkpoint.merge([part["tensors"] for part in parts])
            path = checkpoint.commit(partial, {**manifest, "tensors": tensors}, [part["file"] for part in parts])
            checkpoint.prune(self.folder, self.keep, self.keep_every, best)
            return path

        return self._on_rank_0(commit)

    def _on_rank_0(self, work: Callable[[], Path]) -> Path:
        """Run `work` on rank 0, and return its result, or raise its error, on every rank."""
        return self.world.on_rank_0(work, group=self.world.background)

    def _gather(self, value: Any) -> list[Any]:
        """Return the values of all ranks on rank 0, and an empty list on the others."""
        if self.world.background is None:
            return [value]
        values: list[Any] | None = [None] * self.world.world_size if self.world.is_rank_0 else None
        dist.gather_object(value, values, dst=0, group=self.world.background)
        return values or []
