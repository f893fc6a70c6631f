"""The run folder: everything a run leaves, in files that other software can read."""

import fcntl
import json
import math
import time
from pathlib import Path
from typing import Any, TextIO

from distrib.config import Config
from distrib.errors import RunDirError
from distrib.state import ledger
from distrib.state.ledger import now, to_json

_LOCK = ".lock"
_SECONDS_TO_DIE = 5.0  # that a killed process, or its workers, may take


class RunDir:
    """Paths and small files of one run. Only rank 0 writes."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config = path / "config.yaml"
        self.environment = path / "environment.json"
        self.steps = path / "steps.jsonl"
        self.evals = path / "evals.jsonl"
        self.events = path / "events.jsonl"
        self.checkpoints = path / "checkpoints"
        self.compiled = path / "compiled"  # torch.compile's
        self.summary = path / "summary.json"
        self.curves = path / "curves.png"
        self._lock: TextIO | None = None

    def start(
        self,
        config: Config,
        environment: dict[str, Any],
        resume: str = "auto",
        origin: dict[str, Any] | None = None,
    ) -> dict[str, Any] | None:
        """Make the folder and write config and environment, or return the summary of the same run, finished before.

        A folder in which this run did not reach its end is gone on with, unless `resume` is "never" and it has made a
        step; where it names a checkpoint, a finished one too. `environment`: as environment.py describes it; `origin`:
        path, step and chain of another run's checkpoint that this run begins from. Raises RunDirError where another
        run is there.
        """
        if (summary := self._finished_before(config, resume, origin)) is not None:
            return summary
        try:
            self._make()
            self._hold()
            if (summary := self._finished_before(config, resume, origin)) is not None:  # in the meantime
                return summary
            if self._has_begun() and self.environment.exists():
                environment = {**environment, "starts": [*self.starts(), *environment["starts"]]}
            if origin is not None:
                environment["forked_from"] = origin
            elif self.environment.exists() and (before := self.origin()) is not None:
                environment["forked_from"] = before
            _write(self.environment, json.dumps(environment, indent=2) + "\n")
            _write(self.config, config.dump())
        except OSError as error:
            raise RunDirError(f"{self.path}: cannot write the run folder: {error.strerror}") from None
        start = environment["starts"][-1]
        self.event("started", **{key: start[key] for key in ("world_size", "strategy", "launcher")})
        return None

    def _finished_before(self, config: Config, resume: str, origin: dict[str, Any] | None) -> dict[str, Any] | None:
        """The summary, where there is nothing left to do. Raises RunDirError where this run may not go on here."""
        if not (self.config.exists() and self._has_begun()):
            return None
        self._refuse_another(config, origin)
        if self.summary.exists() and (resume in ("auto", "never") or origin is not None):
            summary: dict[str, Any] = json.loads(self.summary.read_text())
            return summary
        if resume == "never":
            raise RunDirError(
                f"{self.path}: holds a run that did not reach its end; go on with it by --resume auto, remove it, "
                "or choose another with --run-dir"
            )
        return None

    def reserve(self, config: Config) -> None:
        """Make the folder and write the config into it, for a run that begins later.

        Raises RunDirError where another run is there, or one waits to begin with another config.
        """
        if self.config.exists():
            self._refuse_another(config, None)
            if not self._has_begun() and self.read_config() != config:
                raise RunDirError(
                    f"{self.path}: holds the config of a run that has yet to begin, and another; remove the folder if "
                    "it is not waiting in a queue, or choose another with --run-dir"
                )
        try:
            self._make()
            _write(self.config, config.dump())
        except OSError as error:
            raise RunDirError(f"{self.path}: cannot write the run folder: {error.strerror}") from None

    def held(self) -> bool:
        """Does a process train in this folder now? Where a file system has no locks, it cannot be told: False."""
        try:
            with (self.path / _LOCK).open() as lock:
                fcntl.lockf(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            return True
        except OSError:
            return False
        return False

    def release(self) -> None:
        """Let other processes train in this folder."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def _has_begun(self) -> bool:
        return self.steps.exists() and self.steps.stat().st_size > 0

    def _make(self) -> None:
        self.path.mkdir(parents=True, exist_ok=True)
        if not self.config.exists() and any(path.name != _LOCK for path in self.path.iterdir()):
            raise RunDirError(f"{self.path}: the folder holds other files; choose another with --run-dir")

    def _hold(self) -> None:
        """For as long as this process lives, or until `release`: two that train in one folder would spoil it."""
        lock = (self.path / _LOCK).open("a")
        deadline = time.monotonic() + _SECONDS_TO_DIE
        while True:
            try:
                fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except (BlockingIOError, PermissionError):
                if time.monotonic() > deadline:
                    raise RunDirError(
                        f"{self.path}: another process is training in it; wait for its end, or choose another with "
                        "--run-dir"
                    ) from None
            except OSError as error:
                reason = f"{self.path}: {error.strerror}: no locks here, so a second start would not be refused"
                self.event("warning", reason=reason)
                break
            time.sleep(0.1)
        self._lock = lock

    def rewind(self, steps: int) -> bool:
        """Forget what came after the first `steps` steps, and that the run had ended. Was there any?"""
        lost = ledger.cut(self.steps, steps, self.beginning()[0])
        if self.evals.exists():
            kept = [line for line in self.evals.read_text().splitlines(keepends=True) if _evaluated_at(line) <= steps]
            _write(self.evals, "".join(kept))
        self.summary.unlink(missing_ok=True)
        return lost

    def latest_metrics(self) -> dict[str, float]:
        """The last training loss and the last evaluation's metrics."""
        metrics: dict[str, float] = {}
        if (step := ledger.last_line(self.steps)) is not None:
            metrics["train/loss"] = step["loss"]
        if (evaluation := ledger.last_line(self.evals)) is not None:
            metrics.update(evaluation["metrics"])
        return metrics

    def starts(self) -> list[dict[str, Any]]:
        """Where, when and by what the run was started, each time."""
        starts: list[dict[str, Any]] = self.read_environment()["starts"]
        return starts

    def origin(self) -> dict[str, Any] | None:
        """Path, step and chain of the checkpoint of another run that this one began from, if it did."""
        found: dict[str, Any] | None = self.read_environment().get("forked_from")
        return found

    def beginning(self) -> tuple[int, str]:
        """The first step, and the chain before it."""
        origin = self.origin()
        return (0, ledger.GENESIS) if origin is None else (origin["step"], origin["chain"])

    def num_samples(self) -> int | None:
        """In the training set; None for a stream."""
        samples: int | None = self.read_environment()["training_samples"]
        return samples

    def read_environment(self) -> dict[str, Any]:
        """What environment.json says. Raises RunDirError."""
        try:
            environment: dict[str, Any] = json.loads(self.environment.read_text())
        except (OSError, ValueError) as error:
            raise RunDirError(f"{self.environment}: cannot be read: {error}") from None
        return environment

    def _refuse_another(self, config: Config, origin: dict[str, Any] | None) -> None:
        if origin is not None and origin != self.origin():
            raise RunDirError(
                f"{self.path}: holds a run that did not begin at {origin['path']}; choose another with --run-dir"
            )
        before, now = self.read_config().function(), config.function()
        differing = sorted(key for key in before.keys() | now.keys() if before.get(key) != now.get(key))
        if differing:
            changes = "; ".join(f"{key} was {before.get(key)!r}, is {now.get(key)!r}" for key in differing)
            raise RunDirError(
                f"{self.path}: holds a run of another config ({changes}); choose another with --run-dir, and to begin "
                "with this one's state give --resume CHECKPOINT --fork"
            )

    def read_config(self) -> Config:
        """The resolved config of the run. Raises RunDirError or ConfigError."""
        if not self.config.exists():
            raise RunDirError(f"{self.path}: not a run folder, there is no config.yaml in it")
        return Config.load(self.config)

    def event(self, name: str, **details: Any) -> dict[str, Any]:
        """Append to events.jsonl; returns the entry."""
        return self._append(self.events, {"event": name, "time": now(), **details})

    def evaluation(self, step: int, count: int, metrics: dict[str, float], seconds: float) -> dict[str, Any]:
        """Append to evals.jsonl: `count` samples were evaluated after `step` steps. Returns the entry."""
        entry = {"step": step, "count": count, "metrics": metrics, "seconds": round(seconds, 6)}
        return self._append(self.evals, entry)

    def finish(self, summary: dict[str, Any]) -> None:
        """Write summary.json, which says that the run is whole."""
        _write(self.summary, to_json(summary, indent=2) + "\n")
        self.event("finished", step=summary["steps"])

    @staticmethod
    def _append(path: Path, entry: dict[str, Any]) -> dict[str, Any]:
        with path.open("a", encoding="utf-8") as file:
            file.write(to_json(entry) + "\n")
        return entry


def _evaluated_at(line: str) -> float:
    try:
        return int(json.loads(line)["step"])
    except ValueError:  # torn
        return math.inf


def _write(path: Path, text: str) -> None:
    """Whole or not at all: other processes read these files."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)
