"""`distrib watch`: a run as its own display shows it, from its folder."""

import json
import math
import time
from pathlib import Path
from typing import Any

from distrib.plan import RunPlan
from distrib.reporting.following import Follower
from distrib.reporting.progress import ProgressDisplay, format_summary
from distrib.state.run_dir import RunDir

_SECONDS_BETWEEN_LOOKS = 0.2
_SECONDS_TO_COME_BACK = 30.0  # of a run that was being trained a moment ago, and may just be started again


def watch_run(path: Path) -> None:
    """Returns when the run is finished, or nobody trains it any more; one that waits in a queue is waited for.

    Raises RunDirError, ConfigError.
    """
    run = RunDir(path)
    config = run.read_config()
    if not run.environment.exists():
        print(f"{path} has not begun yet", flush=True)
    while not run.environment.exists():
        time.sleep(_SECONDS_BETWEEN_LOOKS)
    plan = RunPlan.create(config, run.starts()[-1]["world_size"], run.num_samples())
    display, follower = ProgressDisplay(config.name, plan.num_steps, plan.global_batch_size), Follower(run)
    in_queue, held_at = False, -math.inf
    with display:
        while in_queue or time.monotonic() - held_at < _SECONDS_TO_COME_BACK or held_at < 0:
            if run.held():
                held_at = time.monotonic()
            finished = run.summary.exists()
            for kind, entry in follower.news():
                _show(display, kind, entry)
                in_queue = kind == "preempted" and entry["requeue"]
            if finished or (held_at < 0 and not in_queue):
                break
            time.sleep(_SECONDS_BETWEEN_LOOKS)
        display.flush()
    if run.summary.exists():
        print(format_summary(path, json.loads(run.summary.read_text()), "finished"))
    else:
        print(f"{path}: nobody trains it now, as far as can be seen from here; start it again to go on")


def _show(display: ProgressDisplay, kind: str, entry: dict[str, Any]) -> None:
    if kind == "step":
        display.step(entry)
    elif kind == "evaluation":
        display.evaluation(entry)
    elif kind == "started":
        display.say(f"started on {entry['world_size']} process(es), {entry['strategy']}, by {entry['launcher']}")
    elif kind == "preempted":
        display.say(f"asked to stop; saved after step {entry['step']}")
    elif kind == "failed":
        display.say(f"failed: {entry['error']}")
    else:
        display.event(entry)
