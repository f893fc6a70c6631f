"""Files that libraries leave in the temporary folder when their process is killed."""

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from conftest import start, steps_done, until

from distrib.errors import ConfigError
from distrib.processes.temporary import check_length

MAKES_SOCKET = """
import multiprocessing.util, signal, socket
from distrib.processes import temporary
temporary.put_worker_sockets_there()
socket.socket(socket.AF_UNIX).bind(multiprocessing.util.get_temp_dir() + "/listener-12345678")
print(temporary.folder(), flush=True)
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Make a temporary folder for started processes, with a path short enough for sockets."""
    folder = Path("/tmp") / f"t{os.getpid()}"
    folder.mkdir()
    monkeypatch.setenv("TMPDIR", str(folder))
    yield folder
    shutil.rmtree(folder)


def making_socket(more: str, **env: str) -> "subprocess.Popen[str]":
    environ = {**os.environ, **env}
    return subprocess.Popen([sys.executable, "-c", MAKES_SOCKET + more], env=environ, stdout=subprocess.PIPE, text=True)


def test_only_folders_of_dead_processes_are_removed(folder: Path) -> None:
    """The next process removes the folder of a killed one, but not that of a living one, nor other folders with a
    similar name."""
    (folder / "distrib-a notes").mkdir()
    lives, killed = making_socket("signal.pause()"), making_socket("signal.pause()")
    try:
        of_both = {Path(str(process.stdout and process.stdout.readline()).strip()) for process in (lives, killed)}
        assert {*folder.iterdir()} == {*of_both, folder / "distrib-a notes"}
        killed.kill()
        killed.communicate()
        assert {*folder.iterdir()} == {*of_both, folder / "distrib-a notes"}
        ended, _ = making_socket("").communicate(timeout=60)
        left = {*folder.iterdir()} - {folder / "distrib-a notes"}
        assert len(left) == 1
        assert left < of_both
        assert Path(ended.strip()).parent == folder  # it removed its own
    finally:
        lives.kill()
        lives.communicate()


def test_an_ending_worker_does_not_remove_the_folder(folder: Path) -> None:
    """The folder belongs to the process that made it; its forks end without removing it."""
    forks = """
import os, sys
if os.fork() == 0:
    sys.exit()
os.wait()
print(temporary.folder().exists())
"""
    said, _ = making_socket(forks).communicate(timeout=60)
    assert said.splitlines()[1] == "True"
    assert not [*folder.iterdir()]


def test_the_folder_of_a_killed_run_is_removed(folder: Path, tmp_path: Path, mark: str) -> None:
    config = {
        "name": "run",
        "task": {"target": "tasks:Masked"},
        "data": {"global_batch_size": 16, "micro_batch_size": 4, "num_workers": 1},
        "train": {"steps": 2000},
        "tracking": {"wandb": "offline"},
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(config))
    run = tmp_path / "runs" / "run"
    process = start(mark, tmp_path, "train", "run.yaml")
    until(lambda: (steps_done(run) > 5 and "wandb:" in (run / "tracking.log").read_text()) or steps_done(run) > 50, "")
    process.send_signal(signal.SIGKILL)
    process.communicate()
    left = {path.name[:8] for path in folder.iterdir()} - {"torchind"}  # Inductor's cache, one for all processes
    assert left == {"distrib-"}


@pytest.mark.parametrize(("length", "workers", "fits"), [(58, 1, True), (59, 1, False), (59, 0, True)])
def test_a_temporary_folder_with_a_long_name(
    folder: Path, monkeypatch: pytest.MonkeyPatch, length: int, workers: int, fits: bool
) -> None:
    """Linux limits socket paths. Without the check, workers would hang when they send their first batch."""
    long = str(folder / "x".ljust(length - len(str(folder)) - 1, "x"))
    os.mkdir(long)
    monkeypatch.setattr("tempfile.tempdir", long)
    if fits:
        check_length(workers)
    else:
        with pytest.raises(ConfigError, match="set TMPDIR to one of at most 58 characters"):
            check_length(workers)
    process = making_socket("", TMPDIR=long)
    process.communicate(timeout=60)
    assert (process.returncode == 0) == (length <= 58)
