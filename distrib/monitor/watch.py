"""`distrib watch`: shows a run as its own display does, from its folder."""

import math
import os
import time
from contextlib import closing
from pathlib import Path
from typing import Any

from distrib.config import Config
from distrib.errors import DamagedFileError
from distrib.monitor.observer import pass_on
from distrib.monitor.progress import ProgressDisplay, format_summary
from distrib.monitor.run_tail import RunTail
from distrib.plan import RunPlan
from distrib.run_folder.folder import RunDir
from distrib.run_folder.formats import STEP
from distrib.run_folder.ledger import last_line

_SECONDS_BETWEEN_LOOKS = 0.2
_SECONDS_TO_COME_BACK = 30.0  # a run that was being trained a moment ago may just be started again


class _Display(ProgressDisplay):
    """The display of a run that may have several starts: shows each start and end too."""

    def __init__(self, run: RunDir, config: Config) -> None:
        super().__init__()
        num_steps, batch_size = _length(run, config)
        super().on_start({"step": 0, "name": config.name, "num_steps": num_steps, "global_batch_size": batch_size})

    def on_start(self, start: dict[str, Any]) -> None:
        self.say(f"started on {start['world_size']} process(es), {start['strategy']}, by {start['launcher']}")

    def on_end(self, end: dict[str, Any]) -> None:
        if end["event"] == "preempted":
            self.say(f"asked to stop; saved after step {end['step']}")
        elif end["event"] == "failed":
            self.say(f"failed: {end['error']}")


def watch_run(path: Path) -> None:
    """Show a run until it is finished or no process trains it. A run that waits in a queue is waited for.

    Raises RunDirError, ConfigError.
    """
    run = RunDir(path)
    config = run.read_config()
    if not _is_there(run):
        print(f"{path} has not begun yet", flush=True)
    while not _is_there(run):
        time.sleep(_SECONDS_BETWEEN_LOOKS)
    display, follower = _Display(run, config), RunTail(run)
    in_queue, held_at = False, -math.inf
    with closing(display):
        while in_queue or time.monotonic() - held_at < _SECONDS_TO_COME_BACK or held_at < 0:
            if run.held():
                held_at = time.monotonic()
            finished = os.path.lexists(run.summary)
            for kind, entry in follower.entries():
                pass_on(display, kind, entry)
                if kind != "warning":  # a warning may follow the last event
                    in_queue = kind == "preempted" and entry.get("requeue", False)
            if finished or (held_at < 0 and not in_queue):
                break
            time.sleep(_SECONDS_BETWEEN_LOOKS)
        for kind, entry in follower.rest():
            pass_on(display, kind, entry)
        display.flush()
    summary = None
    try:
        summary = run.read_summary()
    except DamagedFileError as error:
        run.report(str(error))
    for line in [*run.take_trouble(), *follower.trouble()]:
        print(f"warning: {line}")
    if summary is not None:
        print(format_summary(path, summary, "finished"))
    else:
        print(f"{path}: nobody trains it now, as far as can be seen from here; start it again to go on")


def _is_there(run: RunDir) -> bool:
    """Return whether the run was started: environment.json is there or, if that is lost, a step or a checkpoint."""
    return os.path.lexists(run.environment) or run.has_begun()


def _length(run: RunDir, config: Config) -> tuple[int, int]:
    """Return the steps of the run and the samples of a step."""
    environment = run.environment_or_nothing()
    if environment:
        plan = RunPlan.create(config, environment["starts"][-1]["world_size"], environment["training_samples"])
        return plan.num_steps, plan.global_batch_size
    last = last_line(run.steps, STEP)  # the number of training samples is lost
    return config.train.steps or (last["step"] + 1 if last else 0), config.data.global_batch_size
