"""The README's first example."""

import json
from pathlib import Path

from conftest import ROOT, Run, check

from distrib import Config, Trainer
from distrib.task import load_task


def test_two_processes_read_97_percent_of_the_held_out_digits(run: Run, tmp_path: Path) -> None:
    output = check(run("distrib", "launch", "--processes", 2, ROOT / "configs/digits.yaml"))
    summary = json.loads((tmp_path / "runs/digits/summary.json").read_text())
    accuracy = summary["metrics"]["eval/accuracy"]
    assert accuracy >= 0.97
    assert f"eval/accuracy {accuracy:.4f}" in output.splitlines()[-1]
    assert summary["world_size"] == 2
    (last,) = (json.loads(line) for line in (tmp_path / "runs/digits/evals.jsonl").read_text().splitlines()[-1:])
    assert last["count"] == 359  # every fifth of 1,797


def test_regression_by_config_alone(tmp_path: Path) -> None:
    config = Config.load(ROOT / "configs/diabetes.yaml")
    summary = Trainer(load_task(config.task), config, tmp_path / "run").fit()
    # scikit-learn's own LinearRegression reaches 0.447 on this split
    assert summary["metrics"]["eval/r2"] > 0.44
