"""The run folder: everything a run leaves, in files that other software can read."""

import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

from distrib.config import Config
from distrib.errors import ConfigError, DamagedFileError, RunDirError, WriteError
from distrib.run_folder import formats, ledger, repair
from distrib.run_folder.files import append_line, parse, read_bytes, read_json, to_text, write_whole, writing
from distrib.run_folder.ledger import now, to_json
from distrib.run_folder.lock import LOCK, Lock
from distrib.run_folder.manifest import files_saved, steps_of

T = TypeVar("T")

_LEFT_BY_A_START = (LOCK, ".config.yaml.partial", ".environment.json.partial")  # that failed, or was killed
_FOR_EVERY_START = ("forked_from", "lost_steps")  # of environment.json


class RunDir:
    """Paths and small files of one run. Only rank 0 writes."""

    def __init__(self, path: Path, moved: Sequence[str] = ()) -> None:
        self.path = path
        self.moved = moved  # keys of the config that may differ from the run's, if the data's fingerprint does not
        self.config = path / "config.yaml"
        self.environment = path / "environment.json"
        self.steps = path / "steps.jsonl"
        self.evals = path / "evals.jsonl"
        self.events = path / "events.jsonl"
        self.checkpoints = path / "checkpoints"
        self.compiled = path / "compiled"  # torch.compile's
        self.summary = path / "summary.json"
        self.curves = path / "curves.png"
        self.trouble: list[str] = []  # what was found damaged, and what was done about it: a line each
        self.started: dict[str, Any] = {}  # the event, of this start
        self._lock = Lock(path / LOCK)
        self._written: dict[str, str] = {}  # config and environment, by the names of their files

    def start(
        self, config: Config, environment: dict[str, Any], resume: str = "auto", origin: dict[str, Any] | None = None
    ) -> dict[str, Any] | None:
        """Make the folder and write config and environment, or return the summary of the same run, finished before.

        A folder in which this run did not reach its end is gone on with, unless `resume` is "never" and it has made a
        step; where it names a checkpoint, a finished one too. `environment`: as environment.py describes it; `origin`:
        path, step and chain of another run's checkpoint that this run begins from. Damaged files are set aside, see
        `trouble`. Raises RunDirError where another run is there, WriteError.
        """
        if (summary := self._finished_before(config, resume, origin, environment)) is not None:
            return summary
        new = not os.path.lexists(self.config) and not self.has_begun()
        try:
            self._make()
            if (reason := self._lock.hold()) is not None:
                self.event("warning", reason=reason)
            if (summary := self._finished_before(config, resume, origin, environment)) is not None:  # in the meantime
                return summary
            self.trouble.clear()  # what follows finds it again
            if self.has_begun():
                repair.set_aside_damaged(self, config)
            environment = self._with_starts_before(environment, origin)
            self._write(self.config, config.dump())  # first: a folder with it is ours, whatever happens next
            self.write_environment(environment)
        except OSError as error:
            raise RunDirError(f"{self.path}: cannot write the run folder: {error.strerror}") from None
        except WriteError:
            if new:  # leave nothing that another start would take for a run that waits
                for path in (self.config, self.environment):
                    with suppress(OSError):
                        path.unlink()
            raise
        start = environment["starts"][-1]
        self.started = self.event("started", **{key: start[key] for key in ("world_size", "strategy", "launcher")})
        return None

    def _with_starts_before(self, environment: dict[str, Any], origin: dict[str, Any] | None) -> dict[str, Any]:
        before = self.environment_or_nothing() if os.path.lexists(self.environment) else {}
        if self.has_begun():
            environment["starts"] = [*before.get("starts", ()), *environment["starts"]]
        environment |= {key: before[key] for key in _FOR_EVERY_START if before.get(key)}
        if moved := {*before.get("moved", ()), *self.moved}:
            environment["moved"] = sorted(moved)
        if origin is not None:
            environment["forked_from"] = origin
        return environment

    def write_environment(self, environment: dict[str, Any]) -> None:
        """Raises WriteError."""
        self._write(self.environment, to_text(environment))

    def _write(self, path: Path, text: str) -> None:
        write_whole(path, text)
        self._written[path.name] = text

    def _finished_before(
        self, config: Config, resume: str, origin: dict[str, Any] | None, environment: dict[str, Any]
    ) -> dict[str, Any] | None:
        """The summary, where there is nothing left to do. Raises RunDirError where this run may not go on here."""
        if not self.has_begun() or not (os.path.lexists(self.config) or files_saved(self.checkpoints)):
            return None
        self._refuse_another(config, origin, environment)
        if resume in ("auto", "never") or origin is not None:
            with suppress(DamagedFileError):  # then it is made anew
                if (summary := self.read_summary()) is not None:
                    return summary
        if resume == "never":
            raise RunDirError(
                f"{self.path}: holds a run that did not reach its end; go on with it by --resume auto, remove it, "
                "or choose another with --run-dir"
            )
        return None

    def reserve(self, config: Config) -> None:
        """Make the folder and write the config into it, for a run that begins later.

        Raises RunDirError as `check_reserve` does, or if it cannot be written.
        """
        self.check_reserve(config)
        try:
            self._make()
            write_whole(self.config, config.dump())
        except OSError as error:
            raise RunDirError(f"{self.path}: cannot write the run folder: {error.strerror}") from None

    def check_reserve(self, config: Config) -> None:
        """Raises RunDirError if another run or other files are here, or a run waits to begin with another config."""
        if self.path.is_dir():
            self._refuse_other_files()
        if os.path.lexists(self.config):
            self._refuse_another(config, None, None)
            if not self.has_begun() and self.read_config() != config:
                raise RunDirError(
                    f"{self.path}: holds the config of a run that has yet to begin, and another; remove the folder if "
                    "it is not waiting in a queue, or choose another with --run-dir"
                )

    def held(self) -> bool:
        """Does a process train in this folder now? Where a file system has no locks, it cannot be told: False."""
        return self._lock.held()

    def release(self) -> None:
        """Let other processes train in this folder."""
        self._lock.release()

    def has_begun(self) -> bool:
        """Is there anything of a step? Raises CheckpointError if the checkpoints' folder cannot be read."""
        with suppress(OSError):
            if os.path.lexists(self.steps) and (not self.steps.is_file() or self.steps.stat().st_size):
                return True
        return os.path.lexists(self.path) and any(steps_of(self.checkpoints))

    def _make(self) -> None:
        self.path.mkdir(parents=True, exist_ok=True)
        self._refuse_other_files()

    def _refuse_other_files(self) -> None:
        ours = os.path.lexists(self.config) or files_saved(self.checkpoints)
        if not ours and any(path.name not in _LEFT_BY_A_START for path in self.path.iterdir()):
            raise RunDirError(f"{self.path}: the folder holds other files; choose another with --run-dir")

    def rewind(self, steps: int, manifest: dict[str, Any] | None = None, led: bool = True) -> bool:
        """Forget what came after the first `steps` steps, and that the run had ended. Was there any?

        `manifest`: of the checkpoint that we go on from; `led`: the ledger leads to it. Raises WriteError.
        """
        if manifest is not None and not led:
            repair.begin_ledger_again(self, manifest)
        lost = ledger.cut(self.steps, steps, self.anchors())
        repair.forget_lost_steps(self, steps)
        repair.rewind_evaluations(self, steps, manifest)
        with writing(self.summary):
            self.summary.unlink(missing_ok=True)
        return lost

    def latest_metrics(self) -> dict[str, float]:
        """The last training loss and the last evaluation's metrics."""
        metrics: dict[str, float] = {}
        if (step := ledger.last_line(self.steps, formats.STEP)) is not None:
            metrics["train/loss"] = step["loss"]
        if (evaluation := ledger.last_line(self.evals, formats.EVALUATION)) is not None:
            metrics.update(evaluation["metrics"])
        return metrics

    def starts(self) -> list[dict[str, Any]]:
        """Where, when and by what the run was started, each time. Raises DamagedFileError."""
        starts: list[dict[str, Any]] = self.read_environment()["starts"]
        return starts

    def origin(self) -> dict[str, Any] | None:
        """Path, step and chain of the checkpoint of another run that this one began from, if it did."""
        found: dict[str, Any] | None = self.environment_or_nothing().get("forked_from")
        return found

    def anchors(self) -> dict[int, str]:
        """The first step, and those that follow on lost lines of the ledger; with the chain before each."""
        environment = self.environment_or_nothing()
        origin = environment.get("forked_from") or {"step": 0, "chain": ledger.GENESIS}
        lost = environment.get("lost_steps", ())
        return {origin["step"]: origin["chain"], **{part["next"]: part["chain"] for part in lost}}

    def num_samples(self) -> int | None:
        """In the training set; None for a stream. Raises DamagedFileError."""
        samples: int | None = self.read_environment()["training_samples"]
        return samples

    def read_environment(self) -> dict[str, Any]:
        """What environment.json says, or the newest checkpoint's copy of it. Raises DamagedFileError."""
        return self._or_saved(
            self.environment,
            lambda: read_json(self.environment, formats.ENVIRONMENT),
            lambda text, where: parse(text, formats.ENVIRONMENT, where),
        )

    def environment_or_nothing(self) -> dict[str, Any]:
        """The same, empty if it cannot be read."""
        try:
            return self.read_environment()
        except DamagedFileError as error:
            self.report(str(error))
            return {}

    def read_summary(self) -> dict[str, Any] | None:
        """What summary.json says; None while there is none. Raises DamagedFileError."""
        return read_json(self.summary, formats.SUMMARY) if os.path.lexists(self.summary) else None

    def read_config(self) -> Config:
        """The resolved config of the run, or the newest checkpoint's copy of it. Raises RunDirError."""
        if not os.path.lexists(self.config) and files_saved(self.checkpoints) is None:
            raise RunDirError(f"{self.path}: not a run folder, there is no config.yaml in it")
        return self._or_saved(self.config, self.own_config, lambda text, where: Config.parse(text, where))

    def own_config(self) -> Config:
        """What config.yaml says. Raises DamagedFileError."""
        text = read_bytes(self.config)
        try:
            return Config.parse(text.decode(), self.config)
        except (ConfigError, UnicodeDecodeError) as error:
            reason = str(error).removeprefix(f"{self.config}: ").splitlines()[0]
            raise DamagedFileError(f"{self.config}: damaged: {reason}") from None

    def _or_saved(self, path: Path, read: Callable[[], T], parse_saved: Callable[[str, Path], T]) -> T:
        try:
            return read()
        except DamagedFileError as error:
            if (saved := files_saved(self.checkpoints)) is None:
                raise
            self.report(f"{error}; taken from {saved[0]}")
            return parse_saved(saved[1][path.name], saved[0] / path.name)

    def report(self, line: str) -> None:
        """Once into `trouble`."""
        if line not in self.trouble:
            self.trouble.append(line)

    def take_trouble(self) -> list[str]:
        """What was found since the last call."""
        trouble, self.trouble = self.trouble, []
        return trouble

    def _refuse_another(
        self, config: Config, origin: dict[str, Any] | None, environment: dict[str, Any] | None
    ) -> None:
        if origin is not None and origin != self.origin():
            raise RunDirError(
                f"{self.path}: holds a run that did not begin at {origin['path']}; choose another with --run-dir"
            )
        what, changes = repair.changes(self, config, environment)
        if changes:
            raise RunDirError(
                f"{self.path}: holds a run of another {what} ({changes}); choose another with --run-dir, and to begin "
                "with this one's state give --resume CHECKPOINT --fork"
            )

    def to_save(self) -> dict[str, str]:
        """What a checkpoint holds so that it suffices to go on: the texts of config, environment and evaluations."""
        return {**self._written, self.evals.name: repair.evaluations(self)}

    def event(self, name: str, **details: Any) -> dict[str, Any]:
        """Append to events.jsonl; returns the entry. Raises WriteError."""
        return self._append(self.events, {"event": name, "time": now(), **details})

    def evaluation(self, step: int, count: int, metrics: dict[str, float], seconds: float) -> dict[str, Any]:
        """Append to evals.jsonl: `count` samples were evaluated after `step` steps. Returns the entry. Raises
        WriteError."""
        entry = {"step": step, "count": count, "metrics": metrics, "seconds": round(seconds, 6)}
        return self._append(self.evals, entry)

    def finish(self, summary: dict[str, Any]) -> dict[str, Any]:
        """Write summary.json, which says that the run is whole; returns the last event. Raises WriteError."""
        write_whole(self.summary, to_json(summary, indent=2) + "\n")
        return self.event("finished", step=summary["steps"])

    @staticmethod
    def _append(path: Path, entry: dict[str, Any]) -> dict[str, Any]:
        append_line(path, to_json(entry))
        return entry
