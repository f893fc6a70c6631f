"""The rows of docs/faults.md that no other test covers."""

import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from conftest import ROOT, Run, check, check_same, refused, start, steps_done, until

CONFIG = {
    "name": "run",
    "task": {"target": "tasks:Masked"},
    "data": {"global_batch_size": 16, "micro_batch_size": 4},
    "train": {"steps": 12},
    "checkpoint": {"every_steps": 4},
}


def write(folder: Path, **changes: object) -> Path:
    (folder / "run.yaml").write_text(yaml.safe_dump({**CONFIG, **changes}))
    return folder / "runs" / "run"


def test_a_hanging_rank_is_named_with_its_line(run: Run, tmp_path: Path) -> None:
    write(
        tmp_path,
        task={"target": "tasks:Misbehaving", "how": "sleep", "on_rank": 1},
        strategy={"timeout": 5},
    )
    result = run("distrib", "launch", "--processes", 2, "run.yaml")
    assert result.returncode == 1
    (line,) = (line for line in result.stderr.splitlines() if "has waited too long" in line)
    assert line.startswith("rank 0 of 2")
    source = (ROOT / "tests" / "distributed" / "tasks.py").read_text().splitlines()
    place = next(number for number, text in enumerate(source, 1) if "time.sleep(600)" in text)
    assert f"at tasks.py:{place} in forward: rank 1 of 2" in line
    assert "Traceback" not in result.stderr


def test_a_rank_that_runs_out_of_memory(run: Run, tmp_path: Path) -> None:
    write(tmp_path, task={"target": "tasks:Misbehaving", "how": "memory", "on_rank": 1})
    result = run("distrib", "launch", "--processes", 2, "run.yaml")
    check(result, code=1)
    assert "rank 1 of 2 on" in result.stderr
    assert "can't allocate memory: you tried to allocate 4000000000000000 bytes" in result.stderr
    assert result.stderr.count("Traceback") == 1


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """Mount a file system of 2 MB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if os.geteuid() != 0 or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", disk]).returncode != 0:
        pytest.skip("mounting a file system needs root")
    try:
        yield disk
    finally:
        subprocess.run(["umount", "--lazy", disk], check=True)


def test_a_full_disk(run: Run, tmp_path: Path, small_disk: Path) -> None:
    """The disk fills up between two saves. The run ends with an error, and resumes when there is room again."""
    write(tmp_path)
    check(run("distrib", "launch", "--processes", 2, "run.yaml"))
    path = small_disk / "run"
    shutil.copytree(tmp_path / "runs" / "run", path)
    for left in (path / "summary.json", path / "checkpoints" / "step-00000012"):
        shutil.rmtree(left) if left.is_dir() else left.unlink()
    ballast = small_disk / "ballast"
    with ballast.open("wb") as file:  # all but a few kB
        free = os.statvfs(small_disk).f_bavail * os.statvfs(small_disk).f_frsize
        file.write(b"x" * (free - 16384))
    result = run("distrib", "launch", "--processes", 2, "run.yaml", "--run-dir", path)
    check(result, code=1)
    assert "No space left on device" in result.stderr
    assert "Traceback" not in result.stderr
    assert (path / "checkpoints" / "step-00000008" / "manifest.json").exists()
    ballast.unlink()
    check(run("distrib", "launch", "--processes", 2, "run.yaml", "--run-dir", path))
    check_same(path, tmp_path / "runs" / "run")


def test_a_second_launch_into_one_folder_is_refused(mark: str, run: Run, tmp_path: Path) -> None:
    path = write(tmp_path, task={"target": "tasks:Slow"}, train={"steps": 100_000})
    first = start(mark, tmp_path, "launch", "run.yaml")
    until(lambda: steps_done(path) >= 3, "it does not begin")
    line = refused(run("distrib", "launch", "run.yaml"))
    assert line == (
        "error: runs/run: another process is training in it; wait until it ends, or choose another folder with "
        "--run-dir"
    )
    first.send_signal(signal.SIGTERM)
    first.communicate(timeout=60)
    assert first.returncode == 75
