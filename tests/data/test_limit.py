"""A part of the data: data.limit and eval.limit."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import Run, check_same, interrupted, lines, refused
from data_tasks import Mixed, Weighted
from hypothesis import given
from hypothesis import strategies as st
from tasks import Masked, Numbered, Streamed

from distrib import Config, Trainer
from distrib.data.limit import Limited, limited
from distrib.data.order import Order
from distrib.errors import ConfigError, RunDirError
from distrib.run_folder.verify import verify_run
from distrib.training import build
from distrib.training.commands import evaluate_run


def fit(folder: Path, trained: Any, limit: int | None, eval_limit: int | None = None, **more: Any) -> Path:
    values = {
        "name": "run",
        "data": {"global_batch_size": 8, "micro_batch_size": 4, "limit": limit},
        "train": {"epochs": 4},
        "eval": {"limit": eval_limit},
        "checkpoint": {"every_steps": 3},
    }
    Trainer(trained, Config.from_dict({**values, **more}), folder).fit()
    return folder


@given(st.integers(1, 200), st.integers(1, 10**12), st.integers(0, 2**63 - 1), st.integers(0, 10**6))
def test_each_epoch_reads_the_same_chosen_samples(limit: int, size: int, seed: int, epoch: int) -> None:
    limit = min(limit, size)
    order = Limited(Order(limit, seed), size)
    first, later = (
        order.indices(np.arange(number * limit, (number + 1) * limit, dtype=np.uint64)) for number in (0, epoch)
    )
    assert set(first.tolist()) == set(later.tolist())
    assert len(set(first.tolist())) == limit
    assert first.max() < size


def test_a_run_of_a_part(tmp_path: Path) -> None:
    run = fit(tmp_path / "run", Masked(), 20, 10)
    assert len(lines(run)) == 10, "4 epochs of 20 samples, 8 a step"
    assert lines(run)[-1]["epoch"] == 3
    assert lines(run, "evals.jsonl")[-1]["count"] == 10
    assert verify_run(run).samples == 80
    check_same(fit(interrupted(run, tmp_path / "killed", after=6), Masked(), 20, 10), run)
    with pytest.raises(RunDirError, match=r"data.limit was 20, is 21"):
        fit(run, Masked(), 21, 10)
    with pytest.raises(RunDirError, match=r"task.eval_dataset has 11 samples, not 10 as at the run's start"):
        fit(run, Masked(), 20, 11)


def test_a_limit_that_is_no_smaller_changes_nothing(tmp_path: Path) -> None:
    whole, same = fit(tmp_path / "whole", Masked(), None), fit(tmp_path / "same", Masked(), 97, 500)
    check_same(same, whole)


def test_evaluate_has_the_limit_too(tmp_path: Path) -> None:
    run = fit(tmp_path / "run", Masked(), None, 30, task={"target": "tasks:Masked"}, train={"steps": 3})
    assert evaluate_run(run) == lines(run, "evals.jsonl")[-1]["metrics"]


def test_a_part_of_an_evaluation_set_keeps_its_order() -> None:
    dataset = limited(Numbered().eval_dataset(), 7, 3)
    numbers = [int(dataset[place][1]) for place in range(7)]
    assert numbers == sorted(set(numbers))
    assert len(numbers) == 7


def test_weights_of_the_chosen_samples_count(tmp_path: Path) -> None:
    config = Config.from_dict({"data": {"limit": 20}, "train": {"steps": 1}})
    _, order = build.train_dataset(Weighted(), config)
    assert order is not None
    assert order.size == 20
    drawn = set(order.indices(np.arange(5000, dtype=np.uint64)).tolist())
    part = set(Limited(Order(20, 0), 97).indices(np.arange(20, dtype=np.uint64)).tolist())
    assert drawn == {index for index in part if index % 7}

    class Rare(Masked):
        def sample_weights(self) -> Any:
            return [float(index == min({*range(97)} - part)) for index in range(97)]

    with pytest.raises(ConfigError, match=r"data.limit: 20, and the weights of all samples that it leaves are 0"):
        build.train_dataset(Rare(), config)


@pytest.mark.parametrize(
    ("trained", "said"),
    [
        (Mixed, "data.limit: 20, but the training set is a Mixture; leave it out, and give fewer train.steps"),
        (Streamed, "data.limit: 20, but the training set is a stream (Tokens); leave it out"),
    ],
)
def test_what_cannot_be_limited_is_refused(tmp_path: Path, trained: Any, said: str) -> None:
    with pytest.raises(ConfigError) as error:
        fit(tmp_path / "run", trained(), 20)
    assert said in str(error.value)


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("data.limit=0", "data.limit"),
        ("data.limit=-3", "data.limit"),
        ("data.limit=many", "data.limit"),
        ("data.limit=0.5", "data.limit"),
        ("eval.limit=0", "eval.limit"),
        ("eval.limit=yes", "eval.limit"),
        ("data.limit=10", "data.global_batch_size: 64, but the training set has only 10 samples; give at most 10"),
    ],
)
def test_bad_limits_end_the_command_with_exit_code_2(run: Run, tmp_path: Path, override: str, said: str) -> None:
    (tmp_path / "run.yaml").write_text("task: {target: 'tasks:Masked'}\ntrain: {steps: 2}\n")
    assert said in refused(run("distrib", "train", "run.yaml", override))
    assert not (tmp_path / "runs").exists()
