"""`distrib submit`: a batch job that trains, saves when the scheduler stops it, and goes on when started again."""

import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

from distrib.config import Config
from distrib.errors import LaunchError, RunDirError
from distrib.plan import window_size
from distrib.processes.schedulers.base import Job, Scheduler
from distrib.run_folder.folder import RunDir
from distrib.run_folder.identity import moved_keys


def submit(
    config: Config, run_dir: Path | None, scheduler: Scheduler, job: Job, dry_run: bool, moved: Sequence[str] = ()
) -> None:
    """Write config and batch script into the run folder and hand them to the scheduler; print the job's number and its
    log.

    Raises ConfigError, LaunchError or RunDirError, and then nothing is left behind.
    """
    window_size(config, job.nodes * job.tasks_per_node)
    run = RunDir((run_dir or Path("runs") / config.name).absolute(), moved_keys(moved))
    program, arguments = f"{shlex.quote(sys.executable)} -m distrib", (str(run.config), "--run-dir", str(run.path))
    job = replace(job, program=program, arguments=arguments, folder=run.path)
    script, file, command = scheduler.script(job), run.path / scheduler.script_name, scheduler.submit_command(job)
    run.check_reserve(config)
    _check_writable(run.path)
    if dry_run:
        print(f"{script}\n# {shlex.join(command)}")
        return
    if shutil.which(command[0]) is None:
        title = scheduler.title or scheduler.name
        raise LaunchError(
            f"{command[0]}: not found, is there no {title}? distrib launch starts processes on this machine"
        )
    with _undone_on_failure(run.path, (run.config, file)):
        run.reserve(config)
        try:
            file.write_text(script)
            result = subprocess.run(command, capture_output=True, text=True)
        except OSError as error:
            raise LaunchError(f"{error.filename}: the job cannot be submitted: {error.strerror}") from None
        if result.returncode != 0:
            raise LaunchError(f"{command[0]} refused the job: {' '.join(result.stderr.split())}")
    print(scheduler.submitted(job, result.stdout))


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
