"""wandb, and accelerate's trackers by name: observers that run in a process of their own, see process.py."""

import json
import os
import time
from contextlib import suppress
from dataclasses import asdict
from typing import Any

from distrib.config import Config, TrackingConfig
from distrib.errors import ConfigError, RunDirError
from distrib.monitor.metrics import Metrics
from distrib.monitor.observer import Observer
from distrib.monitor.trackers.samples import add_to_tensorboard, logged_apart, media_of
from distrib.monitor.trackers.wandb_files import mend, read_offline
from distrib.plan import RunPlan
from distrib.processes.signals import SAVED
from distrib.run_folder.folder import RunDir
from distrib.run_folder.sample_files import names_of, stem

WARNING = "warning: "  # the process that trains shows a line with this beginning even with --quiet
_EXIT_CODES = {"finished": 0, "failed": 1, "preempted": SAVED}
_SECONDS_TO_BEGIN = 30.0  # timeout of wandb's server
_SECONDS_BETWEEN_HOSTS = 15.0  # wandb samples its own machine as often
_WANDB_MODES = {"disabled": "off", "offline": "offline", "dryrun": "offline"}  # for auto


class Wandb(Metrics):
    """One run in wandb, with the same id for the life of the run."""

    def __init__(self, run: RunDir, config: Config, run_id: str, mode: str) -> None:
        """`mode`: online or offline."""
        super().__init__(run)
        self._config, self._id, self._mode, self._hosts = config, run_id, mode, _Hosts(run)

    def on_start(self, start: dict[str, Any]) -> None:
        """Begin, offline if the server does not answer. Raises wandb.Error."""
        super().on_start(start)
        try:
            self._begin(self._mode)
        except Exception as error:
            if self._mode == "offline":
                raise
            import wandb

            wandb.teardown()  # or it would take the run for one that has begun
            self._begin("offline")
            say(f"{WARNING}{error}; this part of the run is kept offline, {how_to_upload(self.run)}")
        else:
            say(f"wandb: {self._run.url if self._mode == 'online' else f'offline, {how_to_upload(self.run)}'}")

    def log(self, steps_done: int, numbers: dict[str, float]) -> None:
        self._run.log({**numbers, **self._hosts.metrics()}, step=steps_done)

    def on_evaluation(self, evaluation: dict[str, Any]) -> None:
        super().on_evaluation(evaluation)
        if self.is_new and (files := names_of(self.run.samples, evaluation)):
            with logged_apart(evaluation):
                shown = {f"samples/{stem(name)}": media_of(path) for name, path in files.items()}
                self._run.log(shown, step=evaluation["step"])

    def on_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_checkpoint(checkpoint)
        path = self.run.checkpoints / f"step-{checkpoint['step']:08d}"
        if self._config.tracking.checkpoints and self.is_new and path.exists():
            import wandb

            artifact = wandb.Artifact(f"checkpoint-{self._id}", type="model", metadata={"step": checkpoint["step"]})
            artifact.add_reference(path.resolve().as_uri(), checksum=False)  # its manifest has the checksums
            self._run.log_artifact(artifact, aliases=["latest", path.name])

    def on_end(self, end: dict[str, Any]) -> None:
        """End wandb's run. Waits until the server has everything."""
        self._run.summary.update(self.summary())
        if end["event"] == "preempted":
            self._run.mark_preempting()
        self._run.finish(exit_code=_EXIT_CODES[end["event"]])

    def _begin(self, mode: str) -> None:
        import wandb

        tracking, sweep = self._config.tracking, in_sweep()
        own = wandb.setup().settings  # the user's: WANDB_PROJECT and its like, and what `wandb init` wrote
        self.logged = 0 if mode == "online" else _last_offline(self.run)
        self._run = wandb.init(
            id=self._id,
            resume="allow",
            mode=mode,  # type: ignore[arg-type]
            dir=str(self.run.path),
            project=tracking.project or own.project or "distrib",
            entity=tracking.entity,
            group=tracking.group or own.run_group or (sweep and sweep[0]),
            job_type=tracking.job_type,
            name=tracking.name or own.run_name or self._config.name,
            notes=tracking.notes,
            tags=tracking.tags or None,
            settings=_settings(),
        )
        if mode == "online":
            self.logged = max(0, self._run.starting_step - 1)
        self._run.config.update(_described(self.run, self._config), allow_val_change=True)  # type: ignore[no-untyped-call]


class _Hosts:
    """System metrics of the run's further machines, which `Host` keeps in the run folder."""

    def __init__(self, run: RunDir) -> None:
        self._folders = [run.path / "wandb" / "hosts" / host for host in run.starts()[-1]["hosts"]]
        self._next, self._began = 0.0, time.time()

    def metrics(self) -> dict[str, float]:
        """Return them as system/HOST/…; nothing if the last ones are from a moment ago."""
        if (began := time.monotonic()) < self._next:
            return {}
        values: dict[str, float] = {}
        for folder in self._folders:
            files = sorted(folder.glob("wandb/offline-run-*/run-*.wandb"))
            with suppress(OSError, RunDirError):  # another machine is writing it
                if files and files[-1].stat().st_mtime > self._began:
                    found = read_offline(files[-1].parent).system
                    values |= {f"system/{folder.name}/{key}": value for key, value in found.items()}
        took = time.monotonic() - began
        self._next = began + max(_SECONDS_BETWEEN_HOSTS if values else 0.5, 20 * took)  # the files grow
        return values


class Host(Observer):
    """A further machine, whose system metrics wandb samples into a folder of its own."""

    def __init__(self, run: RunDir, run_id: str, host: str) -> None:
        self._folder, self._id = run.path / "wandb" / "hosts" / host, f"{run_id}-{host}"

    def on_start(self, start: dict[str, Any]) -> None:
        import wandb

        self._folder.mkdir(parents=True, exist_ok=True)
        self._run = wandb.init(id=self._id, mode="offline", dir=str(self._folder), settings=_settings())

    def on_end(self, end: dict[str, Any]) -> None:
        self._run.finish()


class Other(Metrics):
    """A tracker of accelerate's, by its name. It gets the numbers of the steps that this start makes."""

    def __init__(self, run: RunDir, config: Config, name: str) -> None:
        super().__init__(run)
        self._config, self._name = config, name

    def on_start(self, start: dict[str, Any]) -> None:
        from accelerate import PartialState
        from accelerate.tracking import LOGGER_TYPE_TO_CLASS

        super().on_start(start)
        self.logged = start["step"]
        PartialState(cpu=True)  # trackers query it for the main process
        kind = LOGGER_TYPE_TO_CLASS[self._name]
        folder = {"logging_dir": str(self.run.path)} if kind.requires_logging_directory else {}
        self._tracker = kind(self._config.tracking.name or self._config.name, **folder)
        self._tracker.start()
        self._tracker.store_init_configuration({key: _plain(value) for key, value in self._config.flat().items()})

    def log(self, steps_done: int, numbers: dict[str, float]) -> None:
        self._tracker.log(numbers, step=steps_done)

    def on_evaluation(self, evaluation: dict[str, Any]) -> None:
        """Log the samples too, if the tracker is TensorBoard: accelerate has no call that suits all of them."""
        super().on_evaluation(evaluation)
        if self._name != "tensorboard" or not self.is_new:
            return
        with logged_apart(evaluation):
            for name, path in names_of(self.run.samples, evaluation).items():
                add_to_tensorboard(self._tracker.tracker, f"samples/{stem(name)}", path, evaluation["step"])

    def on_end(self, end: dict[str, Any]) -> None:
        self._tracker.finish()


def say(line: str) -> None:
    """Print a line for the process that trains, which shows it."""
    print(" ".join(line.split()), flush=True)


def wandb_mode(tracking: TrackingConfig) -> str:
    """Return online, offline or off; `auto` follows WANDB_MODE and wandb's own settings, as `wandb disabled` writes.

    Raises ConfigError if online is configured without usable credentials.
    """
    asked = asked_of_wandb(tracking)
    if asked in ("off", "offline"):
        return asked
    import wandb

    if asked == "auto" and (mode := _WANDB_MODES.get(wandb.setup().settings.mode)):
        return mode
    from wandb.sdk.lib import wbauth  # wandb.login() prompts at terminals, and calls the server

    url = wandb.setup().settings.base_url
    try:
        found = wbauth.authenticate_session(host=url, source="distrib", prompt=False, update_session=False)
    except wandb.Error as error:  # there are credentials, but of a wrong form
        raise ConfigError(f"tracking.wandb: {error} Mend it, or take offline") from None
    if found is None and asked == "online":
        raise ConfigError(
            f"tracking.wandb: online, but no credentials are configured for {url}; run wandb login, set "
            "WANDB_API_KEY, or take auto"
        )
    return "offline" if found is None else "online"


def asked_of_wandb(tracking: TrackingConfig) -> str:
    """Return what config and WANDB_MODE ask for, which may be auto. Does not import wandb."""
    return _WANDB_MODES.get(os.environ.get("WANDB_MODE", ""), "auto") if tracking.wandb == "auto" else tracking.wandb


def in_sweep() -> tuple[str, str] | None:
    """Return group and name of this run if an agent of a wandb sweep started it."""
    sweep, run = os.environ.get("WANDB_SWEEP_ID"), os.environ.get("WANDB_RUN_ID")
    return (f"sweep-{sweep}", run) if sweep and run else None


def require_trackers(tracking: TrackingConfig) -> None:
    """Raise ConfigError if a configured tracker cannot be used here."""
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


def how_to_upload(run: RunDir, option: str = "") -> str:
    return f"upload by: wandb sync {option}{run.path / 'wandb'}"


def _settings() -> Any:
    import wandb

    return wandb.Settings(
        silent=True,
        console="off",  # the output of this process is not the run's
        program="distrib",
        init_timeout=_SECONDS_TO_BEGIN,
        x_stats_pid=os.getppid(),  # the process that trains
        x_stats_track_process_tree=True,
        x_transaction_log_flush_interval=2,
    )


def _last_offline(run: RunDir) -> int:
    """Return the last step in the run's offline folders, 0 if there is none. Mends what a killed start left."""
    folders = {file.parent for file in run.path.glob("wandb/offline-run-*/run-*.wandb")}
    for folder in folders:
        mend(folder)
    return max((int(row["_step"]) for folder in folders for row in read_offline(folder).history), default=0)


def _described(run: RunDir, config: Config) -> dict[str, Any]:
    """Return the content of wandb's config: ours, resolved, and under `distrib` the run's latest start."""
    environment = run.read_environment()
    start = environment.pop("starts")[-1]
    environment.pop("task", None)  # lists every parameter
    plan = RunPlan.create(config, start["world_size"], environment["training_samples"])
    return {**config.model_dump(mode="json"), "distrib": {**environment, **start, "plan": asdict(plan)}}


def _plain(value: Any) -> Any:
    return value if isinstance(value, bool | int | float | str) else json.dumps(value)
