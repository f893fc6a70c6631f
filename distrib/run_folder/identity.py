"""Compares two starts of a run in what its config does not hold: the data, the task's class and arguments, the
model."""

import json
from collections.abc import Sequence
from typing import Any

from distrib.data.prints import UNKNOWN, VARIES, Fingerprint, same
from distrib.errors import ConfigError

_DIGITS = 12  # shown of a digest


def moved_keys(moved: Sequence[str]) -> tuple[str, ...]:
    """Return the keys of a list of KEY or KEY=VALUE. Raises ConfigError for a key that is not an argument of the
    task."""
    keys = tuple(text.partition("=")[0] for text in moved)
    for key in keys:
        if not key.startswith("task.") or key == "task.target":
            raise ConfigError(f"--moved: {key}: give the key that holds the path of the data: task.data=/new/path")
    return keys


def changes(before: dict[str, Any], now: dict[str, Any], in_config: bool, moved: Sequence[str] = ()) -> tuple[str, str]:
    """Compare the environments of two starts. Return what differs and a description, or ("", "") if nothing does.

    `in_config`: whether the config names the task's class and arguments; then the config's comparison covers them.
    `moved`: arguments that may differ, as task.NAME. Keys that an older version did not record are not compared.
    """
    for what, found in (
        ("source of its initial weights", _source_changes(before, now)),
        ("task", _task_changes(before, now, in_config, moved)),
        ("data", data_changes(before, now["data"])),
    ):
        if found:
            return what, "; ".join(found)
    return "", ""


def _source_changes(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """A run that reads its own checkpoint need not have its source any more; then there is nothing to compare."""
    then, source = before.get("init"), now.get("init")
    if then is None or source is None or then["sha256"] == source["sha256"]:
        return []
    was, is_ = (f"{one['path']} with the sha256 {one['sha256'][:_DIGITS]}…" for one in (then, source))
    return [f"init.from was {was}, is {is_}"]


def _task_changes(before: dict[str, Any], now: dict[str, Any], in_config: bool, moved: Sequence[str]) -> list[str]:
    then, task = before.get("task"), now["task"]
    if then is None:
        return []
    found = []
    if not in_config:
        if (was := then.get("class")) != task["class"]:
            found.append(f"the task's class was {was}, is {task['class']}")
        fixed = [
            {name: value for name, value in arguments.items() if f"task.{name}" not in moved}
            for arguments in (then["arguments"], task["arguments"])
        ]
        found += _differing("argument", *fixed)
    return found + _differing("the shape of parameter", then["parameters"], task["parameters"])


def data_changes(before: dict[str, Any], data: dict[str, Fingerprint | None]) -> list[str]:
    """Describe what differs between these fingerprints and those of an environment."""
    then = before.get("data") or {}
    found = {name: difference(now, then.get(name), "at the run's start") for name, now in data.items()}
    return [f"task.{name} {text}" for name, text in found.items() if text is not None]


def notes(environment: dict[str, Any]) -> list[str]:
    """Return warnings about a start: changed code, and samples that cannot be compared."""
    starts = environment["starts"]
    found = [
        _code_change(starts, "task", environment["task"]["file"]),
        _code_change(starts, "strategy", "the strategy's file"),
    ]
    for name, data in environment["data"].items():
        samples = {} if data is None else data["samples"]
        varying = [place for place, print_ in samples.items() if print_ == VARIES]
        if varying:
            found.append(
                f"task.{name}: sample {varying[0]} differs each time it is read, so the run cannot be reproduced; "
                "draw from random, numpy.random or torch, which are seeded for each sample"
            )
        elif samples and all(print_ == UNKNOWN for print_ in samples.values()):
            found.append(f"task.{name}: its samples cannot be compared with those of other starts, only its length")
    return [text for text in found if text is not None]


def _code_change(starts: list[dict[str, Any]], key: str, file: str | None) -> str | None:
    if len(starts) < 2:
        return None
    before, now = ((start.get("code") or {}).get(key) for start in starts[-2:])
    if before is None or now is None or before == now:
        return None
    return f"{file}: has changed since the run's last start; from now on the run uses the new code"


def _differing(what: str, before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    found = []
    for name in dict.fromkeys([*before, *now]):
        was, value = (json.dumps(values.get(name, "not there"), sort_keys=True) for values in (before, now))
        if was != value:
            shown = f" was {was}, is {value}" if "sha256:" not in was + value else " is another"
            found.append(f"{what} {name}{shown}")
    return found


def order_difference(found: Fingerprint, expected: Fingerprint, reference: str) -> str | None:
    """Describe how the orders of two fingerprints differ, or return None."""
    now, then = (one.get("order") or {"by": "a permutation"} for one in (found, expected))
    if now["by"] != then["by"]:
        return f"is ordered by {now['by']}, not by {then['by']} as {reference}"
    return None if now == then else f"has other {now['by']} than {reference}"


def difference(found: Fingerprint | None, expected: Fingerprint | None, reference: str) -> str | None:
    """Describe the first difference between two fingerprints, or return None. `reference`: what `expected` is from."""
    if found is None or expected is None:
        return None
    if (text := order_difference(found, expected, reference)) is not None:
        return text
    if found["length"] != expected["length"]:
        return f"has {found['length']} samples, not {expected['length']} as {reference}"
    for place, wanted in expected["samples"].items():
        if not same(found["samples"].get(place, UNKNOWN), wanted):
            return f"has another sample {place} than {reference}"
    return None
