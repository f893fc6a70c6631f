"""Processes that are forked instead of started: what others see of them is the same."""

import json
import os
import signal
import sys
from pathlib import Path

import psutil
import pytest
import warm
from conftest import Run, check, environment, processes_of, start, until

LOOK = """
import json, os, sys, time

there = "torch" in sys.modules
found = {"argv": sys.argv, "main": __name__, "path": sys.path[0], "parent": os.getppid(), "session": os.getsid(0)}
open(f"{os.environ['RANK']}.json", "w").write(json.dumps({**found, "pid": os.getpid(), "forked": there}))
while sys.argv[1:] == ["wait"]:
    time.sleep(0.1)
"""


@pytest.mark.parametrize("set_by_a_library", [False, True])
def test_ranks_are_forked(run: Run, tmp_path: Path, set_by_a_library: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also once a library that a test imported has set variables: torch._dynamo does, and scikit-learn."""
    if set_by_a_library:
        monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    (tmp_path / "look.py").write_text(LOOK)
    check(run("distrib", "launch", "--processes", 2, "look.py", "a"))
    for rank in range(2):
        found = json.loads((tmp_path / f"{rank}.json").read_text())
        assert found["forked"] == (sys.platform == "linux")
        assert (found["argv"], found["main"], found["path"]) == (["look.py", "a"], "__main__", str(tmp_path))
        assert found["session"] == found["pid"] != found["parent"]


def test_what_is_not_forked(run: Run, tmp_path: Path) -> None:
    (tmp_path / "look.py").write_text(LOOK)
    for fresh in ({"fresh": True}, {"OMP_NUM_THREADS": "2"}):
        check(run("distrib", "launch", "--processes", 1, "look.py", **fresh))
        assert not json.loads((tmp_path / "0.json").read_text())["forked"]


def test_first_one_is_not_forked(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The server is of use to the others all the same."""
    monkeypatch.setattr(warm, "_server", None)
    (tmp_path / "look.py").write_text(LOOK)
    usual = environment("")["PYTHONPATH"]
    for path in (f"{tmp_path}:{usual}", usual):
        check(run("distrib", "launch", "--processes", 1, "look.py", PYTHONPATH=path))
    assert json.loads((tmp_path / "0.json").read_text())["forked"] == (sys.platform == "linux")
    if warm._server is not None:
        warm._server[1].close()


@pytest.mark.skipif(sys.platform != "linux", reason="nothing is forked")
def test_in_the_process_table(mark: str, tmp_path: Path) -> None:
    """Command line, environment and parent, and that ranks end with a launcher that is killed."""
    (tmp_path / "look.py").write_text(LOOK)
    launcher = start(mark, tmp_path, "launch", "--processes", 2, "look.py", "wait", OWN="a value")
    until((tmp_path / "1.json").exists, "it does not begin")
    until(lambda: len(processes_of(mark)) == 3, "not all are found")
    one, *ranks = sorted(processes_of(mark), key=lambda process: process.pid != launcher.pid)
    assert one.ppid() == os.getpid()
    assert " ".join(one.cmdline()).strip() == f"{sys.executable} -m distrib launch --processes 2 look.py wait"
    for rank in ranks:
        assert rank.ppid() == launcher.pid
        assert " ".join(rank.cmdline()).strip() == f"{sys.executable} -m distrib.processes.exit look.py wait"
        assert {key: rank.environ().get(key) for key in ("OWN", "WORLD_SIZE")} == {"OWN": "a value", "WORLD_SIZE": "2"}
    launcher.kill()
    launcher.communicate()
    assert launcher.returncode == -signal.SIGKILL
    psutil.wait_procs(ranks, timeout=10)
    assert processes_of(mark) == []
