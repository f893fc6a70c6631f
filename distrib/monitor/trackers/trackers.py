"""wandb, and the trackers that accelerate knows by name. They run in a process of their own, see process.py."""

import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

from distrib.config import Config, TrackingConfig
from distrib.errors import ConfigError
from distrib.monitor.trackers.wandb_files import mend, read_offline
from distrib.plan import RunPlan
from distrib.processes.signals import SAVED
from distrib.run_folder.folder import RunDir

EXIT_CODES = {"finished": 0, "failed": 1, "preempted": SAVED}  # of the events that end a start
_SECONDS_TO_BEGIN = 30.0  # in which wandb's server must answer
_WANDB_MODES = {"disabled": "off", "offline": "offline", "dryrun": "offline"}  # for auto


class Tracker(Protocol):
    """`told`: how many steps it knows of from before."""

    name: str
    place: str  # where a user finds it, in words
    told: int

    def log(self, steps_done: int, values: dict[str, float]) -> None:
        """Numbers that belong to a step; never to one before the last."""

    def summarize(self, values: dict[str, float]) -> None:
        """Numbers of the whole run, as they stand."""

    def checkpoint(self, path: Path, step: int) -> None:
        """One was written."""

    def finish(self, ending: str) -> None:
        """By an event in EXIT_CODES. Waits until all has arrived."""


class Wandb:
    """One run of wandb's, with the same id for the life of ours."""

    name = "wandb"

    def __init__(self, run: RunDir, config: Config, run_id: str, mode: str) -> None:
        """`mode`: online or offline. Raises wandb.Error where its server does not answer."""
        import wandb

        self._wandb, tracking, sweep = wandb, config.tracking, in_sweep()
        own = wandb.setup().settings  # the user's: WANDB_PROJECT and its like, and what `wandb init` wrote
        self._keeps_checkpoints = tracking.checkpoints
        self.told = last_offline(run)
        if mode == "offline":
            wandb.teardown()  # where it could not go online, it holds the run for begun
        self._run = wandb.init(
            id=run_id,
            resume="allow",
            mode=mode,  # type: ignore[arg-type]
            dir=str(run.path),
            project=tracking.project or own.project or "distrib",
            entity=tracking.entity,
            group=tracking.group or own.run_group or (sweep and sweep[0]),
            job_type=tracking.job_type,
            name=tracking.name or own.run_name or config.name,
            notes=tracking.notes,
            tags=tracking.tags or None,
            settings=_settings(),
        )
        if mode == "online":
            self.told = max(0, self._run.starting_step - 1)
        self._run.config.update(_described(run, config), allow_val_change=True)  # type: ignore[no-untyped-call]
        self.place = str(self._run.url) if mode == "online" else f"offline, {how_to_upload(run)}"

    def log(self, steps_done: int, values: dict[str, float]) -> None:
        self._run.log(values, step=steps_done)

    def summarize(self, values: dict[str, float]) -> None:
        self._run.summary.update(values)

    def checkpoint(self, path: Path, step: int) -> None:
        if self._keeps_checkpoints:
            artifact = self._wandb.Artifact(f"checkpoint-{self._run.id}", type="model", metadata={"step": step})
            artifact.add_reference(path.resolve().as_uri(), checksum=False)  # its manifest has the checksums
            self._run.log_artifact(artifact, aliases=["latest", path.name])

    def finish(self, ending: str) -> None:
        if ending == "preempted":
            self._run.mark_preempting()
        self._run.finish(exit_code=EXIT_CODES[ending])


class Other:
    """A tracker of accelerate's, by its name. It is told what this start of the run does."""

    def __init__(self, name: str, run: RunDir, config: Config, told: int) -> None:
        from accelerate import PartialState
        from accelerate.tracking import LOGGER_TYPE_TO_CLASS

        self.name, self.place, self.told = name, str(run.path), told
        PartialState(cpu=True)  # they ask it whether they are on the main process
        kind = LOGGER_TYPE_TO_CLASS[name]
        folder = {"logging_dir": str(run.path)} if kind.requires_logging_directory else {}
        self._tracker = kind(config.tracking.name or config.name, **folder)
        self._tracker.start()
        self._tracker.store_init_configuration({key: _plain(value) for key, value in config.flat().items()})

    def log(self, steps_done: int, values: dict[str, float]) -> None:
        self._tracker.log(values, step=steps_done)

    def summarize(self, values: dict[str, float]) -> None:
        """They have no such thing."""

    def checkpoint(self, path: Path, step: int) -> None:
        """Nor this."""

    def finish(self, ending: str) -> None:
        self._tracker.finish()


def watch_machine(run: RunDir, run_id: str, host: str) -> Any:
    """A run of wandb's that holds this further machine's system metrics alone; `finish()` it."""
    import wandb

    folder = run.path / "wandb" / "hosts" / host
    folder.mkdir(parents=True, exist_ok=True)
    return wandb.init(id=f"{run_id}-{host}", mode="offline", dir=str(folder), settings=_settings())


def _settings() -> Any:
    import wandb

    return wandb.Settings(
        silent=True,
        console="off",  # what this process has is not the run's
        program="distrib",
        init_timeout=_SECONDS_TO_BEGIN,
        x_stats_pid=os.getppid(),  # the one that trains
        x_stats_track_process_tree=True,
        x_transaction_log_flush_interval=2,
    )


def asked_of_wandb(tracking: TrackingConfig) -> str:
    """Return what the config asks for; `auto` follows WANDB_MODE. Does not import wandb."""
    return _WANDB_MODES.get(os.environ.get("WANDB_MODE", ""), "auto") if tracking.wandb == "auto" else tracking.wandb


def wandb_mode(tracking: TrackingConfig) -> str:
    """Return online, offline or off; `auto` follows wandb's own settings, such as `wandb disabled` writes.

    Raises ConfigError where online is asked for and cannot be.
    """
    asked = asked_of_wandb(tracking)
    if asked in ("off", "offline"):
        return asked
    import wandb

    if asked == "auto" and (mode := _WANDB_MODES.get(wandb.setup().settings.mode)):
        return mode
    from wandb.sdk.lib import wbauth  # wandb.login() asks at terminals, and the server

    url = wandb.setup().settings.base_url
    try:
        found = wbauth.authenticate_session(host=url, source="distrib", prompt=False, update_session=False)
    except wandb.Error as error:  # there are some, but they cannot be right
        raise ConfigError(f"tracking.wandb: {error} Mend it, or take offline") from None
    if found is None and asked == "online":
        raise ConfigError(
            f"tracking.wandb: online, but no credentials are configured for {url}; run wandb login, set "
            "WANDB_API_KEY, or take auto"
        )
    return "offline" if found is None else "online"


def in_sweep() -> tuple[str, str] | None:
    """Group and name of this run, where an agent of wandb's started it."""
    sweep, run = os.environ.get("WANDB_SWEEP_ID"), os.environ.get("WANDB_RUN_ID")
    return (f"sweep-{sweep}", run) if sweep and run else None


def require_trackers(tracking: TrackingConfig) -> None:
    """Raises ConfigError where one that is asked for cannot be had."""
    if tracking.wandb == "online":
        wandb_mode(tracking)
    if tracking.others:
        from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers

        known = sorted(str(name) for name in LOGGER_TYPE_TO_CLASS if name != "wandb")
        available = [str(name) for name in get_available_trackers()]
        for name in tracking.others:
            if name not in known:
                raise ConfigError(f"tracking.others: {name!r} is no tracker that accelerate has: {', '.join(known)}")
            if name not in available:
                raise ConfigError(f"tracking.others: {name} is not installed here; install it, or leave it out")


def last_offline(run: RunDir) -> int:
    """The last step that offline folders in the run's hold; 0 where there are none. Mends what was killed."""
    folders = {file.parent for file in run.path.glob("wandb/offline-run-*/run-*.wandb")}
    for folder in folders:
        mend(folder)
    return max((int(row["_step"]) for folder in folders for row in read_offline(folder).history), default=0)


def _described(run: RunDir, config: Config) -> dict[str, Any]:
    """What wandb's config holds: ours, resolved; and where, by what and on what the run's latest start runs."""
    environment = run.read_environment()
    start = environment.pop("starts")[-1]
    environment.pop("task", None)  # names every parameter
    plan = RunPlan.create(config, start["world_size"], environment["training_samples"])
    return {**config.model_dump(mode="json"), "distrib": {**environment, **start, "plan": asdict(plan)}}


def _plain(value: Any) -> Any:
    return value if isinstance(value, bool | int | float | str) else json.dumps(value)


def how_to_upload(run: RunDir, begun_online: bool = False) -> str:
    return f"upload by: wandb sync {'--include-online ' if begun_online else ''}{run.path / 'wandb'}"
