"""An interrupted run has the same result as an uninterrupted one. In one process; tests/distributed uses several."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import check_same, interrupted, lines, losses, tensors
from tasks import Masked, WithLars

from distrib import Config, Trainer
from distrib.errors import CheckpointError, ConfigError, RunDirError
from distrib.run_folder import earlier_starts
from distrib.run_folder.folder import RunDir
from distrib.run_folder.verify import verify_run

STEPS, EVERY = 12, 5


def fit(folder: Path, task: Masked | None = None, resume: str = "auto", fork: bool = False, **config: Any) -> Path:
    values = {
        "seed": 2,
        "data": {"global_batch_size": 8, "micro_batch_size": 4},
        "train": {"steps": STEPS, "max_grad_norm": 1.0},
        "eval": {"every_steps": 4},
        "checkpoint": {"every_steps": EVERY, "keep": 9},
        **config,
    }
    Trainer(task or Masked(dropout=0.2), Config.from_dict(values), folder, resume=resume, fork=fork).fit()
    return folder


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fit(tmp_path_factory.mktemp("whole") / "run")


def test_an_interrupted_run_resumes_to_the_same_bits(whole: Path, tmp_path: Path) -> None:
    run = interrupted(whole, tmp_path / "run", after=EVERY)
    with (run / "steps.jsonl").open("a") as file:
        file.write('{"step":12,"lo')  # an incomplete line
    with (run / "evals.jsonl").open("a") as file:
        file.write('{"st')
    fit(run)
    check_same(run, whole)
    (resumed,) = [event for event in lines(run, "events.jsonl") if event["event"] == "resumed"]
    assert (resumed["step"], resumed["passed_over"]) == (EVERY, [])
    summary = json.loads((run / "summary.json").read_text())
    assert summary["restarts"] == 1
    assert summary["metrics"] == json.loads((whole / "summary.json").read_text())["metrics"]


def test_changed_keys_of_a_finished_run_are_named(whole: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = (whole / "summary.json").read_bytes()
    fit(whole, eval={"every_steps": 6})
    said = capsys.readouterr().out
    assert "had finished before; what has changed in the config had no effect (eval.every_steps was 4, is 6)" in said
    assert (whole / "summary.json").read_bytes() == before
    fit(whole)
    assert "had no effect" not in capsys.readouterr().out


def test_total_seconds_of_all_starts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = RunDir(tmp_path)
    times = [("started", 0), ("preempted", 20), ("started", 50), ("warning", 51)]
    facts = {"world_size": 1, "strategy": "single", "launcher": "plain", "step": 5, "requeue": False, "reason": "x"}
    events = [{"event": name, "time": f"2026-01-01T00:{minute:02}:00.000+00:00", **facts} for name, minute in times]
    run.events.write_text("".join(f"{json.dumps(event)}\n" for event in events))
    with run.events.open("a") as file:
        file.write('damaged\n{"event": "warning"}\n[]\n')
    monkeypatch.setattr(earlier_starts, "now", lambda: "2026-01-01T00:55:00.000+00:00")
    assert earlier_starts.total_seconds(run) == 60 * (
        20 + 5
    )  # the first start counts to its last event, the second until now


def test_a_run_without_its_summary_is_completed(whole: Path, tmp_path: Path) -> None:
    run = interrupted(whole, tmp_path / "run", after=STEPS)
    fit(run)
    check_same(run, whole)
    metrics = [json.loads((folder / "summary.json").read_text())["metrics"] for folder in (run, whole)]
    assert metrics[0] == metrics[1]


def test_a_run_without_a_checkpoint_starts_again(whole: Path, tmp_path: Path) -> None:
    run = interrupted(whole, tmp_path / "run", after=0)
    fit(run)
    check_same(run, whole)


def test_a_damaged_checkpoint_is_named_and_passed_over(whole: Path, tmp_path: Path) -> None:
    run = interrupted(whole, tmp_path / "run", after=10)
    damaged = run / "checkpoints" / "step-00000010" / "shard-00000.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-1])
    fit(run)
    check_same(run, whole)
    (resumed,) = [event for event in lines(run, "events.jsonl") if event["event"] == "resumed"]
    assert resumed["step"] == EVERY
    assert "step-00000010/shard-00000.safetensors: damaged" in resumed["passed_over"][0]


def test_a_checkpoint_that_the_ledger_does_not_lead_to_is_passed_over(whole: Path, tmp_path: Path) -> None:
    run = interrupted(whole, tmp_path / "run", after=10)
    kept = (run / "steps.jsonl").read_text().splitlines(keepends=True)[:7]
    (run / "steps.jsonl").write_text("".join(kept))
    fit(run)
    check_same(run, whole)


def test_resume_from_a_run_whose_newest_checkpoint_is_damaged(whole: Path, tmp_path: Path) -> None:
    """Each rank chooses a checkpoint by the sizes of its files. The ranks check the contents together, and may refuse
    it."""
    origin = interrupted(whole, tmp_path / "origin", after=10)
    damaged = origin / "checkpoints" / "step-00000010" / "shard-00000.safetensors"
    content = damaged.read_bytes()
    damaged.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(
        CheckpointError, match=r"shard-00000.safetensors: damaged: .*; give another checkpoint with --r"
    ):
        fit(tmp_path / "refused", resume=str(origin), fork=True)
    damaged.write_bytes(content[:-1])
    fork = fit(tmp_path / "fork", resume=str(origin), fork=True)
    assert json.loads((fork / "environment.json").read_text())["forked_from"]["step"] == EVERY


def test_if_all_checkpoints_are_damaged_the_run_does_not_start_from_scratch(whole: Path, tmp_path: Path) -> None:
    run = interrupted(whole, tmp_path / "run", after=10)
    for manifest in run.rglob("manifest.json"):
        manifest.unlink()
    before = (run / "steps.jsonl").read_bytes()
    with pytest.raises(
        CheckpointError, match=r"none of its checkpoints can be used: .*step-00000010: damaged"
    ) as error:
        fit(run)
    assert "\n" not in str(error.value)
    assert (run / "steps.jsonl").read_bytes() == before


def test_resume_never_refuses_an_unfinished_run(whole: Path, tmp_path: Path) -> None:
    run = interrupted(whole, tmp_path / "run", after=10)
    with pytest.raises(RunDirError, match="did not reach its end; resume it with --resume auto"):
        fit(run, resume="never")


def test_only_changes_of_what_is_computed_are_refused(whole: Path, tmp_path: Path) -> None:
    run = interrupted(whole, tmp_path / "run", after=10)
    with pytest.raises(RunDirError, match=r"another config \(optim.lr was 0.001, is 0.5; seed was 2, is 3\)"):
        fit(run, seed=3, optim={"lr": 0.5})
    fit(run, checkpoint={"every_steps": 3}, strategy={"activation_checkpointing": True})
    check_same(run, whole)


def test_resume_from_an_earlier_checkpoint(whole: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(whole, run)  # finished
    fit(run, resume=str(run / "checkpoints" / "step-00000005"))
    check_same(run, whole)
    assert [event["step"] for event in lines(run, "events.jsonl") if event["event"] == "resumed"] == [EVERY]


def test_a_fork_starts_from_the_state_of_another_run(whole: Path, tmp_path: Path) -> None:
    at = str(whole / "checkpoints" / "step-00000005")
    same = fit(tmp_path / "same", resume=at, fork=True)
    assert [line["step"] for line in lines(same)] == list(range(EVERY, STEPS))
    assert losses(same) == losses(whole)[EVERY:]
    newest = fit(tmp_path / "newest", resume=str(whole), fork=True, train={"steps": STEPS + 1})
    assert [line["step"] for line in lines(newest)] == [STEPS]
    for name, value in tensors(whole).items():
        np.testing.assert_array_equal(tensors(same)[name], value)
    found = verify_run(same)
    assert (found.steps, found.samples, found.checkpoints) == (STEPS, (STEPS - EVERY) * 8, 2)

    other = fit(tmp_path / "other", resume=at, fork=True, optim={"lr": 0.1})
    assert losses(other)[0] == losses(same)[0]
    assert losses(other)[1] != losses(same)[1]
    run = interrupted(
        same, tmp_path / "interrupted", after=0
    )  # before its first checkpoint, so it starts from the origin
    fit(run, resume=at, fork=True)
    check_same(run, same)
    run = interrupted(same, tmp_path / "not-begun", after=0)
    (run / "steps.jsonl").write_text("")
    (run / "evals.jsonl").write_text("")
    fit(run)  # without naming the origin again
    check_same(run, same)
    run = interrupted(same, tmp_path / "again", after=10)
    fit(run)
    check_same(run, same)


def test_wrong_values_of_resume_are_refused(whole: Path, tmp_path: Path) -> None:
    at, run = str(whole / "checkpoints" / "step-00000005"), tmp_path / "run"
    for arguments, said in (
        ({"fork": True}, "--fork: needs a checkpoint to begin from, --resume PATH --fork"),
        ({"resume": at}, f"--resume: {at} is of another run than {run}; add --fork to start a new run"),
        ({"resume": str(whole)}, f"--resume: {whole} is of another run than {run}"),
        ({"resume": str(tmp_path)}, f"--resume: {tmp_path} is not a checkpoint, and there is none in it; give auto"),
    ):
        with pytest.raises(ConfigError, match=re.escape(said)):
            fit(run, **arguments)
    with pytest.raises(ConfigError, match="is a checkpoint of the run folder itself"):
        fit(whole, resume=at, fork=True)
    assert not run.exists()
    taken = fit(tmp_path / "taken", resume=str(whole / "checkpoints" / "step-00000010"), fork=True)
    with pytest.raises(RunDirError, match=r"holds a run that did not begin at .*step-00000005"):
        fit(taken, resume=at, fork=True)


@pytest.mark.parametrize("train", [{"steps": 5}, {"steps": 4}, {"epochs": 1}])
def test_a_fork_without_steps_left_is_refused(whole: Path, tmp_path: Path, train: dict[str, int]) -> None:
    at = whole / "checkpoints" / "step-00000005"
    steps = train.get("steps", 2)  # an epoch of 97 samples, 64 a step
    data = {"global_batch_size": 64, "micro_batch_size": 32}
    said = f"--fork: the run has {steps} steps, and {at} already has 5 done; set train.steps"
    with pytest.raises(ConfigError, match=re.escape(said)):
        fit(tmp_path / "run", resume=str(at), fork=True, train=train, data=data)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_resume_in_lower_precision(tmp_path: Path, precision: str) -> None:
    train = {"steps": STEPS, "mixed_precision": precision}
    undisturbed = fit(tmp_path / "undisturbed", train=train)
    run = fit(interrupted(undisturbed, tmp_path / "run", after=EVERY), train=train)
    check_same(run, undisturbed)
    assert [line.get("loss_scale") for line in lines(run)] == [line.get("loss_scale") for line in lines(undisturbed)]


def test_resume_with_workers(whole: Path, tmp_path: Path) -> None:
    run = interrupted(whole, tmp_path / "run", after=EVERY)
    fit(run, data={"global_batch_size": 8, "micro_batch_size": 4, "num_workers": 2})
    check_same(run, whole)


OPTIMIZERS = ["sgd", "momentum", "rmsprop", "adagrad", "nadam", "radam", "adadelta", "adamax", "asgd", "rprop"]


@pytest.mark.parametrize("name", [*OPTIMIZERS, "adafactor"])
def test_resume_with_any_optimizer(tmp_path: Path, name: str) -> None:
    optim: dict[str, Any] = {"name": name, "lr": 0.01}
    if name == "momentum":
        optim = {"name": "sgd", "lr": 0.01, "momentum": 0.9}
    undisturbed = fit(tmp_path / "undisturbed", optim=optim)
    check_same(fit(interrupted(undisturbed, tmp_path / "run", after=EVERY), optim=optim), undisturbed)


def test_resume_with_optimizer_state_that_is_not_a_tensor(tmp_path: Path) -> None:
    undisturbed = fit(tmp_path / "undisturbed", WithLars())
    run = fit(interrupted(undisturbed, tmp_path / "run", after=EVERY), WithLars())
    check_same(run, undisturbed)
    assert losses(run)[-1] != losses(run)[0]


class Normalised(Masked):
    def model(self) -> torch.nn.Module:
        embedding, *others = super().model()
        return torch.nn.Sequential(embedding, torch.nn.BatchNorm1d(6), *others)


def test_running_statistics(tmp_path: Path) -> None:
    undisturbed = fit(tmp_path / "undisturbed", Normalised())
    assert "model.1.running_mean" in tensors(undisturbed)
    check_same(fit(interrupted(undisturbed, tmp_path / "run", after=EVERY), Normalised()), undisturbed)


class Mistaken(Masked):
    """Has metrics that fail on the whole evaluation set until the mistake is fixed."""

    mended = False

    def metrics(self, rows: dict[str, torch.Tensor]) -> dict[str, float]:
        if not self.mended and len(rows["right"]) == self.samples:
            raise ZeroDivisionError("a mistake")
        return super().metrics(rows)


def evaluations(run: Path) -> list[Any]:
    return [(entry["step"], entry["count"], entry["metrics"]) for entry in lines(run, "evals.jsonl")]


def test_an_error_in_the_last_evaluation_loses_no_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as mended:
        mended.setattr(Mistaken, "mended", True)
        undisturbed = fit(tmp_path / "undisturbed", Mistaken(dropout=0.2), eval={"every_steps": 0})
    with pytest.raises(ZeroDivisionError):
        fit(tmp_path / "run", Mistaken(dropout=0.2), eval={"every_steps": 0})
    run = tmp_path / "run"
    assert not (run / "evals.jsonl").exists()
    assert lines(run, "events.jsonl")[-1]["event"] == "failed"
    monkeypatch.setattr(Mistaken, "mended", True)
    fit(run, Mistaken(dropout=0.2), eval={"every_steps": 0})
    (resumed,) = [event for event in lines(run, "events.jsonl") if event["event"] == "resumed"]
    assert resumed["step"] == STEPS
    check_same(run, undisturbed)
    summaries = [json.loads((folder / "summary.json").read_text())["metrics"] for folder in (run, undisturbed)]
    assert summaries[0] == summaries[1]


def test_a_kill_between_save_and_evaluation_leaves_one_evaluation(tmp_path: Path) -> None:
    undisturbed = fit(tmp_path / "undisturbed", eval={"every_steps": EVERY})
    for name, kept in (("before", 0), ("after", 1)):
        run = interrupted(undisturbed, tmp_path / name, after=EVERY)
        entries = (run / "evals.jsonl").read_text().splitlines(keepends=True)
        (run / "evals.jsonl").write_text("".join(entries[:kept]))
        fit(run, eval={"every_steps": EVERY})
        check_same(run, undisturbed)
    assert [step for step, *_ in evaluations(undisturbed)] == [5, 10, 12]


def test_a_fork_does_not_evaluate_at_its_first_step(whole: Path, tmp_path: Path) -> None:
    checkpoint = str(whole / "checkpoints" / "step-00000005")
    fork = fit(tmp_path / "fork", resume=checkpoint, fork=True, eval={"every_steps": EVERY}, optim={"lr": 0.1})
    assert [step for step, *_ in evaluations(fork)] == [10, 12]
