import json
import resource
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import nn

from distrib.errors import CheckpointError, RunDirError
from distrib.state import checkpoint


class Tied(nn.Module):
    """Two names for one weight, as in most language models."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(5, 3)
        self.head = nn.Linear(3, 5, bias=False)
        self.head.weight = self.embedding.weight
        self.register_buffer("steps", torch.tensor(7))


def test_what_is_saved_is_loaded(tmp_path: Path) -> None:
    module, other = Tied(), Tied()
    path = checkpoint.save(tmp_path, module.state_dict(), 12, "abc")
    assert path.name == "step-00000012"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-00000012"]  # nothing partial is left
    manifest = checkpoint.load(checkpoint.newest(tmp_path), other)
    assert (manifest["step"], manifest["chain"]) == (12, "abc")
    for name, value in module.state_dict().items():
        assert torch.equal(other.state_dict()[name], value)
    assert other.head.weight is other.embedding.weight
    assert set(load_file(path / "model.safetensors")) == set(module.state_dict())  # both names of the tied weight


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(place=st.integers(0, 10**6), flip=st.integers(1, 255))
def test_any_byte_changed_in_the_weights_is_noticed(tmp_path: Path, place: int, flip: int) -> None:
    folder = tmp_path / "checkpoints"
    if not folder.exists():
        checkpoint.save(folder, Tied().state_dict(), 1, "")
    weights = folder / "step-00000001" / "model.safetensors"
    whole = weights.read_bytes()
    damaged = bytearray(whole)
    damaged[place % len(whole)] ^= flip
    weights.write_bytes(damaged)
    with pytest.raises(CheckpointError, match="damaged: its content is not what the manifest says"):
        checkpoint.load(weights.parent, Tied())
    weights.write_bytes(whole)


def test_a_missing_or_truncated_file_is_named(tmp_path: Path) -> None:
    path = checkpoint.save(tmp_path, Tied().state_dict(), 1, "")
    (path / "model.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"model\.safetensors: damaged"):
        checkpoint.load(path, Tied())
    (path / "manifest.json").unlink()
    with pytest.raises(CheckpointError, match=r"cannot read the checkpoint: .*manifest.json"):
        checkpoint.load(path, Tied())
    with pytest.raises(CheckpointError, match="no checkpoint there"):
        checkpoint.newest(tmp_path / "nowhere")


def test_another_models_weights_are_refused_in_one_line(tmp_path: Path) -> None:
    path = checkpoint.save(tmp_path, Tied().state_dict(), 1, "")
    with pytest.raises(CheckpointError, match="the weights are not those of this model") as error:
        checkpoint.load(path, nn.Linear(3, 5))
    assert "\n" not in str(error.value)


def test_a_disk_that_refuses_leaves_earlier_checkpoints_whole(tmp_path: Path) -> None:
    """A limit on the size of files stands for a full disk: the write fails in the middle, for root too."""
    large = nn.Linear(1000, 100)
    checkpoint.save(tmp_path, Tied().state_dict(), 1, "")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, before[1]))
    try:
        with pytest.raises(CheckpointError, match="cannot save the checkpoint"):
            checkpoint.save(tmp_path, large.state_dict(), 2, "")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert checkpoint.newest(tmp_path).name == "step-00000001"
    assert json.loads((checkpoint.newest(tmp_path) / "manifest.json").read_text())["step"] == 1


def test_an_exported_file_is_verified_and_never_overwritten(tmp_path: Path) -> None:
    path = checkpoint.save(tmp_path / "run", Tied().state_dict(), 1, "")
    weights = path / "model.safetensors"
    file = checkpoint.export(path, tmp_path / "out")
    assert file.read_bytes() == weights.read_bytes()
    assert [p.name for p in file.parent.iterdir()] == ["model.safetensors"]
    with pytest.raises(RunDirError, match="is there already; choose another folder with --out"):
        checkpoint.export(path, tmp_path / "out")
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    with pytest.raises(CheckpointError, match="damaged"):
        checkpoint.export(path, tmp_path / "other")
    assert not (tmp_path / "other").exists()
