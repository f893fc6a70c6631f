"""Slices of tensors in files: equal to a whole read, no more read than asked for, and no code run."""

from itertools import pairwise
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor

from distrib.errors import CheckpointError
from distrib.run_folder.checkpoint import Shard, load
from distrib.run_folder.tensor_files import OF_TORCH, blocks, open_tensors

SHAPES = st.lists(st.integers(0, 5), max_size=4).map(tuple)
STORED = (torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64, torch.bool)


class Counted:
    """A tensor that counts the elements of the slices taken of it."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor, self.shape, self.taken = tensor, tensor.shape, 0

    def __getitem__(self, block: tuple[slice, ...]) -> Tensor:
        part = self.tensor[block]
        self.taken += part.numel()
        return part


def interval(data: st.DataObject, size: int) -> tuple[int, int]:
    first = data.draw(st.integers(0, size))
    return first, data.draw(st.integers(first, size))


@given(st.data(), SHAPES)
def test_blocks_are_the_interval_and_no_more(data: st.DataObject, shape: tuple[int, ...]) -> None:
    first, end = interval(data, prod(shape))
    counted = Counted(torch.arange(prod(shape)).view(shape))
    found = list(blocks(shape, first, end))
    parts = [counted[block].reshape(-1) for block in found]
    assert torch.cat([torch.arange(0), *parts]).tolist() == list(range(first, end))
    assert counted.taken == end - first
    assert len(found) <= max(1, 2 * len(shape) - 1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("files")


@given(st.data(), SHAPES, st.sampled_from(STORED), st.sampled_from([".safetensors", ".pt"]), st.randoms())
def test_a_slice_equals_a_whole_read(
    folder: Path, data: st.DataObject, shape: tuple[int, ...], dtype: torch.dtype, suffix: str, chance: Any
) -> None:
    """Of tensors in any order in memory; converted to the dtype of what is read into."""
    axes = [*range(len(shape))]
    chance.shuffle(axes)
    if len(shape) < 1:
        tensor = torch.randn(())
    else:
        tensor = (3 * torch.randn([shape[axis] for axis in axes])).permute(np.argsort(axes).tolist())
    tensor = tensor.to(dtype)
    file = folder / f"one{suffix}"
    if suffix == ".pt":
        torch.save({"a": {"b": tensor, "steps": 3}, "other": torch.zeros(7)}, file)
    else:
        save_file({"a.b": tensor.contiguous(), "other": torch.zeros(7)}, file)
    with open_tensors(file) as opened:
        assert opened.entries() == {
            "a.b": {"dtype": str(dtype).removeprefix("torch."), "shape": list(tensor.shape)},
            "other": {"dtype": "float32", "shape": [7]},
        }
        first, end = interval(data, tensor.numel())
        for own in (dtype, torch.float32):
            into = torch.zeros(end - first, dtype=own)
            opened.read("a.b", first, into)
            torch.testing.assert_close(into, tensor.reshape(-1)[first:end].to(own), rtol=0, atol=0)
        assert opened.bytes_read == 2 * (end - first) * dtype.itemsize


@given(st.data())
def test_a_shard_reads_what_it_holds(folder: Path, data: st.DataObject) -> None:
    """From a tensor in pieces, as checkpoints have them."""
    whole = torch.arange(24.0)
    cuts = sorted({0, 24, *data.draw(st.lists(st.integers(0, 24), max_size=3))})
    pieces = [*pairwise(cuts)]
    for number, (start, end) in enumerate(pieces):
        save_file({"w": whole[start:end].clone()}, folder / f"{number}.safetensors")
    stretches = [[f"{number}.safetensors", start, end - start] for number, (start, end) in enumerate(pieces)]
    manifest = {"tensors": {"w": {"dtype": "float32", "shape": [4, 6], "stretches": stretches}}}
    first, end = interval(data, 24)
    into = torch.zeros(end - first)
    assert load(folder, manifest, {"w": Shard(into, (4, 6), first)}) == 4 * (end - first)
    torch.testing.assert_close(into, whole[first:end], rtol=0, atol=0)


class Harmful:
    """Unpickled, it writes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("suffix", OF_TORCH)
def test_no_code_is_run(tmp_path: Path, suffix: str) -> None:
    """Not even that of classes that a library has allowed."""
    harm = tmp_path / "harm"
    torch.save({"w": torch.zeros(2), "more": Harmful(harm)}, tmp_path / f"harmful{suffix}")
    torch.save({"w": torch.zeros(2), "more": Allowed()}, tmp_path / f"allowed{suffix}")
    torch.serialization.add_safe_globals([Allowed])
    try:
        for name in ("harmful", "allowed"):
            with (
                pytest.raises(CheckpointError, match="holds Python objects besides tensors, and unpickling"),
                open_tensors(tmp_path / f"{name}{suffix}"),
            ):
                pass
        assert torch.load(tmp_path / f"allowed{suffix}", weights_only=True)["more"].__class__ is Allowed
    finally:
        torch.serialization.clear_safe_globals()
    assert not harm.exists()


class Allowed:
    pass


def test_what_cannot_be_read(tmp_path: Path) -> None:
    torch.save({"w": torch.zeros(99)}, tmp_path / "whole.pt")
    content = (tmp_path / "whole.pt").read_bytes()
    (tmp_path / "cut.pt").write_bytes(content[: len(content) // 2])
    (tmp_path / "empty.bin").write_bytes(b"")
    torch.save({"w": torch.zeros(2)}, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    torch.save({"w": torch.eye(3).to_sparse()}, tmp_path / "sparse.pt")
    torch.save({"w": torch.zeros(3, device="meta")}, tmp_path / "meta.pt")
    (tmp_path / "text.safetensors").write_text("no tensors")
    said = {
        "cut.pt": "is no whole file of torch.save's",
        "empty.bin": "is no whole file of torch.save's",
        "old.pth": "is no whole file of torch.save's, which since torch 1.6 writes zip archives",
        "sparse.pt": "w is not a dense tensor with values",
        "meta.pt": "w is not a dense tensor with values",
        "text.safetensors": "cannot be read: Error while deserializing header",
        "absent.safetensors": "cannot be read: No such file or directory",
        "absent.pt": "cannot be read: No such file or directory",
    }
    for name, why in said.items():
        with pytest.raises(CheckpointError) as error, open_tensors(tmp_path / name):
            pass
        assert why in str(error.value)
        assert str(error.value).startswith(f"{tmp_path / name}: ")
        assert "\n" not in str(error.value)
