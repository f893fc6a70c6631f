"""The run folder, which holds everything a run writes, in files that other software can read."""

import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

from distrib.config import Config
from distrib.errors import ConfigError, DamagedFileError, RunDirError, WriteError
from distrib.run_folder import formats, ledger, repair
from distrib.run_folder.files import parse, read_bytes, read_json, to_text, write_whole, writing
from distrib.run_folder.ledger import append_line, now, to_json
from distrib.run_folder.lock import LOCK, Lock
from distrib.run_folder.manifest import files_saved, steps_of
from distrib.run_folder.sample_files import rewind_samples

T = TypeVar("T")

_LEFT_BY_A_START = (LOCK, ".config.yaml.partial", ".environment.json.partial")  # by a failed or killed start
_FOR_EVERY_START = ("forked_from", "lost_steps")  # keys of environment.json that later starts keep


class RunDir:
    """The paths and small files of one run. Only rank 0 writes."""

    def __init__(self, path: Path, moved: Sequence[str] = ()) -> None:
        self.path = path
        self.moved = moved  # config keys that may differ from the run's if the data have the same fingerprint
        self.config = path / "config.yaml"
        self.environment = path / "environment.json"
        self.steps = path / "steps.jsonl"
        self.evals = path / "evals.jsonl"
        self.events = path / "events.jsonl"
        self.checkpoints = path / "checkpoints"
        self.compiled = path / "compiled"  # torch.compile's
        self.summary = path / "summary.json"
        self.curves = path / "curves.png"
        self.samples = path / "samples"  # what `Task.samples` returned
        self.trouble: list[str] = []  # one message for each damaged file, with what was done about it
        self.started: dict[str, Any] = {}  # this start's event
        self._lock = Lock(path / LOCK)
        self._written: dict[str, str] = {}  # texts of config.yaml and environment.json, by file name

    def start(
        self, config: Config, environment: dict[str, Any], resume: str = "auto", origin: dict[str, Any] | None = None
    ) -> dict[str, Any] | None:
        """Make the folder and write config and environment. If this run has already finished, return its summary.

        An unfinished run is resumed, unless `resume` is "never" and it has made a step. If `resume` is a checkpoint, a
        finished run is resumed too. `environment`: from environment.py. `origin`: path, step and chain of the
        checkpoint that a forked run begins from. Damaged files are set aside, see `trouble`. Raises RunDirError if the
        folder holds another run, WriteError.
        """
        if (summary := self._finished_summary(config, resume, origin, environment)) is not None:
            return summary
        new = not os.path.lexists(self.config) and not self.has_begun()
        try:
            self._make()
            if (reason := self._lock.hold()) is not None:
                self.event("warning", reason=reason)
            if (summary := self._finished_summary(config, resume, origin, environment)) is not None:  # since the check
                return summary
            self.trouble.clear()  # the next lines report it again
            if self.has_begun():
                repair.set_aside_damaged(self, config)
            environment = self._with_starts_before(environment, origin)
            self._write(self.config, config.dump())  # first, because a folder with config.yaml counts as a run folder
            self.write_environment(environment)
        except OSError as error:
            raise RunDirError(f"{self.path}: cannot write the run folder: {error.strerror}") from None
        except WriteError:
            if new:  # otherwise the next start would find a run that has yet to begin
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

    def _finished_summary(
        self, config: Config, resume: str, origin: dict[str, Any] | None, environment: dict[str, Any]
    ) -> dict[str, Any] | None:
        """Return the summary of a finished run, else None. Raises RunDirError if this run may not resume here."""
        if not self.has_begun() or not (os.path.lexists(self.config) or files_saved(self.checkpoints)):
            return None
        self._refuse_another(config, origin, environment)
        if resume in ("auto", "never") or origin is not None:
            with suppress(DamagedFileError):  # it is written again at the end
                if (summary := self.read_summary()) is not None:
                    return summary
        if resume == "never":
            raise RunDirError(
                f"{self.path}: holds a run that did not reach its end; resume it with --resume auto, remove it, "
                "or choose another folder with --run-dir"
            )
        return None

    def reserve(self, config: Config) -> None:
        """Make the folder and write the config into it, for a run that starts later.

        Raises RunDirError if `check_reserve` does, or if the folder cannot be written.
        """
        self.check_reserve(config)
        try:
            self._make()
            write_whole(self.config, config.dump())
        except OSError as error:
            raise RunDirError(f"{self.path}: cannot write the run folder: {error.strerror}") from None

    def check_reserve(self, config: Config) -> None:
        """Raise RunDirError if the folder holds another run or other files, or is reserved with another config."""
        if self.path.is_dir():
            self._refuse_other_files()
        if os.path.lexists(self.config):
            self._refuse_another(config, None, None)
            if not self.has_begun() and self.read_config() != config:
                raise RunDirError(
                    f"{self.path}: holds the config of a run that has yet to begin, and it is another; remove "
                    "the folder if that run is not in a queue, or choose another folder with --run-dir"
                )

    def held(self) -> bool:
        """Return whether a process trains in this folder now. False if the file system has no locks."""
        return self._lock.held()

    def release(self) -> None:
        """Let other processes train in this folder."""
        self._lock.release()

    def has_begun(self) -> bool:
        """Return whether the run has made a step. Raises CheckpointError if `checkpoints` cannot be read."""
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
        """Remove the records after the first `steps` steps, and the summary. Return whether the ledger had later steps.

        `manifest`: of the checkpoint to resume from. `led`: whether the ledger leads to it. Raises WriteError.
        """
        if manifest is not None and not led:
            repair.begin_ledger_again(self, manifest)
        lost = ledger.cut(self.steps, steps, self.anchors())
        repair.forget_lost_steps(self, steps)
        repair.rewind_evaluations(self, steps, manifest)
        rewind_samples(self.samples, steps)
        with writing(self.summary):
            self.summary.unlink(missing_ok=True)
        return lost

    def latest_metrics(self) -> dict[str, float]:
        """Return the last training loss and the metrics of the last evaluation."""
        metrics: dict[str, float] = {}
        if (step := ledger.last_line(self.steps, formats.STEP)) is not None:
            metrics.update(ledger.train_metrics(step))
        if (evaluation := ledger.last_line(self.evals, formats.EVALUATION)) is not None:
            metrics.update(evaluation["metrics"])
        return metrics

    def starts(self) -> list[dict[str, Any]]:
        """Return the run's starts: time, machine, launcher and code of each. Raises DamagedFileError."""
        return list(self.read_environment()["starts"])

    def origin(self) -> dict[str, Any] | None:
        """Return path, step and chain of the checkpoint that a forked run began from; None if it is not a fork."""
        found: dict[str, Any] | None = self.environment_or_nothing().get("forked_from")
        return found

    def anchors(self) -> dict[int, str]:
        """Return `{step: chain before it}` for the first step, and for each step that follows lost ledger lines."""
        environment = self.environment_or_nothing()
        origin = environment.get("forked_from") or {"step": 0, "chain": ledger.GENESIS}
        lost = environment.get("lost_steps", ())
        return {origin["step"]: origin["chain"], **{part["next"]: part["chain"] for part in lost}}

    def num_samples(self) -> int | None:
        """Return the size of the training set; None for a stream. Raises DamagedFileError."""
        samples: int | None = self.read_environment()["training_samples"]
        return samples

    def read_environment(self) -> dict[str, Any]:
        """Read environment.json, or if it is damaged, the newest checkpoint's copy. Raises DamagedFileError."""
        return self._read_or_saved_copy(
            self.environment,
            lambda: read_json(self.environment, formats.ENVIRONMENT),
            lambda text, where: parse(text, formats.ENVIRONMENT, where),
        )

    def environment_or_nothing(self) -> dict[str, Any]:
        """As `read_environment`, but empty if it cannot be read."""
        try:
            return self.read_environment()
        except DamagedFileError as error:
            self.report(str(error))
            return {}

    def read_summary(self) -> dict[str, Any] | None:
        """Read summary.json; None if it does not exist. Raises DamagedFileError."""
        return read_json(self.summary, formats.SUMMARY) if os.path.lexists(self.summary) else None

    def read_config(self) -> Config:
        """Read config.yaml, or if it is damaged, the newest checkpoint's copy. Raises RunDirError."""
        if not os.path.lexists(self.config) and files_saved(self.checkpoints) is None:
            raise RunDirError(f"{self.path}: not a run folder, there is no config.yaml in it")
        return self._read_or_saved_copy(self.config, self.own_config, lambda text, where: Config.parse(text, where))

    def own_config(self) -> Config:
        """Read config.yaml. Raises DamagedFileError."""
        text = read_bytes(self.config)
        try:
            return Config.parse(text.decode(), self.config)
        except (ConfigError, UnicodeDecodeError) as error:
            reason = str(error).removeprefix(f"{self.config}: ").splitlines()[0]
            raise DamagedFileError(f"{self.config}: damaged: {reason}") from None

    def _read_or_saved_copy(self, path: Path, read: Callable[[], T], parse_saved: Callable[[str, Path], T]) -> T:
        try:
            return read()
        except DamagedFileError as error:
            if (saved := files_saved(self.checkpoints)) is None:
                raise
            self.report(f"{error}; taken from {saved[0]}")
            return parse_saved(saved[1][path.name], saved[0] / path.name)

    def report(self, line: str) -> None:
        """Append a message to `trouble`, unless it is there already."""
        if line not in self.trouble:
            self.trouble.append(line)

    def take_trouble(self) -> list[str]:
        """Return the messages since the last call."""
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
                f"{self.path}: holds a run of another {what} ({changes}); choose another with --run-dir; to begin with "
                "this run's state, add --resume CHECKPOINT --fork"
            )

    def to_save(self) -> dict[str, str]:
        """Return the texts of config, environment and evaluations, which each checkpoint holds a copy of."""
        return {**self._written, self.evals.name: repair.evaluations(self)}

    def event(self, name: str, **details: Any) -> dict[str, Any]:
        """Append to events.jsonl, and return the entry. Raises WriteError."""
        return self._append(self.events, {"event": name, "time": now(), **details})

    def evaluation(self, entry: dict[str, Any]) -> dict[str, Any]:
        """Append a line to evals.jsonl, and return it. Raises WriteError."""
        return self._append(self.evals, entry)

    def finish(self, summary: dict[str, Any]) -> dict[str, Any]:
        """Write summary.json, which marks the run as finished, and return the last event. Raises WriteError."""
        write_whole(self.summary, to_json(summary, indent=2) + "\n")
        return self.event("finished", step=summary["steps"])

    @staticmethod
    def _append(path: Path, entry: dict[str, Any]) -> dict[str, Any]:
        append_line(path, to_json(entry))
        return entry
