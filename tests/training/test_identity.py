"""The identity of a run besides its config: its data, and a task that a script constructs."""

import importlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import interrupted, lines
from tasks import Masked, Streamed
from torch import nn
from torch.utils.data import Subset

from distrib import Config, Trainer
from distrib.errors import ConfigError, RunDirError
from distrib.monitor.compare.comparison import diverge
from distrib.monitor.compare.runs import load_runs
from distrib.training import build
from distrib.training.commands import verify_run

VALUES: dict[str, Any] = {
    "data": {"global_batch_size": 8, "micro_batch_size": 4},
    "train": {"steps": 6},
    "checkpoint": {"every_steps": 3},
}


class Rows(Masked):
    """Returns some rows of data that are outside the config."""

    rows: "list[int] | range" = range(97)

    def train_dataset(self) -> Any:
        return Subset(super().train_dataset(), self.rows)  # type: ignore[arg-type]


class Wide(Masked):
    width = 16

    def model(self) -> nn.Module:
        return nn.Sequential(nn.Embedding(11, self.width), nn.Linear(self.width, 11))


class Narrow(Wide):
    pass


def fit(folder: Path, task: Any, **more: Any) -> Path:
    Trainer(task, Config.from_dict({"name": "run", **VALUES, **more}), folder).fit()
    return folder


@pytest.mark.parametrize("finished", [True, False])
@pytest.mark.parametrize(
    ("rows", "what"),
    [
        (range(90), "task.train_dataset has 90 samples, not 97 as at the run's start"),
        ([96, *range(96)], "task.train_dataset has another sample 0 than at the run's start"),
    ],
)
def test_other_data_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, finished: bool, rows: Any, what: str
) -> None:
    run = fit(tmp_path / "run", Rows())
    if not finished:
        run = interrupted(run, tmp_path / "interrupted", after=3)
    before = {path.name: path.read_bytes() for path in run.iterdir() if path.is_file()}
    monkeypatch.setattr(Rows, "rows", rows)
    with pytest.raises(RunDirError, match="holds a run of another data") as refusal:
        fit(run, Rows())
    assert what in str(refusal.value)
    assert "--fork" in str(refusal.value)
    assert {path.name: path.read_bytes() for path in run.iterdir() if path.is_file()} == before
    origin = str(run / "checkpoints/step-00000003")
    config = Config.from_dict({"name": "run", **VALUES})
    Trainer(Rows(), config, tmp_path / "fork", resume=origin, fork=True).fit()
    assert len(lines(tmp_path / "fork")) == 3


def test_other_task_arguments_are_refused(tmp_path: Path) -> None:
    run = fit(tmp_path / "run", Masked(dropout=0.1))
    fit(run, Masked(97, 0.1))  # the same arguments in another form, so the run has finished
    for task, what in (
        (Masked(dropout=0.3), "argument dropout was 0.1, is 0.3"),
        (Masked(dropout=0.1, samples=98), "argument samples was 97, is 98"),
        (Rows(dropout=0.1), "the task's class was tasks:Masked, is test_identity:Rows"),
    ):
        with pytest.raises(RunDirError, match="holds a run of another task") as refusal:
            fit(run, task)
        assert what in str(refusal.value)


def test_other_parameter_shapes_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = fit(tmp_path / "run", Wide())
    monkeypatch.setattr(Wide, "width", 8)
    with pytest.raises(RunDirError, match=r"the shape of parameter 0.weight was \[11, 16\], is \[11, 8\]"):
        fit(run, Wide())


def test_attributes_of_a_task_are_not_compared(tmp_path: Path) -> None:
    task = Masked()
    run = fit(tmp_path / "run", task)
    task.calls = 17  # type: ignore[attr-defined]
    fit(run, task)


def test_string_arguments_are_recorded_as_digests(tmp_path: Path) -> None:
    """A string may be a secret."""

    class Keyed(Masked):
        def __init__(self, key: str) -> None:
            super().__init__()

    run = fit(tmp_path / "run", Keyed("first-secret"))
    with pytest.raises(RunDirError, match="argument key is another") as refusal:
        fit(run, Keyed("second-secret"))
    assert "secret" not in str(refusal.value) + (run / "environment.json").read_text()


def older(environment: dict[str, Any]) -> dict[str, Any]:
    """Return an environment as older versions wrote it, without data and task."""
    return {key: value for key, value in environment.items() if key not in ("data", "task")}


def test_records_that_older_versions_lack_are_not_compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = interrupted(fit(tmp_path / "run", Rows()), tmp_path / "older", after=3)
    path = run / "environment.json"
    path.write_text(json.dumps(older(json.loads(path.read_text()))))
    monkeypatch.setattr(Rows, "rows", [96, *range(96)])
    fit(run, Rows())
    assert "warning" not in [event["event"] for event in lines(run, "events.jsonl")]
    assert json.loads(path.read_text())["data"]["train_dataset"]["length"] == 97, "from now on it is known"


@pytest.fixture
def in_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], Config]:
    """Write a task into a file of its own, and return a function that makes its config."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    (tmp_path / "of_ones_own.py").write_text("from tasks import Masked\n\n\nclass Own(Masked):\n    pass\n")
    importlib.invalidate_caches()
    return lambda: Config.from_dict({"name": "run", **VALUES, "task": {"target": "of_ones_own:Own"}})


def test_a_changed_file_is_a_warning(tmp_path: Path, in_file: Callable[[], Config]) -> None:
    config = in_file()
    Trainer(build.task(config), config, tmp_path / "run").fit()
    run = interrupted(tmp_path / "run", tmp_path / "interrupted", after=3)
    with (tmp_path / "of_ones_own.py").open("a") as file:
        file.write("# changed\n")
    Trainer(build.task(config), config, run).fit()
    (warning,) = [event for event in lines(run, "events.jsonl") if event["event"] == "warning"]
    assert f"{tmp_path / 'of_ones_own.py'}: has changed since the run's last start" in warning["reason"]
    del sys.modules["of_ones_own"]


class OnDisk(Masked):
    """Reads rows from a folder that the config names."""

    def __init__(self, folder: str) -> None:
        super().__init__()
        self.folder = Path(folder)

    def train_dataset(self) -> Any:
        return Subset(super().train_dataset(), json.loads((self.folder / "rows").read_text()))


@pytest.mark.parametrize("in_config", [True, False])
def test_moved_data(tmp_path: Path, in_config: bool) -> None:
    for name, rows in (("here", range(97)), ("there", range(97)), ("other", range(90))):
        (tmp_path / name).mkdir()
        (tmp_path / name / "rows").write_text(json.dumps(list(rows)))

    def train(run: Path, at: str, *moved: str) -> None:
        folder = str(tmp_path / at)
        task = {"task": {"target": "test_identity:OnDisk", "folder": folder}} if in_config else {}
        config = Config.from_dict({"name": "run", **VALUES, **task})
        Trainer(build.task(config) if in_config else OnDisk(folder), config, run, moved=moved).fit()

    train(tmp_path / "run", "here")
    run = interrupted(tmp_path / "run", tmp_path / "interrupted", after=3)
    with pytest.raises(RunDirError, match="folder"):
        train(run, "there")
    with pytest.raises(RunDirError, match=r"task\.train_dataset has 90 samples, not 97"):
        train(run, "other", "task.folder")
    with pytest.raises(ConfigError, match=r"--moved: train\.steps"):
        train(run, "there", "train.steps=6")
    train(run, "there", "task.folder")
    if in_config:
        killed = interrupted(run, tmp_path / "killed", after=3)  # before the next save
        verify_run(killed)
        train(killed, "here")  # moved back, and nothing is damaged
        assert not list(killed.glob("*.damaged-*"))
        (moved,) = [event["reason"] for event in lines(run, "events.jsonl") if event["event"] == "warning"]
        assert moved.startswith(f"the data moved: task.folder was '{tmp_path / 'here'}', is '{tmp_path / 'there'}'")
        assert Config.load(run / "config.yaml").task.folder == str(tmp_path / "there")  # type: ignore[union-attr]
        train(run, "there")  # finished before
        path = tmp_path / "run/environment.json"
        path.write_text(json.dumps(older(json.loads(path.read_text()))))
        with pytest.raises(RunDirError, match="no fingerprint was recorded to compare the data with"):
            train(tmp_path / "run", "there", "task.folder")


def test_a_stream_resumes_only_with_the_same_number_of_workers(tmp_path: Path) -> None:
    for workers, other in ((0, 1), (2, 1), (1, 0)):
        run = fit(tmp_path / f"run-{workers}", Streamed(), data={**VALUES["data"], "num_workers": workers})
        run = interrupted(run, tmp_path / f"on-{workers}", after=3)
        with pytest.raises(ConfigError, match=rf"data\.num_workers: {other}, .* was read by {workers} worker"):
            fit(run, Streamed(), data={**VALUES["data"], "num_workers": other})
        fit(run, Streamed(), data={**VALUES["data"], "num_workers": workers})
        assert len(lines(run)) == 6


def test_verify_and_compare_know_the_data(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    task = {"target": "test_identity:Rows"}
    config = Config.from_dict({"name": "run", **VALUES, "task": task})
    rows: Any = importlib.import_module("test_identity").Rows
    for name in ("first", "second"):
        Trainer(build.task(config), config, tmp_path / name).fit()
    verify_run(tmp_path / "first")
    assert "data as at the run's start" in capsys.readouterr().out
    monkeypatch.setattr(rows, "rows", [96, *range(96)])
    with pytest.raises(RunDirError, match=r"the data have changed: task\.train_dataset has another sample 0"):
        verify_run(tmp_path / "first")
    Trainer(build.task(config), config, tmp_path / "shuffled").fit()
    monkeypatch.setattr(rows, "rows", None)  # the data cannot be read
    verify_run(tmp_path / "first")
    assert "data not checked: TypeError" in capsys.readouterr().out

    first, second, shuffled = load_runs([tmp_path / name for name in ("first", "second", "shuffled")])
    assert (diverge(first, second).cause, diverge(first, shuffled).cause) == ("nothing", "data")
    path = tmp_path / "second/environment.json"
    path.write_text(json.dumps(older(json.loads(path.read_text()))))
    verify_run(tmp_path / "second")
    assert "data not checked: the run has no fingerprint of them" in capsys.readouterr().out


class OwnDraws(Masked):
    def train_dataset(self) -> Any:
        generator = torch.Generator().manual_seed(0)
        data = super().train_dataset()

        class Noisy(torch.utils.data.Dataset[Any]):
            def __len__(self) -> int:
                return len(data)

            def __getitem__(self, index: int) -> Any:
                tokens, targets = data[index]
                return tokens, targets, torch.rand(3, generator=generator)

        return Noisy()


def test_unseeded_samples_are_a_warning(tmp_path: Path) -> None:
    run = fit(tmp_path / "run", OwnDraws())
    (warning,) = [event for event in lines(run, "events.jsonl") if event["event"] == "warning"]
    assert "task.train_dataset: sample 0 differs each time it is read" in warning["reason"]
