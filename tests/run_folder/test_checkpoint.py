"""The checkpoint format: any number of ranks writes it, any number reads it, and damage is detected."""

import os
import resource
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

from distrib.errors import CheckpointError, RunDirError
from distrib.processes.world import World
from distrib.run_folder import checkpoint
from distrib.run_folder.async_save import Saver
from distrib.run_folder.checkpoint import Shard, replicated
from distrib.run_folder.export import export
from distrib.task import Task

on_disk = settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
NOTHING_ELSE: dict[str, Any] = {"chain": "", "applied": 0, "loss_scale": None, "numbers": {}, "tied": {}}


def some_tensors(seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "model.weight": torch.randn(7, 5, generator=generator),
        "model.large": torch.randn(200, 100, generator=generator),  # is split between ranks if replicated
        "model.half": torch.randn(9, generator=generator).bfloat16(),
        "model.steps": torch.tensor(7),
        "model.empty": torch.empty(0, 3),
        "optimizer.exp_avg.weight": torch.randn(7, 5, generator=generator),
    }


def cut(tensors: dict[str, Tensor], world_size: int) -> list[dict[str, Shard]]:
    """Shard as ZeRO does: flat, evenly, with a shorter last shard. Every second tensor is replicated."""
    ranks: list[dict[str, Shard]] = [{} for _ in range(world_size)]
    for number, (name, tensor) in enumerate(tensors.items()):
        size = -(-tensor.numel() // world_size)
        for rank, shards in enumerate(ranks):
            flat = tensor.reshape(-1)[rank * size : (rank + 1) * size]
            first = min(rank * size, tensor.numel())
            shards[name] = replicated(tensor) if number % 2 else Shard(flat, tuple(tensor.shape), first)
    return ranks


def save(folder: Path, tensors: dict[str, Tensor], step: int = 1, world_size: int = 1, **manifest: Any) -> Path:
    partial = checkpoint.prepare(folder, step)
    parts = [checkpoint.part_of(shards, rank, world_size) for rank, shards in enumerate(cut(tensors, world_size))]
    files = [checkpoint.write_part(partial, part) for part in parts]
    merged = checkpoint.merge([checkpoint.describe(part) for part in parts])
    return checkpoint.commit(partial, {"step": step, **NOTHING_ELSE, **manifest, "tensors": merged}, files)


@pytest.mark.parametrize("offsets", [(0, 11), (0, 9), (1, 11)])
def test_shards_with_gaps_or_overlaps_are_refused(offsets: tuple[int, int]) -> None:
    """Not with an assert, which `python -O` removes."""
    parts = [
        checkpoint.Part(rank, {"model.w": torch.zeros(10)}, {"model.w": ((20,), offset)})
        for rank, offset in enumerate(offsets)
    ]
    with pytest.raises(CheckpointError, match=r"model.w: the ranks hold it with gaps or overlaps"):
        checkpoint.merge([checkpoint.describe(part) for part in parts])


def empty(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: torch.full_like(tensor, 99) for name, tensor in tensors.items()}


@on_disk
@given(writers=st.integers(1, 7), readers=st.integers(1, 7))
def test_any_number_of_ranks_reads_what_any_number_wrote(tmp_path: Path, writers: int, readers: int) -> None:
    tensors = some_tensors()
    path = save(tmp_path, tensors, world_size=writers)
    sizes = [file.stat().st_size for file in path.glob("*.safetensors")]
    assert len(sizes) == writers
    assert (
        sum(sizes) < sum(t.numel() * t.element_size() for t in tensors.values()) + 1000 * writers
    )  # nothing is written twice
    read = empty(tensors)
    for shards in cut(read, readers):
        checkpoint.load(path, checkpoint.verify(path), shards)
    for name, tensor in tensors.items():
        assert torch.equal(read[name], tensor), name
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-00000001"]  # nothing partial is left
    shutil.rmtree(path)


def test_non_contiguous_tensors_are_saved(tmp_path: Path) -> None:
    tensors = {"model.weight": torch.randn(3, 4).t()}
    read = {"model.weight": torch.empty(3, 4).t()}
    path = save(tmp_path, tensors)
    checkpoint.load(path, checkpoint.verify(path), {"model.weight": replicated(read["model.weight"])})
    assert torch.equal(read["model.weight"], tensors["model.weight"])


@settings(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(place=st.integers(0, 10**6), flip=st.integers(1, 255), number=st.integers(0, 2))
def test_any_changed_byte_is_detected(tmp_path: Path, place: int, flip: int, number: int) -> None:
    path = tmp_path / "step-00000001"
    if not path.exists():
        save(tmp_path, some_tensors(), world_size=2)
    file = sorted(path.iterdir())[number]
    whole = file.read_bytes()
    damaged = bytearray(whole)
    damaged[place % len(whole)] ^= flip
    file.write_bytes(damaged)
    with pytest.raises(CheckpointError, match="damaged"):
        checkpoint.verify(path)
    file.write_bytes(whole)
    checkpoint.verify(path)


def test_a_missing_or_truncated_file_is_named(tmp_path: Path) -> None:
    path = save(tmp_path, some_tensors())
    (path / "shard-00000.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"shard-00000\.safetensors: damaged"):
        checkpoint.verify(path)
    (path / "shard-00000.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"shard-00000\.safetensors: damaged: No such file"):
        checkpoint.verify(path)
    (path / "manifest.json").unlink()
    with pytest.raises(CheckpointError, match=r"damaged: manifest.json is missing"):
        checkpoint.verify(path)


def test_another_models_weights_are_refused_in_one_line(tmp_path: Path) -> None:
    path = save(tmp_path, {"model.weight": torch.zeros(3, 5)})
    for name, shape, said in (
        ("model.weight", (5, 3), r"model.weight has the shape \[3, 5\], here it has the shape \[5, 3\]"),
        ("model.bias", (5,), "model.bias is not there"),
    ):
        with pytest.raises(CheckpointError, match=f"of another model: {said}") as error:
            checkpoint.load(path, checkpoint.verify(path), {name: replicated(torch.zeros(shape))})
        assert "\n" not in str(error.value)


def test_different_scalars_are_not_loaded_into_a_shared_one(tmp_path: Path) -> None:
    """ZeRO keeps one step count for a whole parameter group."""
    saved = {"optimizer.step.a": torch.tensor(3.0), "optimizer.step.b": torch.tensor(3.0)}
    one = torch.tensor(0.0)
    path = save(tmp_path, saved)
    checkpoint.load(path, checkpoint.verify(path), dict.fromkeys(saved, replicated(one)))
    assert one == 3
    path = save(tmp_path, {**saved, "optimizer.step.b": torch.tensor(2.0)}, step=2)
    with pytest.raises(CheckpointError, match=r"optimizer.step.b is 2.0, and has another value for other parameters"):
        checkpoint.load(path, checkpoint.verify(path), dict.fromkeys(saved, replicated(one)))


def test_keep_and_keep_every(tmp_path: Path) -> None:
    for step in range(1, 11):
        save(tmp_path, {"model.weight": torch.zeros(1)}, step)
        checkpoint.prune(tmp_path, keep=2, keep_every=4)
    assert [checkpoint.step_of(path) for path in checkpoint.steps_of(tmp_path)] == [10, 9, 8, 4]


def test_a_new_save_replaces_a_damaged_checkpoint_of_the_step(tmp_path: Path) -> None:
    path = save(tmp_path, some_tensors())
    (path / "manifest.json").unlink()
    save(tmp_path, some_tensors(1))
    checkpoint.verify(path)
    checkpoint.prepare(tmp_path, 2).rmdir()  # the next save deletes the replaced folder
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def exported(path: Path) -> dict[str, Tensor]:
    found: dict[str, Tensor] = load_file(path)
    return found


def test_an_exported_file_is_verified_and_never_overwritten(tmp_path: Path) -> None:
    tensors = some_tensors()
    path = save(tmp_path / "run", tensors, world_size=3, tied={"head.weight": "weight"})
    (file,) = export(path, tmp_path / "out")
    names = {name.removeprefix("model."): tensor for name, tensor in tensors.items() if name.startswith("model.")}
    assert exported(file).keys() == {*names, "head.weight"}  # both names of the tied weight, and no optimizer state
    for name, tensor in {**names, "head.weight": names["weight"]}.items():
        assert torch.equal(exported(file)[name], tensor)
    assert [p.name for p in file.parent.iterdir()] == ["model.safetensors"]
    with pytest.raises(RunDirError, match="exists already; choose another folder with --out"):
        export(path, tmp_path / "out")
    (path / "shard-00001.safetensors").write_bytes(b"x")
    with pytest.raises(CheckpointError, match="damaged"):
        export(path, tmp_path / "other")
    assert not (tmp_path / "other").exists()


class Fancy(Task):
    """Exports a file of its own with the weights, and may then fail as on a full disk."""

    full = False

    def export(self, weights: dict[str, Tensor], folder: Path) -> None:
        super().export(weights, folder)
        if self.full:
            raise OSError(28, "No space left on device")
        (folder / "names.txt").write_text(" ".join(sorted(weights)))


def test_a_tasks_own_export_is_atomic(tmp_path: Path) -> None:
    path = save(tmp_path / "run", some_tensors(), tied={"head.weight": "weight"})
    task, out = Fancy(), tmp_path / "out"
    task.full = True
    with pytest.raises(CheckpointError, match="out: cannot export the weights: No space left on device"):
        export(path, out, task)
    assert not list(out.glob("[!.]*"))
    task.full = False
    files = export(path, out, task)
    assert files == [out / "names.txt", out / "model.safetensors"]  # the weights last
    assert sorted(out.iterdir()) == sorted(files)
    assert set((out / "names.txt").read_text().split()) == exported(files[1]).keys()
    assert len({file.stat().st_mode for file in files}) == 1
    files[1].unlink()
    with pytest.raises(RunDirError, match=r"names.txt: exists already; choose another folder with --out"):
        export(path, out, task)


def saver(folder: Path) -> Saver:
    return Saver(folder, World(), keep=2, keep_every=0, durable=[])


def saved_by(folder: Path, step: int, tensor: Tensor) -> None:
    running = saver(folder)
    running.save(step, {"model.weight": replicated(tensor)}, NOTHING_ELSE)
    running.wait()


def test_a_save_does_not_see_later_updates(tmp_path: Path) -> None:
    tensor, running = torch.zeros(2_000_000), saver(tmp_path)
    for step in range(1, 4):
        tensor.fill_(step)
        running.save(step, {"model.weight": replicated(tensor)}, NOTHING_ELSE)
        tensor.fill_(-1)  # the next update, while the thread writes
    running.wait()
    assert [saved["step"] for saved in running.completed()] == [1, 2, 3]
    for step in (2, 3):
        read = torch.empty(2_000_000)
        path = tmp_path / f"step-{step:08d}"
        checkpoint.load(path, checkpoint.verify(path), {"model.weight": replicated(read)})
        assert (read == step).all()


def test_a_full_disk_leaves_earlier_checkpoints_valid(tmp_path: Path) -> None:
    """A limit on file sizes acts as a full disk: writing fails halfway, also for root."""
    saved_by(tmp_path, 1, torch.zeros(10))
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, before[1]))
    try:
        with pytest.raises(CheckpointError, match=r"cannot save the checkpoint.*earlier ones are untouched") as error:
            saved_by(tmp_path, 2, torch.zeros(100_000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert "\n" not in str(error.value)
    assert [checkpoint.step_of(path) for path in checkpoint.steps_of(tmp_path)] == [1]
    checkpoint.verify(tmp_path / "step-00000001")


# System calls of a save.
OPERATIONS = (
    (os, "mkdir"),
    (os, "fsync"),
    (os, "rename"),
    (os, "open"),
    (os, "chmod"),
    (os, "unlink"),
    (os, "rmdir"),
    (checkpoint, "save_file"),
    (Path, "write_text"),
)


def with_operations(patch: pytest.MonkeyPatch, before: Callable[[int], None]) -> None:
    """Call `before(number)` before each file operation of a save."""
    count = iter(range(10_000))
    for place, name in OPERATIONS:
        original = getattr(place, name)

        def counted(*args: Any, original: Any = original, **kwargs: Any) -> Any:
            before(next(count))
            return original(*args, **kwargs)

        patch.setattr(place, name, counted)


def third_save(folder: Path) -> None:
    """Make a save that writes one checkpoint and deletes one."""
    saved_by(folder, 3, torch.full((20,), 3.0))


def two_saves(folder: Path) -> Path:
    for step in (1, 2):
        saved_by(folder, step, torch.full((20,), float(step)))
    return folder


def check_newest(folder: Path) -> int:
    """Return the step of the newest visible checkpoint, after checking that it is valid and has its step's values."""
    path = next(checkpoint.steps_of(folder))
    read = torch.empty(20)
    checkpoint.load(path, checkpoint.verify(path), {"model.weight": replicated(read)})
    assert (read == checkpoint.step_of(path)).all()
    return checkpoint.step_of(path)


def number_of_operations(folder: Path) -> int:
    numbers: list[int] = []
    with pytest.MonkeyPatch.context() as patch:
        with_operations(patch, numbers.append)
        third_save(folder)
    return len(numbers)


def test_a_save_may_fail_or_be_killed_at_every_operation(tmp_path: Path) -> None:
    total = number_of_operations(two_saves(tmp_path / "counted"))
    assert total >= 15
    steps = set()
    for number in range(total):
        folder = two_saves(tmp_path / f"failing-{number}")
        with pytest.MonkeyPatch.context() as patch:

            def fail(now: int, number: int = number) -> None:
                if now == number:
                    raise OSError(28, "No space left on device")

            with_operations(patch, fail)
            with pytest.raises(CheckpointError, match="No space left on device"):
                third_save(folder)
        steps.add(check_newest(folder))
        third_save(folder)  # and the next save works
        assert check_newest(folder) == 3

        folder = two_saves(tmp_path / f"dying-{number}")
        child = os.fork()
        if child == 0:
            with pytest.MonkeyPatch.context() as patch:
                with_operations(patch, lambda now, number=number: os._exit(7) if now == number else None)
                third_save(folder)
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
        steps.add(check_newest(folder))
        third_save(folder)
        assert check_newest(folder) == 3
    assert steps == {2, 3}  # it was killed before the rename, and after it
