"""Early stopping, the best checkpoint, and several evaluation sets. In one process; tests/distributed uses several."""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import check_same, interrupted, lines, losses
from tasks import Masked
from torch.utils.data import Dataset, Subset

from distrib import Config, Trainer
from distrib.errors import ConfigError
from distrib.run_folder.verify import verify_run

STOP = {"patience": 2, "min_delta": 0.001}
BEST = {"metric": "eval/right", "mode": "max"}


class Several(Masked):
    """Has three evaluation sets, and a metric that depends on the set's name."""

    def eval_datasets(self) -> dict[str, Dataset[Any]]:
        whole = self._data(2)
        return {"first": Subset(whole, range(10)), "rest": Subset(whole, range(10, 97)), "all": whole}

    def metrics(self, rows: dict[str, torch.Tensor], name: str) -> dict[str, float]:  # type: ignore[override]
        return {"right": rows["right"].double().sum().item(), "length": float(len(name))}


def config(**more: Any) -> Config:
    values: dict[str, Any] = {
        "seed": 3,
        "data": {"global_batch_size": 16, "micro_batch_size": 8},
        "optim": {"lr": 0.03},
        "train": {"steps": 200, "stop": STOP},
        "eval": {"every_steps": 5},
        "checkpoint": {"every_steps": 7, "keep": 1, "best": BEST},
        "tracking": {"wandb": "off"},
    }
    return Config.from_dict({**values, **more})


def fit(folder: Path, task: Masked | None = None, **more: Any) -> dict[str, Any]:
    return Trainer(task or Masked(dropout=0.2), config(**more), folder).fit()


def checkpoints(run: Path) -> list[int]:
    return sorted(int(path.name.removeprefix("step-")) for path in (run / "checkpoints").glob("step-*"))


def evaluated(run: Path, metric: str) -> dict[int, float]:
    found = lines(run, "evals.jsonl")
    return {line["step"]: line["metrics"][metric] for line in found if metric in line["metrics"]}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("early") / "run"
    fit(run, checkpoint={"every_steps": 7, "keep": 99, "best": BEST})
    return run


def test_a_run_stops_and_keeps_its_best_checkpoint(tmp_path: Path) -> None:
    summary = fit(tmp_path / "run")
    run = tmp_path / "run"
    found, right = evaluated(run, "eval/loss"), evaluated(run, "eval/right")
    last = summary["steps"]
    assert 5 < last < 200
    assert last == max(found) == len(lines(run))
    best = max(right, key=lambda step: (right[step], -step))
    assert summary["best"] == {"metric": "eval/right", "mode": "max", "value": right[best], "step": best}
    assert checkpoints(run) == sorted({best, last})
    assert summary["stopped"].startswith("eval/loss has not improved in 2 evaluation(s); the best was ")
    (stopped,) = [event for event in lines(run, "events.jsonl") if event["event"] == "stopped"]
    assert stopped["step"] == last
    assert stopped["best_value"] == found[stopped["best_step"]]
    assert json.loads((run / "summary.json").read_text())["stopped"] == summary["stopped"]
    assert verify_run(run).of_steps == last
    assert fit(run)["steps"] == last  # started again, it is finished


def test_resumed_from_every_checkpoint_it_ends_alike(whole: Path, tmp_path: Path) -> None:
    """As after a kill between the checkpoint and what follows. The last is that of the step after which it stops."""
    for step in checkpoints(whole):
        run = interrupted(whole, tmp_path / f"after-{step}", after=step)
        fit(run)
        check_same(run, whole)
        summaries = [json.loads((folder / "summary.json").read_text()) for folder in (run, whole)]
        for key in ("best", "stopped", "steps", "metrics"):
            assert summaries[0][key] == summaries[1][key]


def test_an_evaluation_that_was_lost_is_made_again(whole: Path, tmp_path: Path) -> None:
    """A kill after the save and before the evaluation, which decides that the run stops."""
    last = checkpoints(whole)[-1]
    run = interrupted(whole, tmp_path / "run", after=last)
    evals = run / "evals.jsonl"
    evals.write_bytes(b"".join(evals.read_bytes().splitlines(keepends=True)[:-1]))
    fit(run)
    check_same(run, whole)


def test_a_run_with_another_rule_is_another_run(whole: Path, tmp_path: Path) -> None:
    run = interrupted(whole, tmp_path / "run", after=7)
    for change in ({"train": {"steps": 200, "stop": {"patience": 3}}}, {"eval": {"every_steps": 4}}):
        with pytest.raises(ConfigError.__mro__[1], match="holds a run of another config"):
            fit(run, **change)


def test_it_does_not_stop_before_min_steps(tmp_path: Path) -> None:
    summary = fit(tmp_path / "run", train={"steps": 90, "stop": {**STOP, "min_steps": 80}})
    assert summary["steps"] in (80, 85, 90)


def test_several_of_the_best_are_kept(tmp_path: Path) -> None:
    options: dict[str, Any] = {"checkpoint": {"every_steps": 0, "keep": 1, "best": {"keep": 2}}}
    summary = fit(tmp_path / "run", eval={"every_steps": 1}, optim={"lr": 0.01}, **options)
    found = evaluated(tmp_path / "run", "eval/loss")
    steps = sorted(found)
    records = [step for place, step in enumerate(steps) if all(found[step] < found[one] for one in steps[:place])]
    assert len(records) > 2
    assert checkpoints(tmp_path / "run") == sorted({*records[-2:], summary["steps"]})


def test_at_start(tmp_path: Path) -> None:
    """The untrained model is evaluated, saved as the best so far, and resumed from."""
    plain, run = tmp_path / "plain", tmp_path / "run"
    options: dict[str, Any] = {"train": {"steps": 6}, "checkpoint": {"every_steps": 4, "best": {}}}
    fit(plain, **options)
    fit(run, eval={"every_steps": 5, "at_start": True}, **options)
    steps = [line["step"] for line in lines(run, "evals.jsonl")]
    assert steps == [0, *(line["step"] for line in lines(plain, "evals.jsonl"))]
    assert 0 in [event["step"] for event in lines(run, "events.jsonl") if event["event"] == "checkpoint"]
    assert losses(run) == losses(plain)
    again = tmp_path / "again"
    shutil.copytree(run, again)
    (again / "summary.json").unlink()
    for path in (again / "checkpoints").iterdir():
        if path.name != "step-00000000":
            shutil.rmtree(path)
    fit(again, eval={"every_steps": 5, "at_start": True}, **options)
    check_same(again, run)


def test_the_rate_falls_on_a_plateau(tmp_path: Path) -> None:
    """The rate of each step follows from the evaluations before it, and a resumed run has the same."""
    run, options = tmp_path / "run", {"plateau": {"factor": 0.5, "patience": 1, "metric": "eval/loss"}}
    more: dict[str, Any] = {
        "train": {"steps": 60},
        "checkpoint": {"every_steps": 7, "keep": 99},
        "optim": {"lr": 0.03, "schedule": "cosine", **options},
    }
    fit(run, **more)
    found = evaluated(run, "eval/loss")
    best, waited, factor, factors = float("inf"), 0, 1.0, dict[int, float]()
    for step in range(60):
        if step in found:
            best, waited = (found[step], 0) if found[step] < best else (best, waited + 1)
            if waited > 1:
                factor, waited = factor / 2, 0
        factors[step] = factor
    assert len(set(factors.values())) > 2
    for line in lines(run):
        cosine = 0.5 * (1 + math.cos(math.pi * line["step"] / 60))
        assert line["lr"] == pytest.approx(0.03 * cosine * factors[line["step"]], rel=1e-12)
    for step in (7, 21, 35):
        again = interrupted(run, tmp_path / f"after-{step}", after=step)
        fit(again, **more)
        check_same(again, run)


def test_several_evaluation_sets(tmp_path: Path) -> None:
    run = tmp_path / "run"
    options: dict[str, Any] = {
        "eval": {"every_steps": 5, "sets": {"all": {"every_steps": 10}, "rest": {"every_steps": 0}}},
        "train": {"steps": 200, "stop": {**STOP, "metric": "eval/all/loss"}},
        "checkpoint": {"every_steps": 0},
    }
    summary = fit(run, Several(dropout=0.2), **options)
    last = summary["steps"]
    assert last < 200
    assert last % 10 == 0
    assert sorted(evaluated(run, "eval/first/loss")) == list(range(5, last + 1, 5))
    assert sorted(evaluated(run, "eval/all/loss")) == list(range(10, last + 1, 10))
    assert sorted(evaluated(run, "eval/rest/loss")) == [last]  # also in a run that stops early
    parts = [evaluated(run, f"eval/{name}/right")[last] for name in ("first", "rest", "all")]
    assert parts[0] + parts[1] == parts[2]
    assert evaluated(run, "eval/first/length")[last] == 5.0
    (end,) = [
        line for line in lines(run, "evals.jsonl") if line["step"] == last and "eval/rest/loss" in line["metrics"]
    ]
    assert end["count"] == 87
    again = interrupted(run, tmp_path / "again", after=last)  # as if killed before the last evaluations
    evals = again / "evals.jsonl"
    for left in (2, 1):
        kept = evals.read_bytes().splitlines(keepends=True)[:-left]
        evals.write_bytes(b"".join(kept))
        (again / "summary.json").unlink(missing_ok=True)
        fit(again, Several(dropout=0.2), **options)
        check_same(again, run)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"train": {"steps": 9, "stop": {"metric": "eval/los"}}},
            "train.stop.metric: eval/los is not among .* eval/loss",
        ),
        ({"checkpoint": {"best": {"metric": "right"}}}, r"checkpoint.best.metric: right is not among the metrics"),
        ({"optim": {"plateau": {"metric": "eval/x"}}}, "optim.plateau.metric: eval/x is not among the metrics"),
        (
            {"eval": {}, "train": {"steps": 9}, "optim": {"plateau": {}}},
            "optim.plateau: the run is evaluated at its end",
        ),
        ({"eval": {}}, "train.stop: the run is evaluated at its end only, where it"),
        (
            {"eval": {"every_steps": 5, "sets": {"x": {"every_steps": 1}}}},
            "eval.sets.x: there is no such set",
        ),
    ],
)
def test_what_cannot_be_decided_is_refused_before_training(tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        fit(tmp_path / "run", **changes)
    assert not (tmp_path / "run" / "steps.jsonl").exists() or not lines(tmp_path / "run")


@pytest.mark.parametrize("key", ["train", "checkpoint", "eval"])
def test_decisions_need_an_evaluation_set(tmp_path: Path, key: str) -> None:
    class Unevaluated(Masked):
        def eval_dataset(self) -> Any:
            return None

    needs: dict[str, Any] = {"train": {"steps": 9}, "eval": {}, "checkpoint": {}}
    needs[key] = {"train": {"steps": 9, "stop": {}}, "checkpoint": {"best": {}}, "eval": {"at_start": True}}[key]
    with pytest.raises(ConfigError, match="has no evaluation set"):
        fit(tmp_path / "run", Unevaluated(), **needs)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("names", [["a/b"], [1], "ab"])
def test_names_of_sets_are_checked(tmp_path: Path, names: Any) -> None:
    class Wrong(Masked):
        def eval_datasets(self) -> Any:
            return names if isinstance(names, str) else {name: self._data(1) for name in names}

    with pytest.raises(ConfigError, match=r"task.eval_datasets: "):
        fit(tmp_path / "run", Wrong())
