"""Buffers that a training forward changes, and those that are refused, in one process."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import lines, tensors
from hypothesis import given, settings
from hypothesis import strategies as st
from tasks import Masked
from torch import Tensor, nn

from distrib import Config, Trainer, World
from distrib.errors import TrainingError
from distrib.training.running_statistics import RunningStatistics

CHANNELS = 3
NORMS = {
    "momentum": lambda: nn.BatchNorm1d(CHANNELS, momentum=0.3),
    "cumulative": lambda: nn.BatchNorm1d(CHANNELS, momentum=None),
    "instance": lambda: nn.InstanceNorm1d(CHANNELS, momentum=0.2, track_running_stats=True),
    "last": lambda: nn.BatchNorm1d(CHANNELS, momentum=1.0),
}


class Uncounted(nn.BatchNorm1d):
    """Updates its statistics without counting the forward."""

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.batch_norm(x, self.running_mean, self.running_var, training=True, momentum=0.1)


NORMS["uncounted"] = lambda: Uncounted(CHANNELS)


@settings(max_examples=15)
@given(
    kinds=st.lists(st.sampled_from(sorted(NORMS)), min_size=1, max_size=3),
    steps=st.lists(st.lists(st.lists(st.integers(0, 5), max_size=3), min_size=1, max_size=5), min_size=1, max_size=3),
    seed=st.integers(0, 99),
)
def test_statistics_are_as_if_all_micro_batches_ran_in_order(
    kinds: list[str], steps: list[list[list[int]]], seed: int
) -> None:
    """Whichever normalisation layers a micro-batch uses, and however often."""
    expected, merged = ([NORMS[kind]() for kind in kinds] for _ in range(2))
    statistics = RunningStatistics(World(), merged)
    generator = torch.Generator().manual_seed(seed)
    for step in steps:
        starts = [{key: value.clone() for key, value in norm.state_dict().items()} for norm in merged]
        statistics.begin()
        for micro_batch in step:
            for norm, start in zip(merged, starts, strict=True):
                norm.load_state_dict(start)
            # A class that does not count is assumed to run once per micro-batch.
            uses = [number % len(kinds) for number in micro_batch]
            once = {number for number in uses if kinds[number] == "uncounted"}
            for number in [*once, *(number for number in uses if number not in once)]:
                x = torch.randn(4, CHANNELS, 5, generator=generator) * 3 + 1
                expected[number](x)
                merged[number](x)
            statistics.add()
        for norm, start in zip(merged, starts, strict=True):
            norm.load_state_dict(start)
        statistics.send()
        statistics.write_merged(applied=True)
    for one, other in zip(expected, merged, strict=True):
        for key, value in one.state_dict().items():
            if key != "num_batches_tracked" or not isinstance(one, Uncounted):
                # torch rounds to float32 once per forward, distrib once per step: some 15 roundings of 6e-8.
                torch.testing.assert_close(other.state_dict()[key], value, rtol=1e-5, atol=1e-6)


class Buffer(nn.Module):
    """Changes its buffer `b` in the given way, and returns its input unchanged."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        if how != "new":
            none = how in ("none", "cache")
            self.register_buffer("b", None if none else torch.zeros(2), persistent=how not in ("unsaved", "cache"))

    def forward(self, x: Tensor) -> Tensor:
        if self.how in ("new", "none", "cache"):
            self.register_buffer("b", torch.ones(2), persistent=self.how != "cache")
        elif self.how == "shape":
            self.b = torch.ones(len(x))
        elif self.how == "always":
            self.b += 1
        elif self.training:
            self.b += 1
            if self.how == "read":
                return x * self.b[0]
        return x


class With(Masked):
    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how

    def model(self) -> nn.Module:
        model = super().model()
        model.insert(1, nn.Sequential(Buffer(self.how), nn.Linear(16, 16)))  # type: ignore[operator]
        return model


def fit(folder: Path, how: str, micro_batch_size: int = 4, **strategy: Any) -> Path:
    values = {
        "data": {"global_batch_size": 8, "micro_batch_size": micro_batch_size},
        "train": {"steps": 6},
        "eval": {"every_steps": 2},
        "strategy": strategy,
    }
    Trainer(With(how), Config.from_dict(values), folder).fit()
    return folder


def warnings(run: Path) -> list[str]:
    return [event["reason"] for event in lines(run, "events.jsonl") if event["event"] == "warning"]


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("new", r"forward made the buffer 1\.0\.b, which a new model does not have"),
        ("none", r"forward made the buffer 1\.0\.b, which a new model does not have"),
        ("shape", r"forward made the buffer 1\.0\.b a tensor of shape \[4\], but a new model has shape \[2\]"),
    ],
)
def test_a_buffer_that_a_checkpoint_could_not_load_is_refused(tmp_path: Path, how: str, said: str) -> None:
    with pytest.raises(TrainingError, match=said):
        fit(tmp_path / "run", how)


def test_a_buffer_that_forward_reads_and_writes_is_refused_with_activation_checkpointing(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match=r"1\.0\.b was changed in a backward, where activation checkpointing runs"):
        fit(tmp_path / "run", "read", activation_checkpointing=True)


def test_with_one_micro_batch_buffers_are_those_of_torch(tmp_path: Path) -> None:
    run = fit(tmp_path / "run", "read", micro_batch_size=8)
    np.testing.assert_array_equal(tensors(run)["model.1.0.b"], [6, 6])
    assert warnings(run) == []


def test_an_evaluation_does_not_change_buffers(tmp_path: Path) -> None:
    """Otherwise a run would depend on how often and by how many processes it is evaluated."""
    run = fit(tmp_path / "run", "always")
    np.testing.assert_array_equal(tensors(run)["model.1.0.b"], [6, 6])  # 6 steps, 3 evaluations of 25 batches
    assert len(warnings(run)) == 1


@pytest.mark.parametrize(("how", "expected"), [("unsaved", 1), ("cache", 0)])
def test_only_non_persistent_buffers_that_always_change_are_warned_of(tmp_path: Path, how: str, expected: int) -> None:
    found = warnings(fit(tmp_path / "run", how))
    assert len(found) == expected
    assert all(
        "forward changes the buffer 1.0.b in every step, but it is not persistent: it is not saved" in one
        for one in found
    )
