"""Forks: new runs that begin from another run's checkpoint, with another model or optimizer."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import lines, tensors
from tasks import Masked

from distrib import Config, Trainer
from distrib.errors import ConfigError, MismatchError
from distrib.strategies.optimizer_state import require_same_state

ADAMW = {"name": "adamw"}
MOMENTUM = {"name": "sgd", "momentum": 0.9}


def config(optim: dict[str, Any], steps: int) -> Config:
    data = {"global_batch_size": 8, "micro_batch_size": 4}
    return Config.from_dict({"data": data, "optim": {"lr": 0.01, **optim}, "train": {"steps": steps}})


def fork(parent: Path, to: Path, optim: dict[str, Any], task: Masked | None = None, **options: Any) -> dict[str, Any]:
    checkpoint = str(parent / "checkpoints" / "step-00000003")
    return Trainer(task or Masked(), config(optim, 6), to, resume=checkpoint, fork=True, **options).fit()


@pytest.fixture(scope="module")
def parents(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("parents")
    for name, optim in {"adamw": ADAMW, "sgd": {"name": "sgd"}}.items():
        Trainer(Masked(), config(optim, 3), folder / name).fit()
    return {name: folder / name for name in ("adamw", "sgd")}


@pytest.mark.parametrize(
    ("parent", "optim", "said"),
    [
        ("adamw", MOMENTUM, r"holds exp_avg, exp_avg_sq, step for \S+, and the config's keeps momentum_buffer; take"),
        ("adamw", {"name": "sgd"}, "the config's keeps nothing; take the same optim.name"),
        ("adamw", {**ADAMW, "options": {"amsgrad": True}}, "keeps exp_avg, exp_avg_sq, max_exp_avg_sq, step; take"),
        ("sgd", ADAMW, r"it holds nothing for \S+, and the config's keeps exp_avg, exp_avg_sq, step; .* --reset-optim"),
    ],
)
def test_a_fork_with_another_optimizer(
    parents: dict[str, Path], tmp_path: Path, parent: str, optim: dict[str, Any], said: str
) -> None:
    with pytest.raises(MismatchError, match=said) as error:
        fork(parents[parent], tmp_path / "refused", optim)
    assert error.value.exit_code == 2
    assert "\n" not in str(error.value)
    summary = fork(parents[parent], tmp_path / "anew", optim, reset_optimizer=True)
    assert (summary["steps"], summary["skipped"]) == (6, 0)
    assert [line["step"] for line in lines(tmp_path / "anew")] == [3, 4, 5]


def test_reset_optimizer_drops_the_optimizers_state(parents: dict[str, Path], tmp_path: Path) -> None:
    """Adam counts its updates. A fork that is interrupted before its first checkpoint starts without the state
    again."""
    fork(parents["adamw"], tmp_path / "kept", ADAMW)
    fork(parents["adamw"], tmp_path / "anew", ADAMW, reset_optimizer=True)
    for name, updates in {"kept": 6, "anew": 3}.items():
        counts = {float(value) for key, value in tensors(tmp_path / name).items() if key.startswith("optimizer.step.")}
        assert counts == {updates}
    origin = json.loads((tmp_path / "anew" / "environment.json").read_text())["forked_from"]
    assert origin["reset_optimizer"]
    for path in (tmp_path / "anew" / "checkpoints").iterdir():
        for file in path.iterdir():
            file.unlink()
        path.rmdir()
    (tmp_path / "anew" / "summary.json").unlink()
    before = [line["loss"] for line in lines(tmp_path / "anew")]
    Trainer(Masked(), config(ADAMW, 6), tmp_path / "anew").fit()
    assert [line["loss"] for line in lines(tmp_path / "anew")] == before


def test_reset_optimizer_needs_fork(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--reset-optimizer: is for a new run that begins from a checkpoint"):
        Trainer(Masked(), config(ADAMW, 6), tmp_path / "run", reset_optimizer=True)


def test_a_fork_with_another_model(parents: dict[str, Path], tmp_path: Path) -> None:
    class Wider(Masked):
        def model(self) -> Any:
            return torch.nn.Sequential(torch.nn.Embedding(64, 5), torch.nn.Linear(5, 64))

    with pytest.raises(MismatchError, match="of another model: ") as error:
        fork(parents["adamw"], tmp_path / "run", ADAMW, Wider())
    assert error.value.exit_code == 2


def test_a_fork_with_parameters_that_were_frozen() -> None:
    """Under ddp their optimizer state starts new. Under ZeRO, parameters share one step count, which would be wrong for
    them."""
    saved = {"optimizer.step.a.weight", "optimizer.exp_avg.a.weight"}
    state = {"step": torch.tensor(1.0), "exp_avg": torch.zeros(2)}
    own = [("a.weight", state, None), ("b.weight", dict(state), None)]
    require_same_state(Path("run"), saved, ["a.weight", "b.weight"], own)
    shared = [("a.weight", state, None), ("b.weight", state, None)]
    with pytest.raises(MismatchError, match=r"state for a.weight and none for b.weight, of which this strategy keeps"):
        require_same_state(Path("run"), saved, ["a.weight", "b.weight"], shared)
