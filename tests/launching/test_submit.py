"""The batch script that `distrib submit` renders, compared with golden ones; what it refuses."""

import sys
from pathlib import Path

import pytest
import yaml
from conftest import ROOT, Run, check, refused
from hypothesis import given
from hypothesis import strategies as st

from distrib.processes.schedulers.base import Job
from distrib.processes.schedulers.slurm import Slurm, seconds_of

GOLDEN = Path(__file__).parent / "golden"
CASES = {
    "one-node": [],
    "gpus": ["--nodes", 2, "--gpus-per-node", 8, "--time", "4:00:00", "--grace", 300, "--slurm", "partition=long"],
    "cpus": ["--nodes", 3, "--processes-per-node", 4, "--slurm", "exclusive", "--slurm", "comment=a run of mine"],
}


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "small.yaml"
    data = {"global_batch_size": 48, "micro_batch_size": 1}
    path.write_text(yaml.safe_dump({"task": {"target": "tasks:Masked"}, "data": data, "train": {"steps": 3}}))
    return path


@pytest.mark.parametrize("case", CASES)
def test_the_script(run: Run, config: Path, tmp_path: Path, case: str) -> None:
    said = check(run("distrib", "submit", config, *CASES[case], "--dry-run"))
    said = said.replace(str(tmp_path), "/home/me").replace(sys.executable, "/home/me/.venv/bin/python")
    assert said == (GOLDEN / f"{case}.txt").read_text()
    assert not (tmp_path / "runs").exists()


def test_the_template_is_what_submit_renders() -> None:
    template = (ROOT / "slurm" / "train.sbatch").read_text()
    comment = "".join(line for line in template.splitlines(keepends=True) if line.startswith(("# One run", "#   sb")))
    assert comment.count("\n") == 2
    assert template.replace(comment, "") == Slurm({}).script(Job())


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--nodes", 5], "48 micro-batches (48 / 1), which 5 processes cannot share"),
        (["--time", "3:00"], "--time: 3:00, of which --grace takes 120 s"),
        (["--time", "tomorrow"], "--time: 'tomorrow', give MINUTES, HOURS:MINUTES:SECONDS or DAYS-HOURS"),
        (["--slurm", "--partition=long"], "--slurm: '--partition=long', give an option of sbatch's without its dashes"),
        (["--slurm", "comment=a\n#SBATCH --uid=0"], "--slurm: 'comment=a\\n#SBATCH --uid=0', give"),
        (["--slurm", "array=0-3"], "--slurm: 'array=0-3', but all tasks of the array would train in one run folder"),
        (["optim.lr=fast"], "optim.lr: 'fast'"),
        (["name=a b"], "name: 'a b'"),
    ],
)
def test_what_is_refused(run: Run, config: Path, tmp_path: Path, arguments: list[object], said: str) -> None:
    assert said in refused(run("distrib", "submit", config, *arguments))
    assert not (tmp_path / "runs").exists()


def test_without_slurm(run: Run, config: Path, tmp_path: Path) -> None:
    line = refused(run("distrib", "submit", config, PATH="/nowhere"))
    assert line == "error: sbatch: not found, is there no SLURM? distrib launch starts processes on this machine"
    assert not (tmp_path / "runs").exists()


def test_a_dry_run_refuses_what_submit_refuses(run: Run, config: Path, tmp_path: Path) -> None:
    """Without a change to what is there."""
    waiting, taken = tmp_path / "waiting", tmp_path / "taken"
    check(run("distrib", "submit", config, "--run-dir", "waiting", PATH=str(sbatch(tmp_path, "echo 17"))))
    taken.mkdir()
    (taken / "thesis.tex").touch()
    before = contents(tmp_path)
    for arguments, said in (
        (["--run-dir", "waiting", "optim.lr=0.5"], f"error: {waiting}: holds a run of another config"),
        (
            ["--run-dir", "waiting", "eval.every_steps=1"],
            f"error: {waiting}: holds the config of a run that has yet to",
        ),
        (["--run-dir", "taken"], f"error: {taken}: the folder holds other files"),
        (["--run-dir", "small.yaml/run"], f"error: {config}/run: cannot write the run folder: {config} is not a dir"),
    ):
        for dry_run in ([], ["--dry-run"]):
            assert refused(run("distrib", "submit", config, *arguments, *dry_run)).startswith(said)
        assert contents(tmp_path) == before


def test_a_job_that_sbatch_refuses_leaves_nothing(run: Run, config: Path, tmp_path: Path) -> None:
    """A folder that was there is as it was, although the config may differ from its own in what decides nothing."""
    path = str(sbatch(tmp_path, "echo 17"))
    check(run("distrib", "submit", config, "--run-dir", "begun", PATH=path))
    (tmp_path / "begun" / "steps.jsonl").write_text("a line\n")
    (tmp_path / "empty").mkdir()
    sbatch(tmp_path, "echo no such partition >&2; exit 1")
    before = contents(tmp_path)
    for folder in ("begun", "empty", "new/one"):
        again = run("distrib", "submit", config, "eval.every_steps=1", "--nodes", 2, "--run-dir", folder, PATH=path)
        assert refused(again) == "error: sbatch refused the job: no such partition"
        assert contents(tmp_path) == before


def sbatch(folder: Path, does: str) -> Path:
    """The folder of an sbatch that SLURM does not answer."""
    program = folder / "bin" / "sbatch"
    program.parent.mkdir(exist_ok=True)
    program.write_text(f"#!/bin/sh\n{does}\n")
    program.chmod(0o755)
    return program.parent


def contents(folder: Path) -> dict[Path, bytes | None]:
    return {path: None if path.is_dir() else path.read_bytes() for path in folder.rglob("*")}


@given(st.integers(0, 9), st.integers(0, 23), st.integers(0, 59), st.integers(0, 59))
def test_times_are_read_as_slurm_reads_them(days: int, hours: int, minutes: int, seconds: int) -> None:
    in_day = (hours * 60 + minutes) * 60 + seconds
    assert seconds_of(f"{hours}:{minutes:02}:{seconds:02}") == in_day
    assert seconds_of(f"{days}-{hours}:{minutes:02}:{seconds:02}") == days * 86400 + in_day
    assert seconds_of(f"{days}-{hours}:{minutes:02}") == days * 86400 + in_day - seconds
    assert seconds_of(f"{days}-{hours}") == days * 86400 + hours * 3600
    assert seconds_of(f"{minutes}:{seconds:02}") == minutes * 60 + seconds
    assert seconds_of(f"{minutes}") == minutes * 60
