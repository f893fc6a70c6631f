"""environment.json records the code of each start: the git commit, uncommitted changes, and the task's file."""

import hashlib
import json
import subprocess
from pathlib import Path

import pytest
import tasks
from tasks import Masked

from distrib import Config, Trainer
from distrib.run_folder.environment import identity


def git(*arguments: str) -> bytes:
    options = ["-c", "user.name=a", "-c", "user.email=a@example.com"]
    return subprocess.run(["git", *options, *arguments], check=True, capture_output=True).stdout


def test_the_commit_and_uncommitted_changes_are_recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert identity(None) == {"git_commit": None, "uncommitted": None, "task": None}
    git("init")
    assert identity(None) == {"git_commit": None, "uncommitted": None, "task": None}  # no commit yet
    (tmp_path / "file").write_text("one")
    git("add", ".")
    git("commit", "--message", "one")
    clean = identity(None)
    assert clean == {"git_commit": git("rev-parse", "HEAD").decode().strip(), "uncommitted": None, "task": None}
    (tmp_path / "file").write_text("two")
    expected = hashlib.sha256(git("diff", "--binary", "HEAD")).hexdigest()
    assert identity(None) == {**clean, "uncommitted": expected}
    git("add", ".")
    assert identity(None)["uncommitted"] == expected


def test_the_digest_of_the_tasks_file() -> None:
    assert identity(Masked())["task"] == hashlib.sha256(Path(tasks.__file__).read_bytes()).hexdigest()
    typed = type("Typed", (Masked,), {"__module__": "nowhere"})  # as in an interactive session
    assert identity(typed())["task"] is None


def test_each_start_records_its_code(tmp_path: Path) -> None:
    Trainer(Masked(), Config.from_dict({"train": {"steps": 1}}), tmp_path / "run").fit()
    environment = json.loads((tmp_path / "run" / "environment.json").read_text())
    assert environment["starts"][0]["code"] == identity(Masked())
    assert environment["git_commit"] == environment["starts"][0]["code"]["git_commit"]
