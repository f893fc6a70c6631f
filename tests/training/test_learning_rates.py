"""The learning rate in the ledger: the config's schedule or the task's own, and its curve in `distrib explain`."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from conftest import Run, check, check_same, events, interrupted, lines, refused
from tasks import Groups, Halving, Masked

from distrib import Config, Task, Trainer
from distrib.errors import ConfigError
from distrib.monitor.rate_plot import plot
from distrib.training.commands import explain_run

CONFIG: dict[str, Any] = {"data": {"global_batch_size": 8, "micro_batch_size": 4}, "train": {"steps": 6}}
WSD = {"name": "wsd", "decay_steps": 3}


class HalvingGroups(Groups):
    def learning_rate(self, update: int, num_updates: int) -> float:
        return 0.5 ** (update + 1)


@dataclass
class Field(Masked):
    """Has a field of that name."""

    samples: int = 97
    dropout: float = 0.0
    learning_rate: float = 0.1  # type: ignore[assignment]


class Wrong(Masked):
    """Returns what `how` makes of its calls."""

    def __init__(self, how: Callable[[int, int], Any]) -> None:
        super().__init__()
        self.how, self.calls = how, 0

    def learning_rate(self, update: int, num_updates: int) -> float:
        self.calls += 1
        return self.how(update, self.calls)  # type: ignore[no-any-return]


def rates(folder: Path, task: Task, **config: Any) -> list[float]:
    Trainer(task, Config.from_dict({**CONFIG, **config}), folder).fit()
    return [line["lr"] for line in lines(folder)]


def test_the_ledger_has_the_schedules_rate(tmp_path: Path) -> None:
    found = rates(tmp_path / "wsd", Masked(), optim={"lr": 0.1, "warmup_steps": 1, "schedule": WSD})
    assert found == pytest.approx([0.05, 0.1, 0.1, 0.1, 0.2 / 3, 0.1 / 3])
    pieces = [{"name": "warmup", "steps": 1}, {"name": "constant", "steps": 2}, {"name": "linear", "max_lr_ratio": 0.5}]
    found = rates(tmp_path / "pieces", Masked(), optim={"lr": 0.1, "schedule": pieces})
    assert found == pytest.approx([0.05, 0.1, 0.1, 0.05, 0.1 / 3, 0.05 / 3])


def test_a_tasks_own_rate(tmp_path: Path) -> None:
    assert rates(tmp_path / "one", Halving()) == [0.5**n for n in range(1, 7)]
    task = HalvingGroups()
    assert rates(tmp_path / "groups", task) == [0.5**n for n in range(1, 7)]
    assert [group["lr"] for group in task.made[-1].param_groups] == pytest.approx([0.5**6, 0.5**6 * 0.2])
    assert rates(tmp_path / "field", Field(), optim={"lr": 0.2}) == [0.2] * 6


def test_a_skipped_step_does_not_advance_it(tmp_path: Path) -> None:
    """Each step is assumed applied until its result is read, one step later."""

    class Skips(Halving):
        seen = 0

        def forward(self, model: Any, batch: Any) -> Any:
            self.seen += model.training
            return super().forward(model, batch) * (float("nan") if self.seen in (5, 6) else 1)

    assert rates(tmp_path / "run", Skips()) == [0.5**n for n in (1, 2, 3, 4, 4, 5)]


def test_a_tasks_own_rate_resumes(run: Run, tmp_path: Path) -> None:
    """The config that the run folder holds has every key, and yet sets none."""
    config = {**CONFIG, "task": {"target": "tasks:Halving"}, "checkpoint": {"every_steps": 2}}
    (tmp_path / "own.yaml").write_text(json.dumps(config))
    check(run("distrib", "train", "own.yaml"))
    whole, again = tmp_path / "runs" / "own", tmp_path / "again"
    interrupted(whole, again, after=2)
    check(run("distrib", "train", again / "config.yaml", "--run-dir", again))
    check_same(again, whole)
    assert "resumed" in events(again)


@pytest.mark.parametrize(
    ("optim", "said"),
    [
        ({"schedule": "cosine"}, "optim.schedule: cosine, and Halving.learning_rate returns the rate of each update"),
        ({"schedule": WSD}, "optim.schedule: given, and Halving.learning_rate returns the rate of each update; leave"),
        ({"warmup_steps": 2}, "optim.warmup_steps: 2, and Halving.learning_rate returns the rate"),
        ({"lr": 0.1}, "optim.lr: 0.1, and Halving.learning_rate returns the rate of each update; leave out one of the"),
    ],
)
def test_a_rate_that_config_and_task_both_set_is_refused(tmp_path: Path, optim: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError) as error:
        Trainer(Halving(), Config.from_dict({**CONFIG, "optim": optim}), tmp_path / "run")
    assert said in str(error.value)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("how", "said"),
    [
        (lambda update, calls: None, "task.learning_rate: returned None for update 0; return the learning rate, a fin"),
        (lambda update, calls: "0.1", "task.learning_rate: returned '0.1' for update 0"),
        (lambda update, calls: 0.1 - 0.03 * update, "for update 4; return the learning rate, a finite number that is"),
        (lambda update, calls: float("inf"), "task.learning_rate: returned inf for update 0"),
        (lambda update, calls: 1 / calls, "task.learning_rate: returned 1 for update 0, and then 0.5; return a func"),
        (lambda update, calls: 1 / (3 - update), "task.learning_rate failed for update 3\nTraceback"),
    ],
)
def test_a_wrong_rate_is_refused_before_the_run(tmp_path: Path, how: Any, said: str) -> None:
    with pytest.raises(ConfigError) as error:
        Trainer(Wrong(how), Config.from_dict(CONFIG), tmp_path / "run")
    assert said in str(error.value)
    assert not (tmp_path / "run").exists()


def test_an_option_that_does_not_fit_is_refused_before_the_run(run: Run, tmp_path: Path) -> None:
    """Also if the data decide the length of the run: 97 samples, 8 a step."""
    config = {**CONFIG, "task": {"target": "tasks:Masked"}, "train": {"epochs": 1}}
    (tmp_path / "run.yaml").write_text(json.dumps(config))
    wsd = ("optim.schedule=wsd", "optim.schedule.decay_steps=14")
    for command in ("train", "explain"):
        line = refused(run("distrib", command, "run.yaml", *wsd))
        assert line == "error: optim.schedule.decay_steps: 14, but there are 13 updates; give fewer"
    assert not (tmp_path / "runs").exists()


def explained(capsys: pytest.CaptureFixture[str], **config: Any) -> str:
    explain_run(Config.from_dict({**CONFIG, "task": {"target": "tasks:Masked"}, **config}), 1)
    return capsys.readouterr().out


def test_explain_draws_the_rate(capsys: pytest.CaptureFixture[str]) -> None:
    optim = {"lr": 0.1, "warmup_steps": 10, "schedule": {"name": "wsd", "decay_steps": 40, "min_lr_ratio": 0.1}}
    output = explained(capsys, optim=optim, train={"steps": 100})
    assert "step 0: 0.00909  step 10: 0.1" in output
    assert "first 0.00909, peak 0.1, last 0.0123" in output
    drawn = [line.split("over the run")[-1].strip() for line in output.splitlines() if "█" in line]
    assert len(drawn) == 3
    assert [line.count("█") for line in drawn] == sorted(line.count("█") for line in drawn)
    config = {"task": {"target": "tasks:Halving"}}
    assert "first 0.5, peak 0.5, last 0.0156" in explained(capsys, **config)


def test_a_plot() -> None:
    lines = plot(lambda update: update / 100, 48).splitlines()
    assert lines == [
        " " * 33 + "▁▁▂▂▃▃▄▄▅▅▆▆▇▇█",
        " " * 17 + "▁▁▂▂▃▃▄▄▅▅▆▆▇▇" + "█" * 17,
        " ▁▁▂▂▃▃▄▄▅▅▆▆▇▇" + "█" * 33,
        "first 0, peak 0.47, last 0.47",
    ]
    assert plot(lambda update: 0.0, 3).splitlines() == ["", "", "", "first 0, peak 0, last 0"]
    assert plot(lambda update: 1.0, 1).splitlines() == [*["█" * 48] * 3, "first 1, peak 1, last 1"]
    many = plot(lambda update: 2.0 if update == 123_456_789 else 1.0, 10**12, [123_456_789])
    assert many.splitlines()[-1] == "first 1, peak 2, last 1"
