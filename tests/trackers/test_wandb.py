"""One wandb run for the life of a run: offline, and online with a server that fails."""

import json
import math
import os
import random
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml
from conftest import ROOT, Run, check, events, free_port, lines, refused, start, steps_done, until

from distrib.config_yaml import flatten
from distrib.monitor.trackers.wandb_files import OfflineRun, read_offline

STEPS = 200
CONFIG = {
    "task": {"target": "tasks:Slow", "dropout": 0.1},
    "data": {"global_batch_size": 16, "micro_batch_size": 4},
    "optim": {"lr": 0.01},
    "train": {"steps": STEPS},
    "eval": {"every_steps": 50},
    "checkpoint": {"every_steps": 20},
    "tracking": {"project": "numbers", "group": "sevens", "job_type": "test", "tags": ["small"], "notes": "a test"},
}
KEY = "0123456789abcdef" * 2 + "01234567"


@pytest.fixture
def command(run: Run) -> Run:
    """The fixture `run`, in tests that name a run's folder so."""
    return run


def write(folder: Path, **changes: Any) -> Path:
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump({**CONFIG, **changes}))
    return path


def environment(folder: Path, **more: str) -> dict[str, str]:
    """Return an environment without the machine's credentials."""
    (folder / "home").mkdir(exist_ok=True)
    return {"HOME": str(folder / "home"), "WANDB_MODE": "online", "WANDB_API_KEY": "", **more}


def interrupted(mark: str, folder: Path, *numbers: int, **env: str) -> Path:
    """Start a run once for each signal, which is sent at a random moment after wandb wrote something; then let the run
    finish. Return its folder."""
    run, chance = folder / "runs" / "run", random.Random(7)
    for begun, number in enumerate(numbers, 1):
        process = start(mark, folder, "train", "run.yaml", **env)
        wanted = steps_done(run) + chance.randint(5, STEPS // (len(numbers) + 1))
        until(lambda wanted=wanted: steps_done(run) >= wanted, "it does not go on")  # type: ignore[misc]
        until(lambda begun=begun: written(run) == begun, "wandb writes nothing")  # type: ignore[misc]
        process.send_signal(number)
        _, said = process.communicate(timeout=60)
        assert process.returncode == (-9 if number == signal.SIGKILL else 75), said
    process = start(mark, folder, "train", "run.yaml", **env)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 0, said
    return run


def written(run: Path) -> int:
    """Return how many starts have written history."""
    folders = {file.parent for file in run.glob("wandb/*run-*/*.wandb") if not file.parent.is_symlink()}
    return sum(bool(read_offline(folder).history) for folder in folders)


def check_history(rows: list[dict[str, Any]], run: Path) -> None:
    """Check that each step is there once, with the run folder's numbers."""
    assert [row["_step"] for row in rows] == list(range(1, STEPS + 1))
    for row, line in zip(rows, lines(run), strict=True):
        assert (row["train/loss"], row["train/lr"], row["train/grad_norm"]) == (
            line["loss"],
            line["lr"],
            line["grad_norm"],
        )
        assert row["perf/samples_per_second"] == pytest.approx(16 / row["perf/step_seconds"])
    for evaluation in lines(run, "evals.jsonl"):
        row = rows[evaluation["step"] - 1]
        assert {key: value for key, value in row.items() if key.startswith("eval/")} == evaluation["metrics"]


def check_summary(summary: dict[str, Any], run: Path) -> None:
    """Check the latest and the best values."""
    evaluations = [line["metrics"] for line in lines(run, "evals.jsonl")]
    assert summary["train/loss"] == lines(run)[-1]["loss"]
    assert summary["eval/right"] == evaluations[-1]["eval/right"]
    assert summary["best/eval/right"] == max(metrics["eval/right"] for metrics in evaluations)
    assert summary["best/eval/loss"] == min(metrics["eval/loss"] for metrics in evaluations)


def check_config(config: dict[str, Any], run: Path) -> None:
    resolved = yaml.safe_load((run / "config.yaml").read_text())
    assert flatten({key: config[key] for key in resolved}) == flatten(resolved)  # it has no empty dictionaries
    here = json.loads((run / "environment.json").read_text())
    received = config["distrib"]
    assert received["versions"] == here["versions"]
    assert received["machine"]["cores"] == os.cpu_count()
    assert (received["launcher"], received["world_size"], received["strategy"]) == ("plain", 1, "single")
    assert received["git_commit"] == here["git_commit"]
    assert received["plan"]["num_steps"] == STEPS


def offline(run: Path) -> list[OfflineRun]:
    """Return one run for each start that wrote anything."""
    folders = sorted({path.parent for path in run.glob("wandb/offline-run-*/*.wandb")})
    return [start for start in map(read_offline, folders) if start.id]


def test_offline_through_three_restarts(command: Run, mark: str, tmp_path: Path) -> None:
    """Asked to stop, killed, and asked again: no step twice, none missing, and no key in any file."""
    write(tmp_path)
    env = environment(tmp_path, WANDB_MODE="offline", WANDB_API_KEY=KEY)
    run = interrupted(mark, tmp_path, signal.SIGTERM, signal.SIGKILL, signal.SIGUSR1, **env)
    starts = offline(run)
    assert len({(start.id, start.project, start.name) for start in starts}) == 1
    assert (starts[0].project, starts[0].name) == ("numbers", "run")
    assert [(start.exit_code, start.preempting) for start in starts] == [
        (75, True),
        (None, False),
        (75, True),
        (0, False),
    ]
    check_history([row for start in starts for row in start.history], run)
    check_summary(starts[-1].summary, run)
    check_config(starts[-1].config, run)
    with server(mark, tmp_path / "server") as wandb:
        check(command("wandb", "sync", run / "wandb", **env, WANDB_BASE_URL=wandb.url))
        check_history(wandb.history(), run)  # of one run
    for path in run.rglob("*"):
        assert not path.is_file() or KEY.encode() not in path.read_bytes(), path


def test_offline_as_it_is_without_credentials(run: Run, tmp_path: Path) -> None:
    """auto is offline; checkpoints become artifacts if configured; a sweep gives the id."""
    write(tmp_path, train={"steps": 3})
    env = environment(tmp_path, WANDB_RUN_ID="from-a-sweep")
    said = check(run("distrib", "train", "run.yaml", "tracking.checkpoints=true", **env))
    assert "wandb: offline, upload by: wandb sync runs/run/wandb" in said
    (folder,) = (tmp_path / "runs/run/wandb").glob("offline-run-*")
    assert read_offline(folder).id == "from-a-sweep"
    recorded = next(folder.glob("*.wandb")).read_bytes()
    assert b"checkpoint-from-a-sweep" in recorded
    assert (tmp_path / "runs/run/checkpoints/step-00000003").resolve().as_uri().encode() in recorded


def test_a_run_that_fails(run: Run, tmp_path: Path) -> None:
    write(tmp_path, task={"target": "tasks:Misbehaving", "how": "raise", "on_rank": 0})
    check(run("distrib", "train", "run.yaml", "tracking.wandb=offline", **environment(tmp_path)), code=1)
    (failed,) = offline(tmp_path / "runs" / "run")
    assert (failed.exit_code, failed.preempting) == (1, False)
    assert [row["_step"] for row in failed.history] == [line["step"] + 1 for line in lines(tmp_path / "runs" / "run")]


def test_tracking_that_is_killed(mark: str, tmp_path: Path) -> None:
    """Training goes on with a warning; the next start logs what is missing."""
    write(tmp_path, checkpoint={"every_steps": 0})
    run, env = tmp_path / "runs" / "run", environment(tmp_path, WANDB_MODE="offline")
    process = start(mark, tmp_path, "train", "run.yaml", **env)
    until(lambda: written(run) == 1, "wandb writes nothing")
    (tracking,) = psutil.Process(process.pid).children()
    for child in [*tracking.children(), tracking]:
        child.kill()
    done = steps_done(run)
    until(lambda: steps_done(run) > done + 20, "training stops")
    process.send_signal(signal.SIGTERM)
    said, _ = process.communicate(timeout=60)
    assert "warning: tracking ended with exit code -9, see tracking.log" in said
    process = start(mark, tmp_path, "train", "run.yaml", **env)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 0, said
    check_history([row for start in offline(run) for row in start.history], run)


def test_off(run: Run, tmp_path: Path) -> None:
    write(tmp_path, train={"steps": 2})
    check(run("distrib", "train", "run.yaml", "tracking.wandb=off", **environment(tmp_path)))
    assert not (tmp_path / "runs/run/wandb").exists()


def test_online_is_refused_where_it_cannot_be(run: Run, tmp_path: Path) -> None:
    write(tmp_path)
    command = ("distrib", "train", "run.yaml", "tracking.wandb=online")
    assert "tracking.wandb: online, but no credentials" in refused(run(*command, **environment(tmp_path)))
    wrong = refused(run(*command, **environment(tmp_path, WANDB_API_KEY="short")))
    assert "API key must have 40+ characters" in wrong
    assert not (tmp_path / "runs").exists()


class Server:
    """Runs wandb_server.py, which can be killed and started again with its data."""

    def __init__(self, mark: str, folder: Path) -> None:
        self.mark, self.folder, self.port = mark, folder, free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.process: subprocess.Popen[bytes] | None = None

    def begin(self) -> None:
        program = str(ROOT / "tests" / "trackers" / "wandb_server.py")
        env = {**os.environ, "TEST_MARK": self.mark}
        with (self.folder / "server.log").open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, program, str(self.port), str(self.folder)], env=env, stdout=log, stderr=log
            )

    def kill(self) -> None:
        assert self.process is not None
        self.process.kill()
        self.process.wait()

    def run(self) -> dict[str, Any]:
        """Return the only run that the server has."""
        path = self.folder / "runs.json"
        runs: list[dict[str, Any]] = list(json.loads(path.read_text()).values()) if path.exists() else []
        assert len(runs) <= 1
        return runs[0] if runs else {"files": {}}

    def history(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.run()["files"].get("wandb-history.jsonl", [])]


@contextmanager
def server(mark: str, folder: Path) -> Iterator[Server]:
    folder.mkdir()
    it = Server(mark, folder)
    it.begin()
    try:
        yield it
    finally:
        it.kill()


def test_a_server_that_is_killed_and_comes_back(mark: str, tmp_path: Path) -> None:
    """Training does not wait, and everything arrives."""
    write(tmp_path, train={"steps": 2 * STEPS})
    run = tmp_path / "runs" / "run"
    with server(mark, tmp_path / "server") as wandb:
        env = environment(tmp_path, WANDB_BASE_URL=wandb.url, WANDB_API_KEY=KEY)
        process = start(mark, tmp_path, "train", "run.yaml", **env)
        until(lambda: wandb.history(), "nothing arrives")
        wandb.kill()
        arrived, done = len(wandb.history()), steps_done(run)
        until(lambda: steps_done(run) > done + 50, "training waits for the server")
        assert len(wandb.history()) == arrived
        wandb.begin()
        output, said = process.communicate(timeout=90)
        assert process.returncode == 0, said
        assert f"wandb: {wandb.url}/us/numbers/runs/" in output
        assert [row["_step"] for row in wandb.history()] == list(range(1, 2 * STEPS + 1))
        assert wandb.run()["ends"] == [{"complete": True, "exitcode": 0, "preempting": None}]
        received = wandb.run()["told"]
        assert (received["groupName"], received["jobType"], received["tags"], received["notes"]) == (
            *("sevens", "test", ["small"], "a test"),
        )
        assert json.loads(wandb.run()["files"]["wandb-events.jsonl"][0])["system.proc.memory.rssMB"] > 100


def test_online_through_restarts(mark: str, tmp_path: Path) -> None:
    write(tmp_path, tracking={"group": "ours"})
    with server(mark, tmp_path / "server") as wandb:
        own = {"WANDB_RUN_GROUP": "theirs", "WANDB_TAGS": "a,b", "WANDB_NOTES": "a note"}
        env = environment(tmp_path, WANDB_BASE_URL=wandb.url, WANDB_API_KEY=KEY, **own)
        run = interrupted(mark, tmp_path, signal.SIGTERM, signal.SIGKILL, **env)
        check_history(wandb.history(), run)
        check_summary(json.loads(wandb.run()["files"]["wandb-summary.json"][-1]), run)
        config = json.loads(wandb.run()["told"]["config"])
        check_config({key: value["value"] for key, value in config.items()}, run)
        ends = wandb.run()["ends"]
        assert [end["exitcode"] for end in ends if end["complete"]] == [75, 0]
        assert any(end["preempting"] for end in ends)
        received = wandb.run()["told"]
        assert (received["groupName"], received["tags"], received["notes"]) == ("ours", ["a", "b"], "a note")


def test_what_the_config_does_not_set_is_wandbs_own_setting(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After `wandb offline` a run stays offline even with credentials. NaN reaches the charts."""
    monkeypatch.delenv("WANDB_MODE")
    (tmp_path / "wandb").mkdir()
    (tmp_path / "wandb" / "settings").write_text("[default]\nmode = offline\n")
    task = {"target": "tasks:Misbehaving", "how": "nan", "on_rank": 0, "at": 6}
    write(tmp_path, task=task, tracking={}, train={"steps": 5}, eval={"every_steps": 0})
    own = {"WANDB_PROJECT": "theirs", "WANDB_NAME": "named", "WANDB_API_KEY": KEY}
    env = {"HOME": str(tmp_path), "WANDB_BASE_URL": f"http://127.0.0.1:{free_port()}", **own}
    result = run("distrib", "train", "run.yaml", **env)
    assert "wandb: offline, upload by: wandb sync" in check(result)
    assert "warning" not in result.stdout + result.stderr
    (kept,) = offline(tmp_path / "runs" / "run")
    assert (kept.project, kept.name) == ("theirs", "named")
    verdicts = [line["verdict"] for line in lines(tmp_path / "runs" / "run")]
    assert [math.isnan(row["train/loss"]) for row in kept.history] == [verdict != "applied" for verdict in verdicts]
    assert any(math.isnan(row["train/loss"]) for row in kept.history)
    (tmp_path / "wandb" / "settings").write_text("[default]\nmode = disabled\n")
    assert "wandb" not in check(run("distrib", "train", "run.yaml", "--run-dir", "runs/disabled", **env))
    assert not offline(tmp_path / "runs" / "disabled")


def test_a_project_that_wandb_refuses_is_one_warning(run: Run, tmp_path: Path) -> None:
    write(tmp_path, tracking={"project": "a/b", "wandb": "offline"}, train={"steps": 2}, eval={"every_steps": 0})
    result = run("distrib", "train", "run.yaml", **environment(tmp_path))
    (warning,) = [line for line in check(result).splitlines() if line.startswith("warning")]
    assert "trackers:Wandb failed in on_start and is called no more: " in warning
    assert "a/b" in warning


def test_a_server_that_is_not_there(run: Run, tmp_path: Path) -> None:
    write(tmp_path, train={"steps": 5})
    env = environment(tmp_path, WANDB_BASE_URL=f"http://127.0.0.1:{free_port()}", WANDB_API_KEY=KEY)
    said = check(run("distrib", "train", "run.yaml", **env))
    assert "this part of the run is kept offline" in said
    (kept,) = offline(tmp_path / "runs" / "run")
    assert [row["_step"] for row in kept.history] == [1, 2, 3, 4, 5]
    assert events(tmp_path / "runs" / "run")[-1] == "finished"


def test_system_metrics_of_every_machine(mark: str, tmp_path: Path) -> None:
    """Two ranks, whose variables name two machines."""
    write(tmp_path, train={"steps": 300})
    port = str(free_port())
    with server(mark, tmp_path / "server") as wandb:
        env = environment(tmp_path, WANDB_BASE_URL=wandb.url, WANDB_API_KEY=KEY)
        env |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2", "LOCAL_RANK": "0"}
        ranks = [
            start(mark, tmp_path, "train", "run.yaml", **env, RANK=str(rank), SLURMD_NODENAME=f"n{rank}")
            for rank in (0, 1)
        ]
        for rank in ranks:
            _, said = rank.communicate(timeout=90)
            assert rank.returncode == 0, said
        assert [row["_step"] for row in wandb.history()] == list(range(1, 301))
        (of_n1,) = [row for row in wandb.history() if "system/n1/proc.memory.rssMB" in row][:1]
        assert of_n1["system/n1/proc.memory.rssMB"] > 100
        assert json.loads(wandb.run()["files"]["wandb-events.jsonl"][0])["system.proc.memory.rssMB"] > 100


def test_a_sweep(run: Run, tmp_path: Path) -> None:
    """Run the command that wandb's agent builds from launch/sweep.yaml and its values."""
    from wandb.sdk.launch.sweeps.utils import create_sweep_command, create_sweep_command_args

    sweep = yaml.safe_load((ROOT / "launch" / "sweep.yaml").read_text())
    values = create_sweep_command_args({"args": {"optim.lr": {"value": 0.002}, "task.dropout": {"value": 0.3}}})
    command = []
    for word in create_sweep_command(sweep["command"]):
        command += values["args_no_hyphens"] if word == "${args_no_hyphens}" else [word]
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    env = environment(tmp_path, WANDB_SWEEP_ID="abc", WANDB_RUN_ID="r1")
    check(run(*command, "train.epochs=1", **env))
    folder = tmp_path / "runs" / "sweep-abc" / "r1"
    config = yaml.safe_load((folder / "config.yaml").read_text())
    assert (config["optim"]["lr"], config["task"]["dropout"]) == (0.002, 0.3)
    (received,) = offline(folder)
    assert received.id == "r1"
    assert sweep["metric"]["name"] in received.summary
    assert set(sweep["parameters"]) <= set(flatten(config))
