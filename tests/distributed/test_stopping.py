"""A request to stop: every rank saves at the same step and exits with 75. Started again, the run has the same
result."""

import os
import signal
import sys
from pathlib import Path

import pytest
import yaml
from conftest import Run, check, check_same, events, lines, ranks, start, steps_done, until

STEPS = 60
CONFIG = {
    "task": {"target": "tasks:Slow", "dropout": 0.1},
    "data": {"global_batch_size": 16, "micro_batch_size": 4},
    "train": {"steps": STEPS},
    "checkpoint": {"every_steps": 0},
}


def test_a_signal_to_one_rank_stops_all(mark: str, tmp_path: Path) -> None:
    (tmp_path / "slow.yaml").write_text(yaml.safe_dump(CONFIG))
    command = ["launch", "--processes", 2, "slow.yaml", "--run-dir"]
    run = tmp_path / "run"
    running = start(mark, tmp_path, *command, "run")
    until(lambda: steps_done(run) >= 5, "it does not begin")
    os.kill(ranks(mark)["1"].pid, signal.SIGUSR1)
    _, said = running.communicate(timeout=60)
    assert running.returncode == 75, said
    done = len(lines(run))
    assert 5 <= done < STEPS
    assert said.count(f"run: asked to stop; saved after step {done}, start it again to go on") == 1
    assert "error" not in said
    assert events(run) == ["started", "checkpoint", "preempted"]
    for folder in ("run", "undisturbed"):
        again = start(mark, tmp_path, *command, folder)
        _, said = again.communicate(timeout=100)
        assert again.returncode == 0, said
    check_same(run, tmp_path / "undisturbed")


def test_ctrl_c_in_one_process(mark: str, tmp_path: Path) -> None:
    """After one Ctrl-C it saves and ends; after two it ends at once."""
    (tmp_path / "slow.yaml").write_text(yaml.safe_dump({**CONFIG, "train": {"steps": 100_000}}))
    once = start(mark, tmp_path, "train", "slow.yaml", "--run-dir", "once")
    until(lambda: steps_done(tmp_path / "once") >= 5, "it does not begin")
    once.send_signal(signal.SIGINT)
    _, said = once.communicate(timeout=60)
    assert (once.returncode, events(tmp_path / "once")[-1]) == (75, "preempted"), said

    asleep = {**CONFIG, "task": {"target": "tasks:Misbehaving", "how": "sleep", "on_rank": 0, "at": 9}}
    (tmp_path / "asleep.yaml").write_text(yaml.safe_dump(asleep))
    twice = start(mark, tmp_path, "train", "asleep.yaml", "--run-dir", "twice")
    until(lambda: steps_done(tmp_path / "twice") == 1, "it does not begin")  # two steps, of which one is in the ledger
    twice.send_signal(signal.SIGINT)
    with pytest.raises(TimeoutError):
        until(lambda: twice.poll() is not None, "a rank that sleeps does not come to the end of its step", 2)
    twice.send_signal(signal.SIGINT)
    _, said = twice.communicate(timeout=60)
    assert (twice.returncode, said) == (130, "interrupted\n")


EACH_SIGNAL = """
import os, signal
from distrib import Config, Trainer
from distrib.errors import Preempted
from tasks import Masked

class SendsItself(Masked):
    sent = False

    def forward(self, model, batch):
        if not self.sent:
            self.sent = True
            os.kill(os.getpid(), number)
        return super().forward(model, batch)

config = Config.from_dict(
    {"name": "run", "data": {"global_batch_size": 16, "micro_batch_size": 16}, "train": {"steps": 20}}
)
signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
numbers = ["SIGTERM", "SIGINT", "SIGUSR1", "SIGUSR2", "SIGXCPU", "SIGHUP"]
for name in numbers:
    number = getattr(signal, name)
    before = signal.getsignal(number)
    try:
        Trainer(SendsItself(), config).fit()
    except Preempted:
        assert name != "SIGHUP"
    else:
        assert name == "SIGHUP"
    assert signal.getsignal(number) is before
signal.signal(signal.SIGHUP, signal.SIG_DFL)
try:
    Trainer(SendsItself(), config, "hung-up").fit()
except Preempted:
    print("all as they should")
"""


def test_every_stop_signal(run: Run, tmp_path: Path) -> None:
    """Each ends one start of the run, in one process. A signal that nohup ignores does nothing."""
    (tmp_path / "each.py").write_text(EACH_SIGNAL)
    assert check(run(sys.executable, "each.py")).splitlines()[-1] == "all as they should"
    assert events(tmp_path / "runs/run").count("preempted") == 5
    assert events(tmp_path / "runs/run")[-1] == "finished"
    assert events(tmp_path / "hung-up")[-1] == "preempted"


def test_sighup_while_starting(mark: str, tmp_path: Path) -> None:
    """`distrib train` alone ends as under distrib launch. All signals but SIGTERM and SIGINT are handled in this
    way."""
    phased = {**CONFIG, "task": {"target": "tasks:Phased", "folder": str(tmp_path)}}
    (tmp_path / "phased.yaml").write_text(yaml.safe_dump(phased))
    running = start(mark, tmp_path, "train", "phased.yaml")
    until((tmp_path / "start-up").exists, "it does not begin")
    running.send_signal(signal.SIGHUP)
    _, said = running.communicate(timeout=60)
    assert running.returncode == 75
    assert said == "asked to stop while not training, nothing to save; start it again\n"
