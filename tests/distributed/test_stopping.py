"""Asked to stop: every rank saves at the same step and ends with 75; started again, it is the same run."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import yaml
from conftest import check_same, environment, lines, no_process_left, processes_of

STEPS = 60
CONFIG = {
    "task": {"target": "tasks:Slow", "dropout": 0.1},
    "data": {"global_batch_size": 16, "micro_batch_size": 4},
    "train": {"steps": STEPS},
    "checkpoint": {"every_steps": 0},
}


def ranks(mark: str) -> dict[str, psutil.Process]:
    """The processes that train, by rank; alone it is rank 0."""
    return {
        process.environ().get("RANK", "0"): process
        for process in processes_of(mark)
        if "launch" not in process.cmdline() or "RANK" in process.environ()
    }


@pytest.mark.parametrize(
    ("processes", "number", "to"),
    [(1, signal.SIGTERM, "0"), (2, signal.SIGUSR1, "1"), (2, signal.SIGTERM, "0")],
)
def test_a_rank_that_is_asked_to_stop(tmp_path: Path, processes: int, number: int, to: str) -> None:
    path = tmp_path / "slow.yaml"
    path.write_text(yaml.safe_dump(CONFIG))
    command = [sys.executable, "-m", "distrib", "launch", "--processes", str(processes), str(path), "--run-dir"]

    def start(folder: str, mark: str) -> "subprocess.Popen[str]":
        pipe = subprocess.PIPE
        return subprocess.Popen(
            [*command, folder], cwd=tmp_path, env=environment(mark), stdout=pipe, stderr=pipe, text=True
        )

    with no_process_left() as mark:
        running, ledger = start("run", mark), tmp_path / "run" / "steps.jsonl"
        deadline = time.monotonic() + 60
        while not ledger.exists() or ledger.read_bytes().count(b"\n") < 5:
            assert time.monotonic() < deadline, "it does not begin"
            time.sleep(0.01)
        os.kill(ranks(mark)[to].pid, number)
        _, said = running.communicate(timeout=60)
        assert running.returncode == 75, said
        done = len(lines(tmp_path / "run"))
        assert 5 <= done < STEPS
        assert said.count(f"run: asked to stop; saved after step {done}, start it again to go on") == 1
        assert "error" not in said
        events = lines(tmp_path / "run", "events.jsonl")
        assert [event["event"] for event in events] == ["started", "checkpoint", "preempted"]
        for folder in ("run", "undisturbed"):
            again = start(folder, mark)
            _, said = again.communicate(timeout=100)
            assert again.returncode == 0, said
    check_same(tmp_path / "run", tmp_path / "undisturbed")
