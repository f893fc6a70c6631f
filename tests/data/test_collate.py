"""Task.collate in one process: errors, workers, random numbers, devices. tests/distributed/test_data_runs.py trains."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import lines, losses
from data_tasks import Ragged
from tasks import Masked
from torch import Tensor
from torch.utils.data import IterableDataset, TensorDataset

from distrib import Config, Trainer
from distrib.data.fingerprint import fingerprint
from distrib.data.prints import UNKNOWN
from distrib.errors import ConfigError
from distrib.processes.world import World
from distrib.strategies import registry
from distrib.training.commands import evaluate_run
from distrib.training.engine import Engine

CONFIG: dict[str, Any] = {"data": {"global_batch_size": 8, "micro_batch_size": 4}, "train": {"steps": 4}}


def fit(folder: Path, task: Masked, num_workers: int = 0) -> Path:
    config = Config.from_dict({**CONFIG, "data": {**CONFIG["data"], "num_workers": num_workers}})
    Trainer(task, config, folder).fit()
    return folder


class Sample:
    """An object that torch cannot collate."""

    def __init__(self, tokens: Tensor, targets: Tensor) -> None:
        self.tokens, self.targets = tokens, targets


class Objects(Masked):
    """Samples are objects. Collate drops a token at random, as a data collator for masked language models does."""

    def train_dataset(self) -> Any:
        return [Sample(*row) for row in super().train_dataset()]

    def eval_dataset(self) -> Any:
        return [Sample(*row) for row in super().eval_dataset()]

    def collate(self, samples: list[Any]) -> Any:
        tokens = torch.stack([sample.tokens for sample in samples])
        kept = torch.rand(tokens.shape) > 0.2
        return tokens * kept, torch.stack([sample.targets for sample in samples])


def test_random_numbers_of_collate_do_not_depend_on_the_workers(tmp_path: Path) -> None:
    alone = fit(tmp_path / "alone", Objects())
    assert losses(fit(tmp_path / "workers", Objects(), num_workers=2)) == losses(alone)
    before = lines(alone, "evals.jsonl")[-1]["metrics"]
    fit(tmp_path / "ragged", Ragged(), num_workers=1)
    assert before["eval/loss"] == lines(tmp_path / "workers", "evals.jsonl")[-1]["metrics"]["eval/loss"]


def test_evaluate_collates_as_training_does(tmp_path: Path) -> None:
    config = Config.from_dict({"name": "run", **CONFIG, "task": {"target": "data_tasks:Ragged"}})
    Trainer(Ragged(), config, tmp_path / "run").fit()
    assert evaluate_run(tmp_path / "run") == lines(tmp_path / "run", "evals.jsonl")[-1]["metrics"]


def test_samples_that_only_the_tasks_collate_takes_have_prints() -> None:
    """The print of a sample does not depend on whether the task collates it."""
    ragged = Ragged().train_dataset()
    ragged[0]["note"] = None  # default_collate does not take it
    found = fingerprint(ragged, 0)
    assert found is not None
    assert UNKNOWN not in found["samples"].values()
    assert fingerprint(Objects().train_dataset(), 0)["samples"]["0"] == UNKNOWN  # type: ignore[index]


def failing(self: Any, samples: list[Any]) -> Any:
    return samples[0]["tokens"]


@pytest.mark.parametrize("num_workers", [0, 1])
@pytest.mark.parametrize(
    ("collate", "said"),
    [
        (lambda self, samples: None, "task.collate: returned None; return the batch that forward and loss take"),
        (failing, "task.collate failed on 4 samples, the first is (Tensor (6) int64, Tensor (6) int64)"),
        (lambda self, samples: samples, "the batch is [(Tensor (6) int64, Tensor (6) int64), (Tensor"),
    ],
)
def test_a_wrong_collate_is_refused(tmp_path: Path, collate: Callable[..., Any], said: str, num_workers: int) -> None:
    with pytest.raises(ConfigError) as error:
        fit(tmp_path / "run", type("Changed", (Masked,), {"collate": collate})(), num_workers)
    assert str(error.value).startswith("task.")
    assert said in str(error.value)
    if collate is failing:
        assert __file__ in str(error.value), "it shows the user's lines"
        assert "loader.py" not in str(error.value)
    else:
        assert len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize("num_workers", [0, 1])
def test_samples_of_different_shapes_name_collate(tmp_path: Path, num_workers: int) -> None:
    class Uncollated(Ragged):
        collate = Masked.collate

    with pytest.raises(ConfigError) as error:
        fit(tmp_path / "run", Uncollated(), num_workers)
    assert str(error.value).startswith("task: the samples of list cannot be collated into a batch: one is {'name'")
    assert str(error.value).endswith("(pad them), or define Task.collate(samples)")


def test_a_stream_is_collated_too(tmp_path: Path) -> None:
    class Endless(IterableDataset[Any]):
        def __iter__(self) -> Any:
            return iter(Ragged().train_dataset())

    class Streamed(Ragged):
        def train_dataset(self) -> Any:
            return Endless()

    assert len(lines(fit(tmp_path / "run", Streamed()))) == 4


def test_a_nested_batch_moves_to_the_device() -> None:
    task = Masked()
    strategy = registry.resolve(Config.from_dict({"train": {"steps": 1}, "strategy": {"name": "single"}}), World())
    strategy.wrap(task.model(), [], None)
    engine = Engine(strategy)
    engine.device = torch.device("meta")
    batch = {"names": ["a", "b"], "rest": (torch.ones(2), [{"of": torch.ones(1), "text": "c", "none": None}, 3])}
    moved = engine.to_device(batch)
    assert moved["names"] == ["a", "b"]
    tensor, (inner, number) = moved["rest"]
    assert {tensor.device.type, inner["of"].device.type} == {"meta"}
    assert (inner["text"], inner["none"], number) == ("c", None, 3)


def test_tensors_are_still_indexed_directly_without_a_collate_of_ones_own() -> None:
    from distrib.data.loader import SampleReader

    data = TensorDataset(torch.arange(4))
    assert SampleReader(data, 0).tensors is not None
    assert SampleReader(data, 0, list).tensors is None
