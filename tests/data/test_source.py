"""Streams in one process; tests/distributed/test_resume.py tests them on two."""

from pathlib import Path
from typing import Any

import pytest
from conftest import check_same, interrupted, lines
from tasks import Masked, Streamed, Tokens
from torch.utils.data import IterableDataset

from distrib import Config, Trainer
from distrib.errors import CheckpointError, ConfigError


def fit(folder: Path, task: Masked, **train: Any) -> Path:
    values = {"data": {"global_batch_size": 16, "micro_batch_size": 4}, "train": {"steps": 12, **train}}
    Trainer(task, Config.from_dict({**values, "checkpoint": {"every_steps": 5}}), folder).fit()
    return folder


def test_a_stream_resumes_where_it_was(tmp_path: Path) -> None:
    """Also past the end of the stream: 12 steps of 16 samples, out of 97."""
    whole = fit(tmp_path / "whole", Streamed())
    assert {line["epoch"] for line in lines(whole)} == {0}
    check_same(fit(interrupted(whole, tmp_path / "run", after=5), Streamed()), whole)


def test_a_stream_needs_train_steps(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="the training set is a stream, which has no length; give train"):
        Trainer(Streamed(), Config.from_dict({"train": {"epochs": 2}}), tmp_path / "run")


class Nothing(IterableDataset[Any]):
    def __iter__(self) -> Any:
        return iter([])


class Secret(Tokens):
    def state_dict(self) -> Any:
        return {"place": {1, 2}}


@pytest.mark.parametrize(
    ("dataset", "error", "said"),
    [
        (lambda samples: Nothing(), ConfigError, "Nothing gives no micro-batch of 4 samples"),
        (lambda samples: Secret(samples, True), CheckpointError, r"state_dict\(\) of Secret cannot be saved as JSON"),
    ],
)
def test_unusable_streams_are_refused(tmp_path: Path, dataset: Any, error: Any, said: str) -> None:
    class Other(Masked):
        def train_dataset(self) -> Any:
            return dataset(super().train_dataset())

    with pytest.raises(error, match=said):
        fit(tmp_path / "run", Other())
