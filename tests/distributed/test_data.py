"""Ranks whose data differ are refused before the first step. Task.prepare may write files first."""

import json
from pathlib import Path

import data_cases
import pytest
import torch
from conftest import ROOT, Run, check, lines, losses

from distrib import Trainer
from distrib.training import build
from distrib.training.commands import evaluate_run


def test_different_data_on_two_ranks_are_refused(run: Run, tmp_path: Path) -> None:
    check(run("distrib", "launch", "--processes", 2, ROOT / "tests/distributed/data_cases.py", tmp_path))
    outcomes, second = (json.loads((tmp_path / f"outcomes-{rank}.json").read_text()) for rank in (0, 1))
    assert outcomes == second, "all ranks know why"
    for name in ("unequal", "unequal-steps"):
        assert "rank 1 of 2" in outcomes[name]
        assert "task.train_dataset has 50 samples, not 51 as on rank 0" in outcomes[name]
    assert "task.train_dataset has another sample 0 than on rank 0" in outcomes["parts"]
    assert "task.train_dataset has 30 samples, not 60 as on rank 0" in outcomes["half-written"]
    assert not any((tmp_path / name).exists() for name in ("unequal", "unequal-steps", "parts", "half-written"))
    assert outcomes["prepared"] == "trained 8 steps"
    assert (tmp_path / "cache.jsonl.ranks").read_text() == "0\n"
    assert outcomes["refused"] == "task.url: cannot be reached"
    assert outcomes["split"] == "trained 10 steps"
    check_split(tmp_path)


def check_split(folder: Path) -> None:
    """A split without a seed is the same on both ranks, on one process and in evaluate; it depends on the config's
    seed."""
    for name, seed in (("alone", 0), ("other", 1)):
        torch.manual_seed(seed + 5)  # earlier draws must have no effect
        config = data_cases.config(seed=seed, **data_cases.SPLIT)
        Trainer(build.task(config), config, folder / name).fit()
    alone, two, other = (losses(folder / name) for name in ("alone", "split", "other"))
    assert two == pytest.approx(alone, rel=1e-5)  # the bound of test_parity.py
    assert other != pytest.approx(alone, rel=1e-2)
    data = [
        json.loads((folder / name / "environment.json").read_text())["data"] for name in ("alone", "split", "other")
    ]
    assert data[0] == data[1] != data[2]
    (last,) = lines(folder / "alone", "evals.jsonl")
    for _ in range(2):
        assert evaluate_run(folder / "alone") == last["metrics"]
