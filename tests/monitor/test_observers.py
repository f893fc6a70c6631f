"""Observers get each line of the run folder, and can neither change the run nor stop it."""

import json
import random
import re
import signal
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from conftest import ROOT, Run, check, check_same, events, lines, refused, start, steps_done, until

from distrib import Config, Observer, Trainer
from distrib.data.seeding import random_state_kept
from distrib.errors import ConfigError

CONFIG: dict[str, Any] = {
    "task": {"target": "tasks:Slow", "dropout": 0.1},
    "data": {"global_batch_size": 16, "micro_batch_size": 4},
    "train": {"steps": 60},
    "eval": {"every_steps": 20},
    "checkpoint": {"every_steps": 20},
    "tracking": {"wandb": "off"},
}
# A file of the user's, in the working directory.
LOOKING_ON = '''
import json
import os
import random
import sys

import numpy as np
import torch

from distrib import Observer

METHODS = ("on_start", "on_step", "on_evaluation", "on_checkpoint", "on_event", "on_end")


class Recorder(Observer):
    """Writes down what it gets."""

    def __init__(self, file):
        self.file = file

    def record(self, method, line):
        with open(self.file, "a") as file:
            file.write(json.dumps([method, os.environ.get("RANK"), line]) + "\\n")


for name in METHODS:
    setattr(Recorder, name, lambda self, line, name=name: self.record(name, line))


class Meddler(Observer):
    """Changes what it gets, draws random numbers, and seeds the generators."""


def meddle(self, line):
    for key, value in list(line.items()):
        if isinstance(value, dict):
            value.clear()
        if isinstance(value, list):
            value.append("changed")
        line[key] = -1
    line["more"] = 1
    random.seed(1), np.random.seed(2), torch.manual_seed(3)
    random.random(), np.random.rand(4), torch.rand(5)


for name in METHODS:
    setattr(Meddler, name, meddle)


class Failing(Observer):
    """Fails in one method."""

    def __init__(self, method, how="divide"):
        setattr(type(self), "marked", True)
        self.method, self.how = method, how

    def act(self, method):
        if method == self.method:
            if self.how == "interrupt":
                raise KeyboardInterrupt
            if self.how == "exit":
                sys.exit(0)
            return 1 / 0


for name in METHODS:
    setattr(Failing, name, lambda self, line, name=name: self.act(name))


class NoObserver:
    pass
'''


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "looking_on.py").write_text(LOOKING_ON)
    return tmp_path


def write(folder: Path, *observers: dict[str, Any], **changes: Any) -> Path:
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump({**CONFIG, "observers": list(observers), **changes}))
    return path


def recorder(file: str = "recorded") -> dict[str, Any]:
    return {"target": "looking_on:Recorder", "file": file}


def failing(method: str, how: str = "divide") -> dict[str, Any]:
    return {"target": "looking_on:Failing", "method": method, "how": how}


def recorded(path: Path) -> list[tuple[str, dict[str, Any]]]:
    """Return method and line of each call; all were made on rank 0."""
    found = [json.loads(line) for line in path.read_text().splitlines()]
    assert {rank for _, rank, _ in found} <= {None, "0"}
    return [(method, line) for method, _, line in found]


def of(calls: list[tuple[str, dict[str, Any]]], *methods: str) -> list[dict[str, Any]]:
    return [line for method, line in calls if method in methods]


def check_order(calls: list[tuple[str, dict[str, Any]]]) -> None:
    """Check the calls of one start."""
    names = [method for method, _ in calls]
    assert (names[0], names[-1]) == ("on_start", "on_end")
    assert (names.count("on_start"), names.count("on_end")) == (1, 1)


def test_each_line_of_the_run_folder_through_a_stop_and_a_resume(mark: str, folder: Path) -> None:
    """Two processes. The second start has another observer, and is still the same run."""
    write(folder, recorder("first"))
    run = folder / "runs" / "run"
    command = ["launch", "--processes", 2, "run.yaml"]
    process = start(mark, folder, *command)
    until(lambda: steps_done(run) >= 25, "it does not begin")
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 75, said
    stopped = len(lines(run))
    write(folder, recorder("second"))
    process = start(mark, folder, *command)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 0, said

    first, second = recorded(folder / "first"), recorded(folder / "second")
    check_order(first)
    check_order(second)
    for calls, step in ((first, 0), (second, stopped)):
        begun = calls[0][1]
        assert (begun["event"], begun["step"], begun["num_steps"], begun["world_size"]) == ("started", step, 60, 2)
        assert (begun["name"], begun["global_batch_size"], begun["run_dir"]) == ("run", 16, str(run))
    assert of(first, "on_step") + of(second, "on_step") == lines(run)
    assert of(first, "on_evaluation") + of(second, "on_evaluation") == lines(run, "evals.jsonl")
    logged = lines(run, "events.jsonl")
    for kinds, method in ((["checkpoint"], "on_checkpoint"), (["resumed", "warning"], "on_event")):
        assert of(first, method) + of(second, method) == [event for event in logged if event["event"] in kinds]
    assert of(first, "on_end") == [{**next(e for e in logged if e["event"] == "preempted"), "summary": None}]
    summary = json.loads((run / "summary.json").read_text())
    assert of(second, "on_end") == [{**logged[-1], "summary": summary}]
    assert [event["step"] for event in of(second, "on_event") if event["event"] == "resumed"] == [stopped]


def test_a_run_that_fails_on_another_rank(run: Run, folder: Path) -> None:
    write(folder, recorder(), task={"target": "tasks:Misbehaving", "how": "raise"}, checkpoint={"every_steps": 0})
    check(run("distrib", "launch", "--processes", "2", "run.yaml"), code=1)
    calls = recorded(folder / "recorded")
    check_order(calls)
    (failed,) = [event for event in lines(folder / "runs/run", "events.jsonl") if event["event"] == "failed"]
    assert of(calls, "on_end") == [{**failed, "summary": None}]


def test_a_start_that_fails_before_its_first_step(run: Run, folder: Path) -> None:
    """The named checkpoint is damaged."""
    write(folder, train={"steps": 4})
    check(run("distrib", "train", "run.yaml"))
    checkpoint = folder / "runs/run/checkpoints/step-00000004"
    shard = checkpoint / "shard-00000.safetensors"
    shard.write_bytes(shard.read_bytes()[:-8] + b"damaged!")
    write(folder, recorder(), train={"steps": 4})
    check(run("distrib", "train", "run.yaml", "--resume", checkpoint), code=1)
    calls = recorded(folder / "recorded")
    check_order(calls)
    assert calls[0][1]["step"] is None
    assert calls[-1][1]["event"] == "failed"
    assert "shard-00000" in calls[-1][1]["error"]


@pytest.mark.parametrize("processes", [1, 2])
def test_an_observer_that_meddles_changes_nothing(run: Run, folder: Path, processes: int) -> None:
    """The bits are the same, and so are the lines for the next observer."""
    meddler = {"target": "looking_on:Meddler"}
    for name, observers in (("alone", []), ("meddled", [meddler, recorder("after")])):
        write(folder, *observers, train={"steps": 24}, eval={"every_steps": 8})
        check(run("distrib", "launch", "--processes", processes, "run.yaml", "--run-dir", name))
    check_same(folder / "meddled", folder / "alone")
    summaries = [json.loads((folder / name / "summary.json").read_text()) for name in ("meddled", "alone")]
    for key in ("metrics", "steps", "skipped", "world_size"):
        assert summaries[0][key] == summaries[1][key]
    assert events(folder / "meddled") == events(folder / "alone")
    assert of(recorded(folder / "after"), "on_step") == lines(folder / "meddled")
    assert of(recorded(folder / "after"), "on_evaluation") == lines(folder / "meddled", "evals.jsonl")
    assert of(recorded(folder / "after"), "on_end")[0]["summary"] == summaries[0]


def test_generators_are_put_back() -> None:
    random.seed(1), np.random.seed(2), torch.manual_seed(3)
    expected = random.random(), np.random.rand(), torch.rand(1).item()
    random.seed(1), np.random.seed(2), torch.manual_seed(3)
    with suppress(ZeroDivisionError), random_state_kept():
        random.seed(5), np.random.rand(4), torch.manual_seed(7)
        raise ZeroDivisionError
    assert (random.random(), np.random.rand(), torch.rand(1).item()) == expected


def test_each_failing_observer_is_a_warning(run: Run, folder: Path) -> None:
    """The warning names method and line; the other observers and the run go on."""
    methods = ("on_start", "on_step", "on_evaluation", "on_checkpoint", "on_event", "on_end")
    write(folder, *map(failing, methods), recorder(), train={"steps": 24}, eval={"every_steps": 8})
    too_long = "optim.warmup_steps=30"  # a warning
    result = run("distrib", "train", "run.yaml", "checkpoint.every_steps=8", too_long)
    check(result)
    found = lines(folder / "runs/run", "events.jsonl")
    line = LOOKING_ON[: LOOKING_ON.index("return 1 / 0")].count("\n") + 1
    place = f"{folder / 'looking_on.py'}:{line}"
    warnings = [event["reason"] for event in found if event["event"] == "warning" and "observer" in event["reason"]]
    assert sorted(warnings) == sorted(
        f"observer looking_on:Failing failed in {method} and is called no more: "
        f"ZeroDivisionError: division by zero at {place}"
        for method in methods
    )
    assert [event["event"] for event in found][-2:] == ["finished", "warning"]  # on_end comes after the end
    shown = result.stdout + result.stderr
    for warning in warnings:
        assert shown.count(f"warning: {warning}") == 1
    calls = recorded(folder / "recorded")
    check_order(calls)
    assert of(calls, "on_step") == lines(folder / "runs/run")
    passed_on = [event for event in found if event["event"] == "warning"][:-1]
    assert of(calls, "on_event") == passed_on
    check(run("distrib", "verify", "runs/run"))


def test_interrupts_and_exits_are_no_warnings(run: Run, folder: Path) -> None:
    write(folder, failing("on_step", "interrupt"), recorder())
    result = run("distrib", "train", "run.yaml", "--run-dir", "interrupted")
    assert (result.returncode, events(folder / "interrupted")) == (130, ["started", "failed"]), result.stderr
    assert of(recorded(folder / "recorded"), "on_end")[0]["error"].startswith("KeyboardInterrupt")

    write(folder, failing("on_step", "exit"))
    result = run("distrib", "train", "run.yaml", "--run-dir", "exited")
    check(result, code=1)
    assert "error: observer looking_on:Failing asked to exit in on_step: SystemExit: 0 at " in result.stderr
    assert events(folder / "exited") == ["started", "failed"]

    write(folder, failing("on_end", "exit"), train={"steps": 4})
    check(run("distrib", "train", "run.yaml", "--run-dir", "ended"))
    assert events(folder / "ended")[-2:] == ["finished", "warning"]


@pytest.mark.parametrize(
    ("observer", "what"),
    [
        ({"target": "nowhere:Notify"}, "observers.0.target: there is no module 'nowhere'"),
        ({"target": "looking_on:Recorded"}, "has no 'Recorded', did you mean looking_on:Recorder?"),
        ({"target": "looking_on:NoObserver"}, "looking_on:NoObserver is not an Observer but a class NoObserver"),
        ({"target": "looking_on:Recorder", "fil": 1}, "observers.0: Recorder does not take what is given"),
        ({"file": "x"}, "observers.0.target: missing"),
    ],
)
def test_what_is_no_usable_observer_is_refused(run: Run, folder: Path, observer: dict[str, Any], what: str) -> None:
    write(folder, observer)
    for command in (["train"], ["launch", "--processes", "2"], ["explain"]):
        assert what in refused(run("distrib", *command, "run.yaml")), command
    assert not (folder / "runs").exists()


def test_explain_makes_no_observer(run: Run, folder: Path) -> None:
    (folder / "loud.py").write_text(
        "from distrib import Observer\nclass Loud(Observer):\n    def __init__(self):\n        print('LOUD')\n"
    )
    write(folder, {"target": "loud:Loud"})
    assert "LOUD" not in check(run("distrib", "explain", "run.yaml"))


def test_observers_decide_nothing() -> None:
    first, second = (
        Config.from_dict({**CONFIG, "observers": observers}) for observers in ([], [{"target": "a:B", "c": [1, None]}])
    )
    assert first.identity() == second.identity()
    assert Config.from_dict(yaml.safe_load(second.dump())) == second


class Counting(Observer):
    def __init__(self) -> None:
        self.losses: list[float] = []

    def on_step(self, step: dict[str, Any]) -> None:
        self.losses.append(step["loss"])


def test_given_in_python(tmp_path: Path) -> None:
    from tasks import Masked

    config = Config.from_dict({**CONFIG, "task": None, "train": {"steps": 5}})
    counting = Counting()
    Trainer(Masked(), config, tmp_path / "run", observers=[counting], verbosity="quiet").fit()
    assert counting.losses == [line["loss"] for line in lines(tmp_path / "run")]
    with pytest.raises(ConfigError, match="is not an Observer"):
        Trainer(Masked(), config, tmp_path / "other", observers=[print])  # type: ignore[list-item]


def test_the_page_works_as_it_stands(run: Run, folder: Path) -> None:
    """The file and the config lines of docs/extending.md."""
    page = (ROOT / "docs" / "extending.md").read_text()
    section = re.search(r"^## An observer$(.*?)(?=^## |\Z)", page, re.MULTILINE | re.DOTALL)
    assert section is not None
    (program,) = re.findall(r"^```python title=notify.py\n(.*?)^```$", section[1], re.MULTILINE | re.DOTALL)
    (keys,) = re.findall(r"^```yaml\n(.*?)^```$", section[1], re.MULTILINE | re.DOTALL)
    (folder / "notify.py").write_text(program)
    path = write(folder, train={"steps": 24}, eval={"every_steps": 8})
    path.write_text(yaml.safe_dump({**yaml.safe_load(path.read_text()), **yaml.safe_load(keys)}))
    check(run("distrib", "train", "run.yaml"))
    written = (folder / "evaluations.txt").read_text().splitlines()
    losses = [line["metrics"]["eval/loss"] for line in lines(folder / "runs/run", "evals.jsonl")]
    assert written == [
        *(f"run: step {step}/24, eval/loss {loss:.4f}" for step, loss in zip((8, 16, 24), losses, strict=True)),
        "run: finished",
    ]
    assert "observer" not in (folder / "runs/run/events.jsonl").read_text()
