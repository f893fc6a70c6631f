"""Repairs a run folder when a run resumes: a damaged file is renamed, and replaced by a checkpoint's copy or by the
lines that can still be read."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distrib.config import Config
from distrib.errors import DamagedFileError, RunDirError
from distrib.run_folder import formats, identity, ledger
from distrib.run_folder.files import (
    Unreadable,
    lines_of,
    open_regular,
    parse,
    read_json,
    set_aside,
    write_whole,
    writing,
)
from distrib.run_folder.manifest import files_saved, steps_of

if TYPE_CHECKING:
    from distrib.run_folder.folder import RunDir

_SAME_IN_ALL_STARTS = ("training_samples", "forked_from", "init")  # keys of environment.json


def evaluations(run: RunDir) -> str:
    """Return the valid lines of evals.jsonl."""
    return b"".join(_valid_lines(run.evals, formats.EVALUATION)[0]).decode()


def changes(run: RunDir, config: Config, environment: dict[str, Any] | None) -> tuple[str, str]:
    """Compare a run of `config` with the folder's. Return what differs and a description, or ("", "")."""
    before, recorded = run.read_config(), run.environment_or_nothing()
    saved = saved_config(run)
    if (keys := changed_keys(before, config, run.moved)) and not saved_with(run, config):
        return "config", keys
    if saved is not None and (keys := changed_keys(saved, config, (*run.moved, *recorded.get("moved", ())))):
        return "config", f"{keys}, because {run.config} was changed after the last checkpoint"
    if changed_keys(before, config) and not keys and not (recorded.get("data") or {}).get("train_dataset"):
        return "config", f"{changed_keys(before, config)}; no fingerprint was recorded to compare the data with"
    if environment is None:
        return "", ""
    return identity.changes(recorded, environment, config.task is not None, run.moved)


def changed_keys(before: Config, now: Config, moved: Sequence[str] = ()) -> str:
    """Describe which keys that decide what is computed differ. `moved`: keys that may differ."""
    old, new = before.identity(), now.identity()
    allowed = tuple(f"{key}." for key in moved)
    differing = sorted(
        key for key in old.keys() | new.keys() if old.get(key) != new.get(key) and not f"{key}.".startswith(allowed)
    )
    return "; ".join(f"{key} was {old.get(key)!r}, is {new.get(key)!r}" for key in differing)


def saved_with(run: RunDir, config: Config) -> bool:
    """Return whether the newest checkpoint was saved by a run of this config."""
    saved = saved_config(run)
    return saved is not None and saved.identity() == config.identity()


def config_damage(run: RunDir, config: Config) -> str | None:
    """Describe what is wrong with config.yaml for a run of `config`; None if nothing is."""
    try:
        changes = changed_keys(config, run.own_config(), _moved_before(run))
    except DamagedFileError as error:
        return str(error)
    return f"{run.config}: damaged: {changes}" if changes and saved_with(run, config) else None


def _moved_before(run: RunDir) -> Sequence[str]:
    """Return the keys that an earlier start's --moved named. Checkpoints from before it hold their old values."""
    with suppress(DamagedFileError):
        moved: list[str] = read_json(run.environment, formats.ENVIRONMENT).get("moved", [])
        return moved
    return ()


def environment_damage(run: RunDir) -> str | None:
    """Describe what is wrong with environment.json, also compared with the newest checkpoint's copy; None if
    nothing."""
    try:
        found = read_json(run.environment, formats.ENVIRONMENT)
    except DamagedFileError as error:
        return str(error)
    if saved := files_saved(run.checkpoints):
        copy = parse(saved[1][run.environment.name], formats.ENVIRONMENT, saved[0])
        for key in _SAME_IN_ALL_STARTS:
            now, then = (_fixed(one.get(key)) for one in (found, copy))
            if now != then:
                return f"{run.environment}: damaged: {key} is {now}, was {then} in {saved[0]}"
    return None


def _fixed(value: Any) -> Any:
    """Return what of a key's value is the same in all starts: of `init` the digest, because its path may move."""
    return value.get("sha256", value) if isinstance(value, dict) else value


def set_aside_damaged(run: RunDir, config: Config) -> None:
    """Rename damaged files, and replace each by the newest checkpoint's copy or by its valid lines.

    evals.jsonl, and a ledger that does not lead to the checkpoint, are repaired later, when the checkpoint is chosen.
    Raises WriteError.
    """
    require_beginning(run)
    saved = files_saved(run.checkpoints)
    if run.moved and (moved := changed_keys(run.read_config(), config)):
        run.report(f"the data moved: {moved}; their fingerprint is the same")
    for path, problem in ((run.config, config_damage(run, config)), (run.environment, environment_damage(run))):
        if problem is not None and (saved is not None or os.path.lexists(path)):
            aside = _set_aside_words(path)
            if saved is None:
                run.report(f"{problem}{aside}")
            else:
                write_whole(path, saved[1][path.name])
                run.report(f"{problem}{aside}; taken from {saved[0]}")
    try:
        run.read_summary()
    except DamagedFileError as error:
        run.report(f"{error}{_set_aside_words(run.summary)}")
    if problem := _unreadable_reason(run.steps):
        run.report(f"{problem}{_set_aside_words(run.steps)}")
    lines, problems = _valid_lines(run.events, formats.EVENT)
    if problems:
        run.report(f"{problems[0]}{_set_aside_words(run.events)}")
    if problems or _is_torn(run.events):
        write_whole(run.events, b"".join(lines).decode())


def require_beginning(run: RunDir) -> None:
    """Raise RunDirError if a fork has no checkpoint and its environment.json, which records its origin, is damaged."""
    if environment_damage(run) is None or any(steps_of(run.checkpoints)):
        return
    try:
        line = next((line for line in ledger.walk(run.steps, {0: ledger.GENESIS}) if line.entry is not None), None)
    except DamagedFileError:
        return
    if line is not None and line.entry is not None and line.entry["step"] >= line.number:
        raise RunDirError(
            f"{run.environment}: cannot be read, and no checkpoint holds a copy: the run began from a checkpoint of "
            "another run, and it is not known which; choose another folder with --run-dir, and give --resume "
            "CHECKPOINT --fork"
        )


def begin_ledger_again(run: RunDir, manifest: dict[str, Any]) -> None:
    """Repair a ledger that does not lead to the checkpoint, by keeping its valid lines from before the checkpoint.

    environment.json records which steps are lost, and the chain with which the ledger continues. Raises WriteError.
    """
    anchors = {step: chain for step, chain in run.anchors().items() if step < manifest["step"]}
    whole: list[str] = []
    first = min(anchors, default=manifest["step"])
    try:
        for line in ledger.walk(run.steps, anchors) if anchors else ():
            if line.whole and line.entry is not None and line.entry["step"] < manifest["step"]:
                whole.append(line.text)
                first = line.entry["step"] + 1
    except DamagedFileError:
        pass
    partial = run.steps.with_name(f".{run.steps.name}.partial")
    write_whole(partial, "".join(whole))  # first, so that a kill leaves no ledger only between the two renames
    lost = {"first": first, "next": manifest["step"], "chain": manifest["chain"]}
    environment = run.read_environment()
    environment["lost_steps"] = [*_lost_before(environment, first), lost]
    run.write_environment(environment)
    aside = _set_aside_words(run.steps)
    with writing(run.steps):
        partial.replace(run.steps)
    run.report(
        f"{run.steps}: damaged: it does not lead to step {manifest['step']}{aside}; "
        f"{ledger.steps(first, lost['next'])} lost from it, and it continues after them"
    )


def forget_lost_steps(run: RunDir, steps: int) -> None:
    """Remove from `lost_steps` those from `steps` on, because the run makes them again. Raises WriteError."""
    environment = run.environment_or_nothing()
    if lost := environment.get("lost_steps"):
        left = _lost_before(environment, steps)
        if left != lost:
            run.write_environment({**environment, "lost_steps": left})


def rewind_evaluations(run: RunDir, steps: int, manifest: dict[str, Any] | None) -> None:
    """Remove the evaluations after step `steps` from evals.jsonl. Raises WriteError.

    If the file is damaged, evaluations up to the checkpoint's come from its copy, and later ones from the file.
    """
    saved = _lines_up_to(steps, _lines((manifest or {}).get("run", {}).get(run.evals.name, "")))
    lines, problems = _valid_lines(run.evals, formats.EVALUATION)
    kept = _lines_up_to(steps, lines)
    problems = problems or _other_evaluations(run, kept, saved)
    if problems:
        last = _step_of(saved[-1]) if saved else -1
        kept = [*saved, *(line for line in kept if _step_of(line) > last)]
        run.report(f"{problems[0]}{_set_aside_words(run.evals)}")
    if kept or os.path.lexists(run.evals):
        write_whole(run.evals, b"".join(kept).decode())


def evaluations_damage(run: RunDir) -> list[str]:
    """Describe what is wrong with evals.jsonl, also compared with the newest checkpoint's copy."""
    saved = files_saved(run.checkpoints)  # first, because the run may be in progress
    lines, problems = _valid_lines(run.evals, formats.EVALUATION)
    return problems or _other_evaluations(run, lines, _lines(saved[1][run.evals.name]) if saved else [])


def _other_evaluations(run: RunDir, lines: list[bytes], saved: list[bytes]) -> list[str]:
    if lines[: len(saved)] == saved:
        return []
    return [f"{run.evals}: damaged: it holds other evaluations than the checkpoint"]


def _lines(text: str) -> list[bytes]:
    return [f"{line}\n".encode() for line in text.split("\n") if line]


def saved_config(run: RunDir) -> Config | None:
    """Return the newest checkpoint's copy of the config, or None."""
    saved = files_saved(run.checkpoints)
    return None if saved is None else Config.parse(saved[1][run.config.name], saved[0])


def _set_aside_words(path: Path) -> str:
    """Set a file aside, if there is one, and return the words for the message."""
    return f"; set aside as {set_aside(path).name}" if os.path.lexists(path) else ""


def _unreadable_reason(path: Path) -> str | None:
    """Return why a file cannot be opened; None if it can, or does not exist."""
    try:
        open_regular(path).close()
    except FileNotFoundError:
        return None
    except DamagedFileError as error:
        return str(error)
    return None


def _valid_lines(path: Path, form: Any) -> tuple[list[bytes], list[str]]:
    """Return the valid lines of a JSON-lines file, each with a line end, and what is wrong with the others.

    An incomplete last line is ignored.
    """
    lines, unreadable = [], Unreadable(path)
    try:
        for number, line in enumerate(lines_of(path), start=1):
            try:
                parse(line, form, path)
                lines.append(line if line.endswith(b"\n") else line + b"\n")
            except DamagedFileError:
                if line.endswith(b"\n"):
                    unreadable.add(number)
    except DamagedFileError as error:
        return [], [str(error)]
    return lines, unreadable.said()


def _is_torn(path: Path) -> bool:
    """Return whether the last line has no line end."""
    last = b"\n"
    for line in lines_of(path):
        last = line
    return not last.endswith(b"\n")


def _lines_up_to(steps: int, lines: list[bytes]) -> list[bytes]:
    return [line for line in lines if _step_of(line) <= steps]


def _step_of(line: bytes) -> int:
    step: int = parse(line, formats.EVALUATION, "an evaluation")["step"]
    return step


def _lost_before(environment: dict[str, Any], steps: int) -> list[dict[str, Any]]:
    return [lost for lost in environment.get("lost_steps", ()) if lost["next"] <= steps]
