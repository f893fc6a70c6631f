"""Mixtures: exact proportions at every position, epochs of each dataset, and refusals."""

from collections.abc import Sequence
from fractions import Fraction
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import Run, interrupted, lines, refused
from data_tasks import Mixed as MixedTask
from data_tasks import Weighted
from hypothesis import given
from hypothesis import strategies as st
from tasks import Masked, Tokens

from distrib import Config, Trainer
from distrib.data import Mixture
from distrib.data.mixture import Mixed
from distrib.errors import ConfigError, RunDirError
from distrib.training.commands import verify_run

WEIGHT = st.one_of(st.integers(0, 9), st.floats(1e-6, 1e6), st.decimals(0, 1, places=3).map(float))
WEIGHTS = st.lists(WEIGHT, min_size=1, max_size=12).filter(any)
SEEDS = st.integers(0, 2**63 - 1)
STARTS = st.one_of(st.integers(0, 1000), st.integers(10**12, 2**62))


def mixed(weights: Sequence[float], sizes: Sequence[int] | None = None, seed: int = 0) -> Mixed:
    sizes = sizes or [7 + number for number in range(len(weights))]
    return Mixture({str(i): (range(s), w) for i, (s, w) in enumerate(zip(sizes, weights, strict=True))}).order(seed)  # type: ignore[misc]


def positions(first: int, count: int) -> "np.ndarray":
    return np.arange(first, first + count, dtype=np.uint64)


@given(WEIGHTS, STARTS)
def test_at_every_position_each_dataset_has_its_share(weights: list[float], first: int) -> None:
    order, count = mixed(weights), 200
    found = order.counts(positions(first, count))
    bound = (1 + sum(Fraction(1, number) for number in range(1, max(2, sum(map(bool, weights)))))) / 2
    for number, share in enumerate(order.shares):
        for place in range(count):
            ideal = Fraction(share, sum(order.shares)) * (first + place)
            assert abs(int(found[number, place]) - ideal) <= bound
    assert (found.sum(axis=0) == positions(first, count)).all()
    for before, after in pairwise(found.T.astype(np.int64)):
        assert sorted(after - before) == [0] * (len(weights) - 1) + [1]


@given(WEIGHTS)
def test_shares_are_the_weights(weights: list[float]) -> None:
    shares = mixed(weights).shares
    total = sum(Fraction(str(float(weight))) for weight in weights)
    assert sum(shares) < 2**31
    for share, weight in zip(shares, weights, strict=True):
        assert abs(Fraction(share, sum(shares)) - Fraction(str(float(weight))) / total) < Fraction(len(weights), 2**30)
        assert (share > 0) == (weight > 0)


def test_decimal_weights_are_exact() -> None:
    assert mixed([0.7, 0.3]).shares == [7, 3]
    assert mixed([2, 1, 0]).shares == [2, 1, 0]
    counts = mixed([0.7, 0.3]).counts(np.arange(0, 1000, 10, dtype=np.uint64))
    assert counts.T.tolist() == [[7 * tens, 3 * tens] for tens in range(100)]


@given(WEIGHTS, SEEDS, st.integers(1, 30), STARTS)
def test_each_sample_of_a_dataset_is_read_once_before_one_is_read_again(
    weights: list[float], seed: int, size: int, first: int
) -> None:
    order = mixed(weights, [size] * len(weights), seed)
    where, before = positions(first, 600), order.counts(positions(first, 1))
    indices = order.indices(where).astype(np.int64)
    for number in range(len(weights)):
        own = (indices[indices // size == number] - number * size).tolist()
        own = own[-int(before[number, 0]) % size :]  # the rest of a pass
        for start in range(0, len(own) - size + 1, size):
            assert sorted(own[start : start + size]) == list(range(size))


@given(WEIGHTS, SEEDS, STARTS, st.integers(1, 100), st.integers(0, 100))
def test_any_position_can_be_computed_directly(
    weights: list[float], seed: int, first: int, count: int, skip: int
) -> None:
    order = mixed(weights, seed=seed)
    walked = order.indices(positions(first, skip + count))[skip:]
    assert order.indices(positions(first + skip, count)).tolist() == walked.tolist()


def test_a_mixture_is_its_datasets_one_after_the_other() -> None:
    mixture = Mixture({"a": ([1, 2, 3], 1), "b": ([4, 5], 0.0)})  # type: ignore[dict-item]
    assert [mixture[index] for index in range(len(mixture))] == [1, 2, 3, 4, 5]
    assert set(mixture.order(0).indices(positions(0, 30)).tolist()) == {0, 1, 2}


SAMPLES = Masked().train_dataset()


@pytest.mark.parametrize(
    ("sources", "said"),
    [
        ({}, "Mixture: got {}; give Mixture({"),
        ([(SAMPLES, 1.0)], "Mixture: got [(TensorDataset, float)]; give Mixture({"),
        ({"a": SAMPLES}, "Mixture: 'a' is TensorDataset; give Mixture({"),
        ({"a": (SAMPLES, -1)}, "Mixture: 'a' has the weight -1; give a finite number, 0 or more"),
        ({"a": (SAMPLES, float("nan"))}, "Mixture: 'a' has the weight nan; give a finite number"),
        ({"a": (SAMPLES, "1")}, "Mixture: 'a' has the weight '1'; give a finite number"),
        ({"a": (SAMPLES, 0), "b": (SAMPLES, 0.0)}, "Mixture: all weights are 0; give at least one dataset a weight"),
        ({"a": (SAMPLES, 1), "b": ([], 1)}, "Mixture: 'b' has no samples; leave it out"),
        ({"a": (Tokens(SAMPLES, True), 1)}, "Mixture: 'a' is Tokens; give a dataset with __len__ and __getitem__"),
        ({"a": (Mixture({"b": (SAMPLES, 1)}), 1)}, "Mixture: 'a' is a Mixture itself; give its datasets to one"),
    ],
)
def test_bad_mixtures_are_refused(sources: Any, said: str) -> None:
    with pytest.raises(ConfigError) as error:
        Mixture(sources)
    assert said in str(error.value)
    assert "\n" not in str(error.value)


def test_a_bad_mixture_ends_the_command_with_exit_code_2(run: Run, tmp_path: Path) -> None:
    (tmp_path / "bad.py").write_text(
        "from distrib.data import Mixture\nfrom tasks import Masked\nclass Bad(Masked):\n"
        "    def train_dataset(self):\n        return Mixture({'a': (super().train_dataset(), -1)})\n"
    )
    (tmp_path / "bad.yaml").write_text("task: {target: 'bad:Bad'}\ntrain: {steps: 2}\n")
    assert "Mixture: 'a' has the weight -1; give a finite number" in refused(run("distrib", "train", "bad.yaml"))
    assert not (tmp_path / "runs").exists()


def fit(folder: Path, trained: Masked, **more: Any) -> Path:
    values: dict[str, Any] = {"data": {"global_batch_size": 10, "micro_batch_size": 5}, "train": {"steps": 6}}
    values["checkpoint"] = {"every_steps": 3}
    Trainer(trained, Config.from_dict({"name": "run", **values, **more}), folder).fit()
    return folder


def test_a_mixture_has_no_further_weights(tmp_path: Path) -> None:
    class Both(MixedTask):
        sample_weights = Weighted.sample_weights

    with pytest.raises(ConfigError, match=r"task.sample_weights: train_dataset\(\) is a Mixture, which has its own"):
        fit(tmp_path / "run", Both())


def test_every_step_has_its_proportion_and_other_weights_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = {"task": {"target": "data_tasks:Mixed"}}
    finished = fit(tmp_path / "run", MixedTask(), **config)
    monkeypatch.chdir(tmp_path)
    verify_run(finished)
    assert "6 of 6 steps, all in order, 60 samples where they belong" in capsys.readouterr().out
    folder = interrupted(finished, tmp_path / "killed", after=3)

    def other(self: Any) -> Any:
        first, rest = MixedTask.before(self).datasets  # type: ignore[attr-defined]
        return Mixture({"first": (first, 0.6), "rest": (rest, 0.4)})

    monkeypatch.setattr(MixedTask, "before", MixedTask.train_dataset, raising=False)
    monkeypatch.setattr(MixedTask, "train_dataset", other)
    for run in (finished, folder):
        with pytest.raises(RunDirError, match=r"task.train_dataset has other sources than at the run's start"):
            fit(run, MixedTask(), **config)
    assert len(lines(finished)) == 6
