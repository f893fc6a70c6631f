"""Runs, configs and checkpoints of earlier versions can be loaded, resumed and compared.

tests/old_runs/ has what distrib wrote in November 2026: a task, its config, and the folder of a run of 8 steps on two
processes. These files must never be written again.
"""

import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import ROOT, Run, check, interrupted, lines, losses
from safetensors.torch import load_file

from distrib import Config

OLD = ROOT / "tests" / "old_runs"
RUN = OLD / "first"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Copy the run and its task to a folder."""
    for name in ("first_task.py", "first.yaml"):
        shutil.copy(OLD / name, tmp_path)
    shutil.copytree(RUN, tmp_path / "runs" / "first")
    return tmp_path


def test_the_config_is_read(folder: Path) -> None:
    given = Config.load(folder / "first.yaml")
    assert Config.load(folder / "runs" / "first" / "config.yaml") == given
    assert (given.optim.name, given.optim.lr, given.optim.schedule) == ("adamw", 0.01, "cosine")


def test_a_finished_run(run: Run, folder: Path) -> None:
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert "8 steps" in check(run("distrib", "verify", "runs/first"))
    assert "had finished before" in check(run("distrib", "train", "first.yaml"))
    found = json.loads(check(run("distrib", "evaluate", "runs/first", "--json")))
    assert found["metrics"] == pytest.approx(lines(RUN, "evals.jsonl")[-1]["metrics"], rel=1e-5)
    after = {path: path.read_bytes() for path in before}
    assert before == after
    check(run("distrib", "export", "runs/first", "--out", "weights"))
    assert load_file(folder / "weights" / "model.safetensors")["0.weight"].shape == (8, 4)


@pytest.mark.parametrize("processes", [1, 2])
def test_an_interrupted_run_resumes(run: Run, folder: Path, processes: int) -> None:
    """To the same result within rounding, because two processes sum in another order than one."""
    shutil.rmtree(folder / "runs")
    at = interrupted(RUN, folder / "runs" / "first", after=4)
    check(run("distrib", "launch", "--processes", processes, "first.yaml"))
    assert losses(at) == pytest.approx(losses(RUN), rel=1e-5)
    assert lines(at)[:4] == lines(RUN)[:4]
    assert lines(at)[-1]["samples"] == lines(RUN)[-1]["samples"]
    assert "8 steps" in check(run("distrib", "verify", "runs/first"))


def test_another_run_begins_from_its_checkpoint(run: Run, folder: Path) -> None:
    fork = ["--resume", RUN / "checkpoints" / "step-00000004", "--fork", "--run-dir", "fork"]
    check(run("distrib", "train", "first.yaml", *fork, "optim.lr=0.02"))
    assert [line["step"] for line in lines(folder / "fork")] == [4, 5, 6, 7]


def test_it_can_be_compared_with_a_new_run(run: Run, folder: Path) -> None:
    check(run("distrib", "launch", "--processes", 2, "first.yaml", "--run-dir", "today"))
    torch.testing.assert_close(torch.tensor(losses(folder / "today")), torch.tensor(losses(RUN)), rtol=1e-5, atol=0)
    said = check(run("distrib", "compare", "runs/first", "today"))
    assert "first" in said
