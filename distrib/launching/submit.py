"""`distrib submit`: a batch job that trains, saves when SLURM stops it, and goes on when SLURM starts it again."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path

from distrib.config import Config
from distrib.errors import LaunchError, RunDirError
from distrib.plan import window_size
from distrib.run_folder.folder import RunDir
from distrib.run_folder.identity import moved_keys

SCRIPT = """\
#!/bin/bash
{comment}{options}

# From being asked to stop to being killed, in seconds; --signal says the same.
export DISTRIB_GRACE={grace}
# Who joins must know this secret of the job, which srun hands to its tasks.
export DISTRIB_RENDEZVOUS_KEY=$(od -An -N16 -tx1 /dev/urandom | tr -d ' \\n')
# One task for each device, with what is exported here. When one fails, the others are ended too.
exec srun --export=ALL --kill-on-bad-exit=1 ${{SLURM_CPUS_PER_TASK:+--cpus-per-task=$SLURM_CPUS_PER_TASK}} \\
    {program} train "$@"
"""


@dataclass(frozen=True)
class Job:
    """What is asked of SLURM. `further`: options of sbatch's, NAME=VALUE or NAME."""

    name: str = "distrib"
    nodes: int = 1
    gpus_per_node: int = 0
    processes_per_node: int | None = None  # one for each GPU, else 1
    time: str | None = None
    grace: int = 120  # seconds
    log: str = "slurm-%j.log"
    further: tuple[str, ...] = ()

    @property
    def tasks_per_node(self) -> int:
        return self.processes_per_node or self.gpus_per_node or 1

    def check(self) -> None:
        """Raises LaunchError."""
        if self.time is not None and seconds_of(self.time) <= self.grace + 60:
            raise LaunchError(
                f"--time: {self.time}, of which --grace takes {self.grace} s and SLURM's clock up to 60 s, so that the "
                "job would be stopped as soon as it begins; give more, or less grace"
            )
        for option in self.further:
            if not re.fullmatch(r"[a-z][a-z-]*(=[^\n\"']*)?", option):
                raise LaunchError(f"--slurm: {option!r}, give an option of sbatch's without its dashes: partition=long")
            if option.partition("=")[0] == "array":
                raise LaunchError(
                    f"--slurm: {option!r}, but all tasks of the array would train in one run folder; submit an array "
                    "of runs by sbatch --array=… slurm/sweep.sbatch"
                )

    def script(self, program: str, comment: str = "") -> str:
        """The batch script. It takes what `distrib train` takes."""
        options = {
            "job-name": self.name,
            "nodes": self.nodes,
            "ntasks-per-node": self.tasks_per_node,
            "gpus-per-node": self.gpus_per_node or None,
            "time": self.time,
            "signal": f"USR1@{self.grace}",
            "requeue": "",
            "open-mode": "append",
            "output": self.log,
        }
        lines = [f"{name}={value}" if value != "" else name for name, value in options.items() if value is not None]
        return SCRIPT.format(
            comment=comment,
            options="\n".join(f"#SBATCH --{_quoted(line)}" for line in [*lines, *self.further]),
            grace=self.grace,
            program=program,
        )


def submit(config: Config, run_dir: Path | None, job: Job, dry_run: bool, moved: Sequence[str] = ()) -> None:
    """Write config and batch script into the run folder and hand them to SLURM; print the job's number and its log.

    Raises ConfigError, LaunchError or RunDirError, and then nothing is left behind.
    """
    job.check()
    window_size(config, job.nodes * job.tasks_per_node)
    run = RunDir((run_dir or Path("runs") / config.name).absolute(), moved_keys(moved))
    log = str(run.path / "slurm-%j.log")
    if "\n" in log or '"' in log:
        raise LaunchError(f"--run-dir: {run.path}: SLURM cannot write a log there; choose a simpler name")
    job = replace(job, log=log)
    script, file = job.script(f"{shlex.quote(sys.executable)} -m distrib"), run.path / "job.sbatch"
    command = ["sbatch", "--parsable", str(file), str(run.config), "--run-dir", str(run.path)]
    run.check_reserve(config)
    _check_writable(run.path)
    if dry_run:
        print(f"{script}\n# {shlex.join(command)}")
        return
    if shutil.which("sbatch") is None:
        raise LaunchError("sbatch: not found, is there no SLURM? distrib launch starts processes on this machine")
    with _undone_on_failure(run.path, (run.config, file)):
        run.reserve(config)
        try:
            file.write_text(script)
            result = subprocess.run(command, capture_output=True, text=True)
        except OSError as error:
            raise LaunchError(f"{error.filename}: the job cannot be submitted: {error.strerror}") from None
        if result.returncode != 0:
            raise LaunchError(f"sbatch refused the job: {' '.join(result.stderr.split())}")
    number = result.stdout.strip().partition(";")[0]
    print(f"job {number}, its log: {log.replace('%j', number)}")


def _check_writable(folder: Path) -> None:
    """Raises RunDirError if a run folder cannot be made there."""
    there = next(path for path in (folder, *folder.parents) if path.exists())
    if not there.is_dir():
        raise RunDirError(f"{folder}: cannot write the run folder: {there} is not a directory")
    if not os.access(there, os.W_OK | os.X_OK):
        raise RunDirError(f"{folder}: cannot write the run folder: no permission to write into {there}")


@contextmanager
def _undone_on_failure(folder: Path, files: Sequence[Path]) -> Iterator[None]:
    """If anything is raised within, leave the files in the folder, and the folders, as they were before."""
    before = {file: file.read_bytes() if file.exists() else None for file in files}
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        yield
    except BaseException:
        for file, content in before.items():
            with suppress(OSError):
                if content is None:
                    file.unlink()
                elif file.read_bytes() != content:
                    file.write_bytes(content)
        for path in made:
            with suppress(OSError):
                path.rmdir()
        raise


def seconds_of(time: str) -> int:
    """Of a time as SLURM reads it: MINUTES[:SECONDS], HOURS:MINUTES:SECONDS, DAYS-HOURS[:MINUTES[:SECONDS]].

    Raises LaunchError.
    """
    if not re.fullmatch(r"\d+(:\d+){0,2}|\d+-\d+(:\d+){0,2}", time):
        raise LaunchError(f"--time: {time!r}, give MINUTES, HOURS:MINUTES:SECONDS or DAYS-HOURS")
    days, dash, rest = time.rpartition("-")
    parts = [int(part) for part in rest.split(":")]
    if not dash and len(parts) < 3:  # no hours
        parts = [0, *parts]
    hours, minutes, seconds = (*parts, 0, 0)[:3]
    return ((int(days or 0) * 24 + hours) * 60 + minutes) * 60 + seconds


def _quoted(option: str) -> str:
    name, equals, value = option.partition("=")
    return f'{name}{equals}"{value}"' if re.search(r"[\s#]", value) else option
