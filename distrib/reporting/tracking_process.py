"""The process that tells trackers of a run, beside the one that trains.

It reads the run folder as the run writes it, so that training waits for no tracker and none can stop it, and what a
tracker missed is told by the same code. Of several machines, each other one has such a process too, which has wandb
watch the machine; the first tells what it finds.

python -m distrib.reporting.tracking_process RUN_FOLDER ID FIRST_STEP [HOST, of a further machine]
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
from typing import TYPE_CHECKING, TextIO

from distrib.config import TrackingConfig
from distrib.processes import shield
from distrib.reporting.following import Follower
from distrib.reporting.metrics import Metrics
from distrib.reporting.tracking import EXIT_CODES, Other, Tracker, Wandb, how_to_upload, wandb_mode, watch_machine
from distrib.reporting.wandb_files import read_offline
from distrib.state.ledger import whole_lines
from distrib.state.run_dir import RunDir

if TYPE_CHECKING:  # the process itself need not wait for torch
    from distrib.world import World

_LAUNCHERS = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_SECONDS_TO_UPLOAD = {"finished": 60.0, "failed": 10.0, "preempted": 5.0}
_SECONDS_MORE = 5.0
_SECONDS_BETWEEN_LOOKS = 0.5
_SECONDS_BETWEEN_MACHINES = 15.0  # looks at the further ones; as often as wandb looks at its own


class TrackingProcess:
    """One on rank 0, and, for wandb, one on each other machine. Start it when the run folder is as the run goes on."""

    def __init__(self, run: RunDir, config: TrackingConfig, world: "World", first_step: int) -> None:
        self.lines: deque[str] = deque()  # that it has said, for the user
        self._process: subprocess.Popen[str] | None = None
        off = config.wandb == "off" or (config.wandb == "auto" and os.environ.get("WANDB_MODE") == "disabled")
        run_id = world.on_rank_0(lambda: "" if off else _run_id(run))
        first_of_its_host = world.hosts.index(world.host) == world.rank
        if not (first_of_its_host if run_id else world.is_rank_0 and config.others):
            return
        host = [] if world.is_rank_0 else [world.host]
        log = run.path / ("tracking.log" if world.is_rank_0 else f"tracking-{world.host}.log")
        # Started in a session of its own: a Ctrl-C in the terminal is for those who train, which tell it by an event.
        with log.open("ab") as errors:
            self._process = subprocess.Popen(
                [sys.executable, "-m", __name__, str(run.path), run_id, str(first_step), *host],
                env={k: v for k, v in os.environ.items() if k not in _LAUNCHERS and not k.startswith("ACCELERATE_")},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                start_new_session=True,
            )
        assert self._process.stdout is not None, "a pipe"
        self._listener = threading.Thread(target=self._listen, args=(self._process.stdout,), daemon=True)
        self._listener.start()

    def finish(self, ending: str) -> None:
        """After the event that ends the run: wait until it has told all, a bounded time."""
        if self._process is None:
            return
        try:
            self._process.wait(_SECONDS_TO_UPLOAD[ending] + _SECONDS_MORE)
        except subprocess.TimeoutExpired:
            self.lines.append("the tracking process does not end, and is killed; the run folder has everything")
            self._process.kill()
            self._process.wait()
        self._listener.join(_SECONDS_MORE)  # until all that it said is heard

    def _listen(self, said: TextIO) -> None:
        with suppress(ValueError):  # closed
            self.lines.extend(line.rstrip() for line in said)


def _run_id(run: RunDir) -> str:
    """wandb's, for the life of the run. A sweep gives one."""
    path = run.path / "wandb" / "run-id"
    if not path.exists():
        path.parent.mkdir(exist_ok=True)
        path.write_text(os.environ.get("WANDB_RUN_ID") or secrets.token_hex(4))
    return path.read_text()


def track(run: RunDir, trackers: list[Tracker], metrics: Metrics) -> None:
    """Tell them what the run folder holds and gets, until the run's latest start ends."""
    follower, machines, steps_done = Follower(run), Machines(run), 0
    starts = sum(event["event"] == "started" for event in whole_lines(run.events))
    while True:
        for kind, entry in follower.news():
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
        say(f"not everything could be uploaded within {seconds:g} s; {how_to_upload(run)}")
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
        say(f"{tracker.name} failed and is told no more: {type(error).__name__}: {error}")


class Machines:
    """System metrics of the further machines, as wandb keeps them there."""

    def __init__(self, run: RunDir) -> None:
        self._folder = run.path / "wandb" / "hosts"
        self._next = 0.0

    def metrics(self) -> dict[str, float]:
        """system/HOST/…, if it is time to look."""
        if not self._folder.exists() or time.monotonic() < self._next:
            return {}
        began = time.monotonic()
        values: dict[str, float] = {}
        for host in self._folder.iterdir():
            if files := sorted(host.glob("wandb/offline-run-*/run-*.wandb")):
                found = read_offline(files[-1].parent).system
                values |= {f"system/{host.name}/{key}": value for key, value in found.items()}
        if values:
            took = time.monotonic() - began
            self._next = began + max(_SECONDS_BETWEEN_MACHINES, 20 * took)  # the files grow
        return values


def say(line: str) -> None:
    """To the process that trains, which shows it."""
    print(" ".join(line.split()), flush=True)


def main() -> None:
    shield()
    os.nice(19)  # training goes first
    path, run_id, first_step, *host = sys.argv[1:]
    run = RunDir(Path(path))
    if host:
        watching = watch_machine(run, run_id, host[0])
        track(run, [], Metrics(run.read_config(), {}))
        watching.finish()
        return
    config = run.read_config()
    trackers: list[Tracker] = []
    try:
        if (mode := wandb_mode(config.tracking)) != "off":
            wandb = Wandb(run, config, run_id, mode)
            trackers.append(wandb)
            say(f"wandb: {wandb.place}")
    except Exception as error:
        say(f"wandb: {error}; this part of the run is kept offline, {how_to_upload(run)}")
        trackers.append(Wandb(run, config, run_id, "offline"))
    trackers += [Other(name, run, config, int(first_step)) for name in config.tracking.others]
    track(run, trackers, Metrics(config, run.starts()[-1]))


if __name__ == "__main__":
    main()
