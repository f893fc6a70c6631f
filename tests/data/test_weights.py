"""Weighted sampling: exact probabilities, draws that are a function of the position, and refusals of bad weights."""

import math
import tracemalloc
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Run, interrupted, lines, refused
from data_tasks import Weighted as WeightedTask
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare
from tasks import Masked, Streamed
from torch import Tensor

from distrib import Config, Trainer
from distrib.data.order import derive_seed, mix
from distrib.data.weights import Weighted
from distrib.errors import ConfigError, RunDirError
from distrib.monitor.compare.comparison import diverge
from distrib.monitor.compare.runs import load_runs
from distrib.run_folder.verify import verify_run as verify_folder
from distrib.training.commands import verify_run

WEIGHTS = st.lists(
    st.one_of(st.just(0.0), st.floats(1e-300, 1e300), st.floats(0.01, 10), st.integers(0, 5)), min_size=1, max_size=60
).filter(any)
SEEDS = st.integers(0, 2**63 - 1)
VALUES: dict[str, Any] = {
    "data": {"global_batch_size": 8, "micro_batch_size": 4},
    "train": {"steps": 6},
    "checkpoint": {"every_steps": 3},
}


def positions(first: int, count: int) -> "np.ndarray":
    return np.arange(first, first + count, dtype=np.uint64)


def probabilities(order: Weighted) -> list[Fraction]:
    """Return the exact probability of each sample by the table's columns."""
    width = 1 << (62 - order.size.bit_length())
    found = [Fraction(0)] * order.size
    for column, (threshold, alias) in enumerate(zip(order.thresholds.tolist(), order.aliases.tolist(), strict=True)):
        assert 0 <= threshold <= width
        found[column] += Fraction(threshold, width * order.size)
        found[alias] += Fraction(width - threshold, width * order.size)
    return found


@given(WEIGHTS)
def test_the_table_has_the_weights_probabilities(weights: list[float]) -> None:
    found = probabilities(Weighted(np.array(weights, dtype=np.float64), 0))
    total = sum(map(Fraction, weights))
    assert sum(found) == 1
    for probability, weight in zip(found, weights, strict=True):
        exact = Fraction(weight) / total
        assert abs(probability - exact) < Fraction(1, 2**50)
        assert weight or not probability


@given(WEIGHTS, SEEDS, st.integers(0, 2**62), st.integers(1, 100), st.integers(0, 100))
def test_any_position_can_be_computed_directly(
    weights: list[float], seed: int, first: int, count: int, skip: int
) -> None:
    order = Weighted(np.array(weights, dtype=np.float64), seed)
    walked = order.indices(positions(first, skip + count))[skip:]
    assert order.indices(positions(first + skip, count)).tolist() == walked.tolist()
    assert all(weights[index] > 0 for index in walked.tolist())


@given(WEIGHTS, SEEDS, st.integers(0, 2**62))
def test_a_draw_is_that_of_the_textbook(weights: list[float], seed: int, position: int) -> None:
    """Computed in Python's integers, from the table and two 64-bit numbers of the position."""
    order = Weighted(np.array(weights, dtype=np.float64), seed)
    keys = [np.uint64(derive_seed(seed, 0x3A17, number)) for number in range(2)]
    first, second = (int(mix(np.array([position], dtype=np.uint64) ^ key)[0]) for key in keys)
    column, height = first * len(weights) >> 64, second >> (2 + len(weights).bit_length())
    expected = column if height < int(order.thresholds[column]) else int(order.aliases[column])
    assert order.indices(positions(position, 1)).tolist() == [expected]


@pytest.mark.parametrize("first", [0, 10**12, 2**62])
def test_draws_are_distributed_by_the_weights_and_do_not_depend_on_each_other(first: int) -> None:
    weights = np.array([1.0, 5.0, 0.5, 2.0, 0.0, 3.5])
    drawn = Weighted(weights, 3).indices(positions(first, 120_000))
    counts, expected = np.bincount(drawn.astype(np.int64), minlength=6), weights / weights.sum()
    assert counts[4] == 0
    kept = weights > 0
    assert chisquare(counts[kept], expected[kept] * len(drawn)).pvalue > 1e-3
    pairs = np.bincount((drawn[:-1] * np.uint64(6) + drawn[1:]).astype(np.int64), minlength=36)
    likely = np.outer(expected, expected).ravel()
    assert chisquare(pairs[likely > 0], likely[likely > 0] * pairs.sum()).pvalue > 1e-3


def test_many_weights_cost_a_table_and_no_more() -> None:
    weights = np.random.default_rng(0).pareto(1.5, 1_000_000)
    tracemalloc.start()
    order = Weighted(weights, 1)
    after = tracemalloc.get_traced_memory()[0]
    order.indices(positions(10**6 * 512, 512))
    tracemalloc.stop()
    assert after < 20 * len(weights)  # bytes
    drawn = order.indices(positions(0, 200_000)).astype(np.int64)
    assert math.isclose(np.mean(drawn == weights.argmax()), weights.max() / weights.sum(), rel_tol=0.5)


@settings(max_examples=20)
@given(SEEDS)
def test_seeds_draw_differently(seed: int) -> None:
    weights = np.arange(1.0, 100.0)
    first, second = (Weighted(weights, one).indices(positions(0, 50)).tolist() for one in (seed, seed + 1))
    assert first != second


class Drawing(Masked):
    """Has the weights `weights`."""

    weights: Any = None

    def sample_weights(self) -> Any:
        return self.weights


def fit(folder: Path, trained: Masked, **more: Any) -> Path:
    Trainer(trained, Config.from_dict({"name": "run", **VALUES, **more}), folder).fit()
    return folder


def drawing(weights: Any) -> Masked:
    return type("Drawing", (Drawing,), {"weights": weights})()


NAN = [1.0] * 96 + [math.nan]


@pytest.mark.parametrize(
    ("weights", "said"),
    [
        ([1.0] * 96, "returned 96 weights; return one number for each of the 97 samples"),
        ([0.0] * 97, "all weights are 0; give at least one sample a weight above 0"),
        ([1.0, -2.0, *[1.0] * 95], "weight 1 is -2; give finite numbers, 0 or more"),
        (NAN, "weight 96 is nan; give finite numbers, 0 or more"),
        (torch.tensor([math.inf] * 97), "weight 0 is inf; give finite numbers, 0 or more"),
        (torch.ones(97, 1), "returned Tensor (97, 1) float32; return one number for each of the 97 samples"),
        (["1"] * 97, "returned [str, str, str, str, str, str, …]; return one number for each of the 97 samples"),
        ({0: 1.0}, "returned {0: float}; return one number for each of the 97 samples"),
        ([], "returned 0 weights; return one number for each of the 97 samples"),
        ([1.0 + 1j] * 97, "return one number for each of the 97 samples"),
        (1.0, "returned float; return one number for each of the 97 samples"),
    ],
)
def test_bad_weights_are_refused(tmp_path: Path, weights: Any, said: str) -> None:
    with pytest.raises(ConfigError) as error:
        fit(tmp_path / "run", drawing(weights))
    assert str(error.value).startswith("task.sample_weights: ")
    assert said in str(error.value)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run").exists()


def test_a_stream_has_no_weights(tmp_path: Path) -> None:
    class WeightedStream(Streamed):
        def sample_weights(self) -> Any:
            return [1.0]

    with pytest.raises(ConfigError, match=r"task.sample_weights: Tokens is a stream, whose samples cannot be drawn"):
        fit(tmp_path / "run", WeightedStream())


def test_bad_weights_end_the_command_with_exit_code_2(run: Run, tmp_path: Path) -> None:
    (tmp_path / "negative.py").write_text(
        "from tasks import Masked\nclass Negative(Masked):\n    def sample_weights(self):\n        return [-1.0] * 97\n"
    )
    (tmp_path / "negative.yaml").write_text("task: {target: 'negative:Negative'}\ntrain: {steps: 2}\n")
    for command in (("train",), ("explain",)):
        line = refused(run("distrib", *command, "negative.yaml"))
        assert "task.sample_weights: weight 0 is -1; give finite numbers, 0 or more" in line
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("make", [list, torch.tensor, np.array, tuple])
def test_weights_may_be_any_sequence_of_numbers(tmp_path: Path, make: Callable[..., Any]) -> None:
    numbers = [number % 7 for number in range(97)]
    found = fit(tmp_path / "run", drawing(make(numbers)))
    expected = fit(tmp_path / "expected", WeightedTask())
    assert [line["samples"] for line in lines(found)] == [line["samples"] for line in lines(expected)]


def test_other_weights_are_refused_and_told_by_verify_and_compare(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = {"task": {"target": "data_tasks:Weighted"}}
    finished = fit(tmp_path / "run", WeightedTask(), **config)
    assert verify_folder(finished).unknown == 6
    verify_run(finished)
    assert "6 of 6 steps, all in order, 48 samples where they belong" in capsys.readouterr().out
    monkeypatch.setattr(WeightedTask, "sample_weights", lambda self: [float(1 + n % 7) for n in range(97)])
    folder = interrupted(finished, tmp_path / "killed", after=3)
    other = "task.train_dataset has other weights than at the run's start"
    for run in (finished, folder):
        with pytest.raises(RunDirError, match=other):
            fit(run, WeightedTask(), **config)
        with pytest.raises(RunDirError, match=other):
            verify_run(run)
    fit(tmp_path / "other", WeightedTask(), **config)
    difference = diverge(*load_runs([finished, tmp_path / "other"]))
    assert (difference.cause, difference.samples) == ("data order", 0)
    assert "task.train_dataset has other weights than in run" in difference.because
    monkeypatch.setattr(WeightedTask, "sample_weights", Masked.sample_weights)
    with pytest.raises(RunDirError, match=r"is ordered by a permutation, not by weights as at the run's start"):
        fit(finished, WeightedTask(), **config)


def test_verify_makes_the_training_set_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also if that fails, which it reports."""
    finished = fit(tmp_path / "run", WeightedTask(), task={"target": "data_tasks:Weighted"})
    made = []
    train_dataset = WeightedTask.train_dataset
    monkeypatch.setattr(WeightedTask, "train_dataset", lambda self: made.append(1) or train_dataset(self))
    verify_run(finished)
    assert made == [1]

    def fail(self: Any) -> None:
        made.append(1)
        raise OSError("it is not there")

    monkeypatch.setattr(WeightedTask, "train_dataset", fail)
    verify_run(finished)
    assert made == [1, 1]


def test_without_its_task_a_run_with_weights_is_verified_but_for_its_samples(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    verify_run(fit(tmp_path / "run", WeightedTask()))
    said = capsys.readouterr().out
    assert "all in order, 0 samples where they belong" in said
    assert "the samples of 6 steps not checked, data not checked: the task was given in Python" in said


def test_a_sample_that_is_drawn_twice_is_augmented_differently(tmp_path: Path) -> None:
    seen: list[tuple[int, float]] = []

    class Augmented:
        def __len__(self) -> int:
            return 97

        def __getitem__(self, index: int) -> Any:
            seen.append((index, torch.rand(()).item()))
            return Masked().train_dataset()[index]

    class Few(Masked):
        def train_dataset(self) -> Any:
            return Augmented()

        def sample_weights(self) -> Tensor:
            return (torch.arange(97) < 3).double()

        def eval_dataset(self) -> None:
            return None

    fit(tmp_path / "run", Few())
    trained = seen[-48:]
    assert {index for index, _ in trained} == {0, 1, 2}
    assert len({number for _, number in trained}) == 48
