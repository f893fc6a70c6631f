"""The process that runs the trackers, beside the one that trains.

It reads the run folder while the run writes it. So training does not wait for a tracker, no tracker can stop it, and
lines that a tracker has missed are logged by the same code as new ones. On each further machine such a process has
wandb sample that machine.

python -m distrib.monitor.trackers.process RUN_FOLDER START ID PARENT [HOST, of a further machine]
"""

import json
import os
import secrets
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distrib.config import TrackingConfig
from distrib.errors import DamagedFileError, WriteError
from distrib.monitor.observer import METHODS, Notifier, Observer
from distrib.monitor.run_tail import RunTail
from distrib.monitor.trackers.trackers import (
    WARNING,
    Host,
    Other,
    Wandb,
    asked_of_wandb,
    how_to_upload,
    say,
    wandb_mode,
)
from distrib.processes import temporary
from distrib.processes.lifetimes import shield, stop_signals_held
from distrib.processes.output import keep_writable
from distrib.run_folder.files import read_bytes, read_lines, write_whole
from distrib.run_folder.folder import RunDir
from distrib.run_folder.formats import EVENT

if TYPE_CHECKING:  # the process itself does not import torch
    from distrib.processes.world import World

_LAUNCHERS = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_SECONDS_TO_UPLOAD = {"finished": 60.0, "failed": 4.0, "preempted": 4.0}  # other ranks wait 5 s for one that fails
_SECONDS_ON_FURTHER_MACHINES = 1.0
_SECONDS_BETWEEN_LOOKS = 0.5


class TrackingProcess:
    """Runs on rank 0 and, for wandb, on each further machine. `lines`: what it has printed for the user."""

    def __init__(self, run: RunDir, config: TrackingConfig, world: "World", start: dict[str, Any]) -> None:
        """`start`: what an observer's on_start gets. The run folder ends where the run continues. Collective."""
        self.lines: deque[str] = deque()
        self._process: subprocess.Popen[str] | None = None
        self._run, self._gave_up = run, False
        self._first = world.is_rank_0
        run_id = world.on_rank_0(lambda: "" if asked_of_wandb(config) == "off" else self._run_id(run))
        first_of_machine = world.hosts.index(world.host) == world.rank
        if (run_id and first_of_machine) or (self._first and config.others):
            host = [] if self._first else [world.host]
            arguments = [str(run.path), json.dumps(start), run_id, str(os.getpid()), *host]
            try:
                self._start(run.path / f"{'-'.join(['tracking', *host])}.log", arguments)
            except OSError as error:
                self.lines.append(f"{WARNING}no tracking: {error}")

    def finish(self, ending: str) -> None:
        """Wait a bounded time until the trackers have the run's last event, `ending`."""
        if self._process is None:
            return
        seconds = _SECONDS_TO_UPLOAD[ending] if self._first else _SECONDS_ON_FURTHER_MACHINES
        try:
            self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            self._gave_up = True
            self._process.kill()
            upload = how_to_upload(self._run, "--include-online ")
            self.lines.append(f"{WARNING}not everything could be uploaded within {seconds:g} s; {upload}")
        self._listener.join(1.0)  # what the process has started may hold the pipe

    def _start(self, log: Path, arguments: list[str]) -> None:
        own = {k: v for k, v in os.environ.items() if k not in _LAUNCHERS and not k.startswith("ACCELERATE_")}
        own["TMPDIR"] = str(temporary.folder())
        # O_NONBLOCK: opening a FIFO would wait for its reader.
        errors = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NONBLOCK | os.O_CLOEXEC, 0o666)
        try:
            with stop_signals_held():
                self._process = subprocess.Popen(
                    [sys.executable, "-m", __name__, *arguments],
                    env=own,
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.PIPE,
                    stderr=errors,
                    text=True,
                    start_new_session=True,  # a terminal's Ctrl-C is for the ranks; this process gets an event
                )
        finally:
            os.close(errors)
        self._listener = threading.Thread(target=self._listen, args=(self._process,), daemon=True)
        self._listener.start()

    def _listen(self, process: "subprocess.Popen[str]") -> None:
        assert process.stdout is not None, "a pipe"
        self.lines.extend(line.rstrip() for line in process.stdout)
        if process.wait() and not self._gave_up:
            self.lines.append(f"{WARNING}tracking ended with exit code {process.returncode}, see tracking.log")

    def _run_id(self, run: RunDir) -> str:
        """Return the id in wandb: one for the life of the run; a sweep gives it."""
        path = run.path / "wandb" / "run-id"
        try:
            if not os.path.lexists(path):
                path.parent.mkdir(exist_ok=True)
                write_whole(path, os.environ.get("WANDB_RUN_ID") or secrets.token_hex(4))
            return read_bytes(path).decode()
        except (OSError, WriteError, DamagedFileError, UnicodeDecodeError) as error:
            self.lines.append(f"{WARNING}no wandb: {error}")
            return ""


def main() -> None:
    """Run the trackers until the run ends, or this process is killed with the one that trains."""
    keep_writable()
    path, start, run_id, parent, *host = sys.argv[1:]
    shield(int(parent))
    os.nice(19)  # training goes first
    run = RunDir(Path(path))
    notifier = Notifier(_observers(run, run_id, *host))
    for kind, line in _lines(run, json.loads(start)):
        notifier.notify(kind, line, lambda problem: say(f"{WARNING}{problem}"))


def _observers(run: RunDir, run_id: str, host: str | None = None) -> list[Observer]:
    """Make the observers of this machine. `run_id`: empty if wandb is off; `host`: the name of a further machine."""
    config = run.read_config()
    try:
        mode = wandb_mode(config.tracking) if run_id else "off"
    except Exception as error:  # credentials that cannot be right, settings that cannot be read
        say(f"{WARNING}{error}; this part of the run is kept offline")
        mode = "offline"
    if host is not None:
        return [] if mode == "off" else [Host(run, run_id, host)]
    others = [Other(run, config, name) for name in config.tracking.others]
    return [*([] if mode == "off" else [Wandb(run, config, run_id, mode)]), *others]


def _lines(run: RunDir, start: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield `start`, then the run folder's lines, old and new, until this start of the run ends.

    The starts and ends of earlier starts are left out.
    """
    tail = RunTail(run)
    starts = sum(event["event"] == "started" for event in read_lines(run.events, EVENT, []))
    yield "started", start
    while True:
        for kind, line in tail.entries():
            starts -= kind == "started"
            method = METHODS.get(kind)
            if method != "on_start" and (method != "on_end" or starts == 0):
                yield kind, line
            if method == "on_end" and starts == 0:
                return
        time.sleep(_SECONDS_BETWEEN_LOOKS)


if __name__ == "__main__":
    main()
