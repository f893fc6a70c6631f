"""`distrib ls`: runs in each state, what it prints of them, and folders that are damaged."""

import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import Run, check, environment, lines, refused, start, steps_done, until

DATA = {"global_batch_size": 16, "micro_batch_size": 4}
CONFIG: dict[str, Any] = {"task": {"target": "tasks:Masked"}, "data": DATA, "train": {"steps": 4}}
SLOW = {**CONFIG, "task": {"target": "tasks:Slow"}, "train": {"steps": 2000}, "checkpoint": {"every_steps": 5}}


def write(folder: Path, name: str, config: dict[str, Any]) -> str:
    (folder / name).write_text(yaml.safe_dump(config))
    return name


def listed(run: Run, *arguments: object) -> dict[str, dict[str, Any]]:
    """The rows by name, in the order in which they are listed."""
    return {row["name"]: row for row in json.loads(check(run("distrib", "ls", *arguments, "--json")))}


def test_runs_in_each_state(mark: str, run: Run, tmp_path: Path) -> None:
    small, slow = write(tmp_path, "small.yaml", CONFIG), write(tmp_path, "slow.yaml", SLOW)
    check(run("distrib", "train", small, "--run-dir", "runs/finished"))
    check(run("distrib", "train", small, "train.steps=2", "--run-dir", "runs/sweep-1/first"))
    check(run("distrib", "submit", small, "--run-dir", "runs/later", PATH=str(sbatch(tmp_path))))

    training = start(mark, tmp_path, "train", slow, "--run-dir", "runs/killed")
    until(lambda: steps_done(tmp_path / "runs/killed") >= 7, "it does not begin")
    assert listed(run)["killed"]["state"] == "training now"
    training.kill()
    training.communicate(timeout=60)

    training = start(mark, tmp_path, "train", slow, "--run-dir", "runs/stopped")
    until(lambda: steps_done(tmp_path / "runs/stopped") >= 2, "it does not begin")
    training.send_signal(signal.SIGTERM)
    training.communicate(timeout=60)
    assert training.returncode == 75

    shutil.copytree(tmp_path / "runs/killed", tmp_path / "runs/damaged")
    shutil.rmtree(tmp_path / "runs/damaged/checkpoints")
    (tmp_path / "runs/damaged/config.yaml").write_bytes(b"\xff\x00")
    (tmp_path / "runs/notes").mkdir()
    (tmp_path / "runs/notes/text").touch()

    rows = listed(run)
    assert {name: row["state"] for name, row in rows.items()} == {
        "finished": "finished",
        "sweep-1/first": "finished",
        "later": "not begun",
        "killed": "interrupted",
        "stopped": "interrupted",
        "damaged": "damaged",
    }
    assert "config.yaml: " in rows["damaged"]["problem"]
    assert (rows["finished"]["step"], rows["finished"]["steps"]) == (4, 4)
    assert (rows["killed"]["step"], rows["killed"]["steps"]) == (steps_done(tmp_path / "runs/killed"), 2000)
    evaluation = lines(tmp_path / "runs/finished", "evals.jsonl")[-1]
    summary = json.loads((tmp_path / "runs/finished/summary.json").read_text())
    assert rows["finished"]["metrics"] == summary["metrics"]
    assert rows["finished"]["samples_per_second"] == summary["samples_per_second"]
    best = rows["finished"]["best"]
    assert (best["value"], best["step"]) == (evaluation["metrics"]["eval/loss"], 4)
    assert rows["finished"]["strategy"] == "single"
    ages = [row["last_activity"] for row in rows.values()]
    assert ages == sorted(ages, reverse=True)

    assert list(listed(run, "runs", "--sort", "name")) == sorted(rows)
    by_loss = [row["metrics"].get("eval/loss") for row in listed(run, "--sort", "eval/loss").values()]
    assert by_loss[:2] == sorted(by_loss[:2])
    assert by_loss[2:] == [None] * 4
    assert list(listed(run, "runs/sweep-1")) == ["first"]
    assert list(listed(run, "runs/finished")) == ["finished"]
    assert "--sort: 'nam': no such column, did you mean name?" in refused(run("distrib", "ls", "--sort", "nam"))

    table = check(run("distrib", "ls")).splitlines()
    (shown,) = [line for line in table if line.startswith("finished ")]
    assert f"eval/loss {best['value']:.4f} @4" in shown
    assert "4 of 4" in shown
    assert [line.split()[:2] for line in table if line.startswith("damaged ")] == [["damaged", "damaged"]]
    assert table[-1].startswith("warning: runs/damaged/config.yaml: damaged: ")


def sbatch(folder: Path) -> Path:
    (folder / "bin").mkdir()
    (folder / "bin" / "sbatch").write_text("#!/bin/sh\necho 17\n")
    (folder / "bin" / "sbatch").chmod(0o755)
    return folder / "bin"


def test_runs_that_stopped_early_failed_or_are_in_the_queue_again(run: Run, tmp_path: Path) -> None:
    config = write(tmp_path, "small.yaml", {**CONFIG, "eval": {"every_steps": 1}})
    stop = "train.stop={patience: 1, min_delta: 1e9}"
    check(run("distrib", "train", config, "train.steps=50", stop, "--run-dir", "runs/early"))
    check(run("distrib", "train", config, "--run-dir", "runs/failed"))
    (tmp_path / "runs/failed/summary.json").unlink()
    with (tmp_path / "runs/failed/events.jsonl").open("a") as file:
        file.write('{"event":"failed","error":"it broke"}\n{"event":"warning","reason":"so did an observer"}\n')
    shutil.copytree(tmp_path / "runs/failed", tmp_path / "runs/requeued")
    with (tmp_path / "runs/requeued/events.jsonl").open("a") as file:
        file.write('{"event":"preempted","step":4,"requeue":true}\n')
    rows = listed(run)
    states = {name: row["state"] for name, row in rows.items()}
    assert states == {"early": "stopped early", "failed": "failed", "requeued": "in queue"}
    assert rows["early"]["step"] < rows["early"]["steps"] == 50


@pytest.mark.parametrize("file", ["config.yaml", "environment.json", "steps.jsonl", "evals.jsonl", "events.jsonl"])
@pytest.mark.parametrize("damage", ["cut", "zeros", "folder", "json", "link"])
def test_a_damaged_file_never_breaks_the_list(trained: Path, tmp_path: Path, file: str, damage: str) -> None:
    from distrib.monitor.listing import list_runs, row, run_folders
    from distrib.run_folder.folder import RunDir

    folder = tmp_path / "runs" / "one"
    shutil.copytree(trained, folder)
    content = (folder / file).read_bytes()
    (folder / file).unlink()
    if damage == "folder":
        (folder / file).mkdir()
    elif damage == "link":
        (folder / file).symlink_to(folder / file)
    else:
        damaged = {"cut": content[: len(content) // 2], "zeros": bytes(len(content)), "json": b'{"step": []}\n[1]\n'}
        (folder / file).write_bytes(damaged[damage])
    list_runs(tmp_path / "runs", "age", as_json=False)
    list_runs(tmp_path / "runs", "step", as_json=True)
    assert run_folders(tmp_path / "runs") == [folder]
    assert row(RunDir(folder), "one")["name"] == "one"


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from distrib import Config, Trainer
    from distrib.training import build

    folder = tmp_path_factory.mktemp("listing") / "trained"
    config = Config.from_dict(CONFIG)
    Trainer(build.task(config), config, folder, verbosity="quiet").fit()
    return folder


def test_no_runs(run: Run, tmp_path: Path) -> None:
    assert refused(run("distrib", "ls")).startswith("error: runs: cannot be listed: No such file or directory")
    (tmp_path / "runs").mkdir()
    assert check(run("distrib", "ls")) == "runs: no runs\n"
    assert listed(run) == {}


def test_it_does_not_import_torch(trained: Path, mark: str) -> None:
    code = (
        "import sys; from distrib.cli import app; app(['ls', sys.argv[1]], standalone_mode=False); "
        "print('torch' in sys.modules)"
    )
    command = [sys.executable, "-c", code, str(trained.parent)]
    output = subprocess.run(command, env=environment(mark), capture_output=True, text=True, check=True).stdout
    assert output.splitlines()[-1] == "False", output
