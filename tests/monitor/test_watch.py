"""`distrib watch` shows a run from its folder as the run itself does."""

import signal
from pathlib import Path

import pytest
import yaml
from conftest import Run, check, events, lines, on_a_terminal, refused, start, steps_done, until

from distrib.run_folder.folder import RunDir

CONFIG = {
    "task": {"target": "tasks:Slow"},
    "data": {"global_batch_size": 16, "micro_batch_size": 4},
    "train": {"steps": 120},
    "eval": {"every_steps": 40},
    "checkpoint": {"every_steps": 40},
}


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(CONFIG))
    return path


def test_a_run_that_goes_on(mark: str, run: Run, tmp_path: Path, config: Path) -> None:
    """Watch a run from its first step to its end, through a stop and a second start."""
    folder = tmp_path / "runs" / "run"
    training = start(mark, tmp_path, "train", config)
    until(lambda: steps_done(folder) >= 1, "it does not begin")
    watching = start(mark, tmp_path, "watch", folder, "--checkpoint", "newest")
    until(lambda: steps_done(folder) >= 50, "it does not go on")
    training.send_signal(signal.SIGTERM)
    _, said = training.communicate(timeout=60)
    assert training.returncode == 75, said
    assert watching.poll() is None
    trained = check(run("distrib", "train", config))
    output, said = watching.communicate(timeout=60)
    assert watching.returncode == 0, said
    shown = output.splitlines()
    assert [line for line in shown if line.endswith("samples)")][-2:] == [
        line for line in trained.splitlines() if "eval/right" in line and "finished" not in line
    ]
    assert shown[0] == "started on 1 process(es), single, by plain"
    assert f"asked to stop; saved after step {steps_done_at_the_stop(folder)}" in shown
    assert shown[-1].startswith(f"{folder} finished: eval/loss ")
    # The newest checkpoint, as it became so; the one of the stop has the metrics of the evaluation before.
    saved = [line.partition("  ")[::2] for line in shown if line.startswith("checkpoint newest: step ")]
    assert [int(line.split()[-1]) for line, _ in saved] == [40, steps_done_at_the_stop(folder), 80, 120]
    assert saved[0][1] == saved[1][1] != saved[2][1]
    assert all(metrics.startswith("eval/loss ") for _, metrics in saved)
    drawn, code = on_a_terminal(mark, tmp_path, "watch", folder, COLUMNS="150")  # it has finished
    assert code == 0
    for part in ("━", "120/120", "evaluation step 120", "checkpoint step 120", "going on after step"):
        assert part in drawn


def test_the_metrics_of_a_checkpoint(mark: str, run: Run, tmp_path: Path) -> None:
    short = {**CONFIG, "train": {"steps": 12}, "eval": {"every_steps": 2}, "optim": {"name": "sgd", "lr": 8.0}}
    checkpoint = {"every_steps": 4, "best": {"metric": "eval/loss", "mode": "min"}}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump({**short, "checkpoint": checkpoint}))
    folder = tmp_path / "runs" / "run"
    check(run("distrib", "train", "run.yaml"))
    found = {line["step"]: line["metrics"] for line in lines(folder, "evals.jsonl")}
    first = min(found, key=lambda step: (found[step]["eval/loss"], step))
    assert first < 12
    for which, named, step in (
        ("best", f"checkpoint best: step {first}", first),
        ("newest", "checkpoint newest: step 12", 12),
        ("6", "checkpoint 6:", 6),
        ("7", "checkpoint 7:", 6),  # at the last evaluation before
    ):
        metrics = "  ".join(f"{key} {value:.4f}" for key, value in sorted(found[step].items()))
        shown = check(run("distrib", "watch", folder, "--checkpoint", which)).splitlines()
        assert [line for line in shown if line.startswith("checkpoint")][-1] == f"{named}  {metrics}"
    drawn, code = on_a_terminal(mark, tmp_path, "watch", folder, "--checkpoint", "best", COLUMNS="150")
    assert code == 0
    assert f"checkpoint best: step {first}  eval/loss {found[first]['eval/loss']:.4f}" in drawn
    assert "checkpoint 1:  not evaluated" in check(run("distrib", "watch", folder, "--checkpoint", 1))
    for which, said in (
        ("13", f"--checkpoint 13: {folder} has 12 steps; give one of them"),
        ("worst", "--checkpoint: worst is not newest, best or a step"),
    ):
        assert said in refused(run("distrib", "watch", folder, "--checkpoint", which))


def steps_done_at_the_stop(folder: Path) -> int:
    for line in (folder / "events.jsonl").read_text().splitlines():
        event = yaml.safe_load(line)
        if event["event"] == "preempted":
            step: int = event["step"]
            return step
    raise AssertionError(events(folder))


def test_a_run_that_nobody_trains(mark: str, run: Run, tmp_path: Path, config: Path) -> None:
    training = start(mark, tmp_path, "train", config)
    folder = tmp_path / "runs" / "run"
    until(lambda: steps_done(folder) >= 45, "it does not begin")
    training.kill()
    training.communicate(timeout=60)
    shown = check(run("distrib", "watch", folder)).splitlines()
    assert shown[-2].startswith(f"step {steps_done(folder)}/120  epoch ")
    assert shown[-1] == f"{folder}: nobody trains it now, as far as can be seen from here; start it again to go on"
    said = refused(run("distrib", "watch", folder, "--checkpoint", "best"))
    assert f"--checkpoint best: the config of {folder} has neither checkpoint.best nor train.stop; give newest" in said


def test_what_is_no_run(run: Run, tmp_path: Path) -> None:
    assert "not a run folder" in refused(run("distrib", "watch", tmp_path))


def test_quiet_and_verbose(run: Run, config: Path) -> None:
    """-v prints a line for each step, with its times."""
    short = "train.steps=3"
    assert check(run("distrib", "train", config, short, "--run-dir", "a", "--quiet")) == ""
    lines = check(run("distrib", "train", config, short, "--run-dir", "b", "-v")).splitlines()
    steps = [line for line in lines if line.startswith("step") and "grad_norm" in line]
    assert [line.split()[1] for line in steps] == ["1/3", "2/3", "3/3"]
    assert all(" ms (data " in line and "optimizer " in line for line in steps)


def test_a_run_that_waits_in_a_queue(mark: str, run: Run, tmp_path: Path, config: Path) -> None:
    """After a stop and a requeue, `watch` waits for the next start."""
    folder = tmp_path / "runs" / "run"
    check(run("distrib", "train", config, "train.steps=5"))
    (folder / "summary.json").unlink()
    RunDir(folder).event("preempted", step=5, requeue=True)
    RunDir(folder).event("warning", reason="an observer failed at the end")
    watching = start(mark, tmp_path, "watch", folder)
    assert watching.stdout is not None
    while "asked to stop; saved after step 5" not in (line := watching.stdout.readline()):
        assert line, "it has ended"
    check(run("distrib", "train", config, "train.steps=5"))
    output, said = watching.communicate(timeout=60)
    assert watching.returncode == 0, said
    assert "going on after step 5" in output
    assert f"{folder} finished: eval/loss " in output
