"""The process that tells trackers of a run, beside the one that trains.

It reads the run folder as the run writes it, so that training waits for no tracker and none can stop it, and what a
tracker missed is told by the same code. Of several machines, each other one has such a process too, which has wandb
watch the machine; the first tells what it finds.

python -m distrib.monitor.trackers.process RUN_FOLDER ID FIRST_STEP PARENT [HOST, of a further machine]
"""

import os
import secrets
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from distrib.config import Config, TrackingConfig
from distrib.errors import DamagedFileError, RunDirError
from distrib.monitor.metrics import Metrics
from distrib.monitor.run_tail import RunTail
from distrib.monitor.trackers.trackers import (
    EXIT_CODES,
    Other,
    Tracker,
    Wandb,
    asked_of_wandb,
    how_to_upload,
    wandb_mode,
    watch_machine,
)
from distrib.monitor.trackers.wandb_files import read_offline
from distrib.processes import temporary
from distrib.processes.lifetimes import shield, stop_signals_held
from distrib.processes.output import keep_writable
from distrib.run_folder.files import read_bytes, read_lines
from distrib.run_folder.folder import RunDir
from distrib.run_folder.formats import EVENT

if TYPE_CHECKING:  # the process itself need not wait for torch
    from distrib.processes.world import World

WARNING = "warning: "  # so begins what the process that trains is to show in any case
_LAUNCHERS = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_SECONDS_TO_UPLOAD = {"finished": 60.0, "failed": 3.0, "preempted": 3.0}  # who else fails, waits 5 s for rank 0
_SECONDS_MORE = 1.0
_SECONDS_BETWEEN_LOOKS = 0.5
_SECONDS_BETWEEN_MACHINES = 15.0  # looks at the further ones; as often as wandb looks at its own


class TrackingProcess:
    """One on rank 0, and, for wandb, one on each other machine. Start it when the run folder is as the run goes on."""

    def __init__(self, run: RunDir, config: TrackingConfig, world: "World", first_step: int) -> None:
        self.lines: deque[str] = deque()  # that it has said, for the user
        self._process: subprocess.Popen[str] | None = None
        run_id = world.on_rank_0(lambda: "" if asked_of_wandb(config) == "off" else self._run_id(run))
        self._first = world.is_rank_0
        if run_id and world.hosts.index(world.host) == world.rank:  # the first of its machine
            self._start(run, run_id, str(first_step), str(os.getpid()), *([] if self._first else [world.host]))
        elif self._first and config.others:
            self._start(run, "", str(first_step), str(os.getpid()))

    def _start(self, run: RunDir, *arguments: str) -> None:
        # In a session of its own: a Ctrl-C in the terminal is for those who train, which tell it by an event.
        name = "tracking.log" if self._first else f"tracking-{arguments[-1]}.log"
        own = {k: v for k, v in os.environ.items() if k not in _LAUNCHERS and not k.startswith("ACCELERATE_")}
        own["TMPDIR"] = str(temporary.folder())
        kept = run.path / name
        if os.path.lexists(kept) and not kept.is_file():  # to open a FIFO would wait
            self.lines.append(f"{WARNING}no tracking: {kept}: not a regular file")
            return
        try:
            with kept.open("ab") as log, stop_signals_held():
                self._process = subprocess.Popen(
                    [sys.executable, "-m", __name__, str(run.path), *arguments],
                    env=own,
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.PIPE,
                    stderr=log,
                    text=True,
                    start_new_session=True,
                )
        except OSError as error:
            self.lines.append(f"{WARNING}no tracking: {error}")
            return
        self._listener = threading.Thread(target=self._listen, args=(self._process,), daemon=True)
        self._listener.start()

    def finish(self, ending: str) -> None:
        """After the event that ends the run: wait until it has told all, a bounded time."""
        if self._process is None:
            return
        try:
            self._process.wait(_SECONDS_TO_UPLOAD[ending] + _SECONDS_MORE if self._first else _SECONDS_MORE)
        except subprocess.TimeoutExpired:
            self._process.kill()
        self._listener.join(_SECONDS_MORE)  # until all that it said is heard

    def _listen(self, process: "subprocess.Popen[str]") -> None:
        assert process.stdout is not None, "a pipe"
        self.lines.extend(line.rstrip() for line in process.stdout)
        if process.wait():
            self.lines.append(f"{WARNING}tracking ended with exit code {process.returncode}, see tracking.log")

    def _run_id(self, run: RunDir) -> str:
        """wandb's, for the life of the run. A sweep gives one."""
        path = run.path / "wandb" / "run-id"
        try:
            if not path.exists():
                path.parent.mkdir(exist_ok=True)
                new = path.with_suffix(".partial")
                new.write_text(os.environ.get("WANDB_RUN_ID") or secrets.token_hex(4))
                new.replace(path)
            return read_bytes(path).decode()
        except (OSError, DamagedFileError, UnicodeDecodeError) as error:
            self.lines.append(f"{WARNING}no wandb: {error}")
            return ""


def track(run: RunDir, trackers: list[Tracker], metrics: Metrics) -> None:
    """Tell them what the run folder holds and gets, until the run's latest start ends."""
    follower, machines, steps_done = RunTail(run), Machines(run), 0
    starts = sum(event["event"] == "started" for event in read_lines(run.events, EVENT, run.trouble))
    while True:
        for kind, entry in follower.entries():
            starts -= kind == "started"
            now = starts == 0
            steps_done, values = metrics.of(kind, entry)
            if now and kind in EXIT_CODES:
                _give_up_after(_SECONDS_TO_UPLOAD[kind], run)
            for tracker in list(trackers):
                with _or_told_no_more(tracker, trackers):
                    if values and steps_done > tracker.told:
                        tracker.log(steps_done, values)
                    if now and kind == "checkpoint":
                        tracker.checkpoint(run.checkpoints / f"step-{entry['step']:08d}", entry["step"])
                    if now and kind in EXIT_CODES:
                        tracker.summarize(metrics.summary())
                        tracker.finish(kind)
            if now and kind in EXIT_CODES:
                return
        found = machines.metrics() if trackers else {}
        for tracker in list(trackers):
            with _or_told_no_more(tracker, trackers):
                if found and steps_done > tracker.told:
                    tracker.log(steps_done, found)
        time.sleep(_SECONDS_BETWEEN_LOOKS)


def _give_up_after(seconds: float, run: RunDir) -> None:
    def give_up() -> None:
        say(f"{WARNING}not everything could be uploaded within {seconds:g} s; {how_to_upload(run, begun_online=True)}")
        os._exit(0)

    timer = threading.Timer(seconds, give_up)
    timer.daemon = True
    timer.start()


@contextmanager
def _or_told_no_more(tracker: Tracker, trackers: list[Tracker]) -> Iterator[None]:
    """Where a tracker fails: the run folder keeps everything, and the others are told."""
    try:
        yield
    except Exception as error:
        trackers.remove(tracker)
        say(f"{WARNING}{tracker.name} failed and is told no more: {type(error).__name__}: {error}")


class Machines:
    """System metrics of the further machines, as wandb keeps them there."""

    def __init__(self, run: RunDir) -> None:
        self._folders = [run.path / "wandb" / "hosts" / host for host in run.starts()[-1]["hosts"]]
        self._next, self._began = 0.0, time.time()

    def metrics(self) -> dict[str, float]:
        """system/HOST/…, if it is time to look."""
        if time.monotonic() < self._next:
            return {}
        began = time.monotonic()
        values: dict[str, float] = {}
        for folder in self._folders:
            files = sorted(folder.glob("wandb/offline-run-*/run-*.wandb"))
            with suppress(OSError, RunDirError):  # it is being written, elsewhere
                if files and files[-1].stat().st_mtime > self._began:
                    found = read_offline(files[-1].parent).system
                    values |= {f"system/{folder.name}/{key}": value for key, value in found.items()}
        if values:
            took = time.monotonic() - began
            self._next = began + max(_SECONDS_BETWEEN_MACHINES, 20 * took)  # the files grow
        return values


def say(line: str) -> None:
    """To the process that trains, which shows it."""
    print(" ".join(line.split()), flush=True)


def main() -> None:
    keep_writable()
    path, run_id, first_step, parent, *host = sys.argv[1:]
    shield(int(parent))
    os.nice(19)  # training goes first
    run = RunDir(Path(path))
    if host and wandb_mode(run.read_config().tracking) == "off":
        return
    if host:
        watching = watch_machine(run, run_id, host[0])
        track(run, [], Metrics(run.read_config(), {}))
        watching.finish()
        return
    track(run, _trackers(run, run_id, int(first_step)), Metrics(run.read_config(), run.starts()[-1]))


def _trackers(run: RunDir, run_id: str, first_step: int) -> list[Tracker]:
    """Those that can be had; what cannot is said."""
    config = run.read_config()
    trackers: list[Tracker] = []

    if run_id and (wandb := _wandb(run, config, run_id)) is not None:
        trackers.append(wandb)
        say(f"wandb: {wandb.place}")
    for name in config.tracking.others:
        try:
            trackers.append(Other(name, run, config, first_step))
        except Exception as error:
            say(f"{WARNING}{error}; {name} is not told")
    return trackers


def _wandb(run: RunDir, config: Config, run_id: str) -> Wandb | None:
    """Begin wandb's run: offline if it cannot be online, and None if it is switched off or cannot be begun at all."""
    try:
        mode = wandb_mode(config.tracking)
        return None if mode == "off" else Wandb(run, config, run_id, mode)
    except Exception as error:
        problem = error
    try:
        offline = Wandb(run, config, run_id, "offline")
    except Exception as error:
        say(f"{WARNING}{error}; wandb is not told")
        return None
    say(f"{WARNING}{problem}; this part of the run is kept offline, {how_to_upload(run)}")
    return offline


if __name__ == "__main__":
    main()
