"""Which scheduler started this process, and which one takes a job: the built-in ones, and those of other packages.

Other packages bring theirs by entry points of the group `distrib.schedulers`.
"""

import functools
import inspect
import os
from collections.abc import Mapping
from typing import Any

from distrib import plugins
from distrib.errors import LaunchError
from distrib.processes import variables
from distrib.processes.schedulers.base import Scheduler

CHOICE = "DISTRIB_SCHEDULER"  # the variable that names the one to use
_NONE = "none"
_LAUNCHERS = ("plain", "distrib", "torchrun", "accelerate")  # World.launcher has these or a scheduler's name


def detect(environ: Mapping[str, str]) -> Scheduler | None:
    """Return the scheduler that started the process with these variables, or None.

    Raises LaunchError if two say so, or if one that is installed cannot be loaded."""
    chosen = environ.get(CHOICE)
    if chosen == _NONE:
        return None
    candidates = [_named(chosen)] if chosen else [_load(name) for name in _names()]
    found = [scheduler for scheduler in candidates if _asked(scheduler, "detect", environ)]
    if len(found) > 1:
        raise LaunchError(
            f"{' and '.join(_describe(one) for one in found)} each find that they started this process; set "
            f"{CHOICE} to {' or '.join(one.name for one in found)}"
        )
    return found[0](environ) if found else None


@functools.cache
def of_this_process() -> Scheduler | None:
    """Return the scheduler that started this process. It is asked once, before variables are set here that a launcher
    might have set. Raises LaunchError as `detect` does."""
    return detect(dict(variables.from_outside()))


def rank_variables(scheduler: Scheduler | None, environ: Mapping[str, str]) -> dict[str, str]:
    """Return the variables of a launcher that the scheduler gives to its task.

    RANK alone decides: if it is set, a launcher inside the task set it, and the others are that launcher's business."""
    if scheduler is None or "RANK" in environ:
        return {}
    given = _asked(scheduler, "rank_variables")
    found = {name: str(value) for name, value in given.items()}
    return {**found, "DISTRIB_LAUNCHER": scheduler.name} if found else {}


def for_submission(name: str | None) -> Scheduler:
    """Return the scheduler to which `distrib submit` hands a job: the one of this name, or the only one that takes
    jobs. Raises LaunchError."""
    if name:
        scheduler = _named(name, "--scheduler: ")
        if not scheduler.can_submit():
            raise LaunchError(
                f"--scheduler: {name} takes no jobs from `distrib submit`; give one of "
                f"{', '.join(_takes_jobs())}, or start the job by {scheduler.title or name}'s own commands "
                "(docs/launchers.md)"
            )
        return scheduler(os.environ)
    takes_jobs = _takes_jobs()
    if len(takes_jobs) > 1:
        raise LaunchError(f"--scheduler: {' and '.join(takes_jobs)} take jobs; give one of them, or set {CHOICE}")
    return _load(takes_jobs[0])(os.environ)


def _takes_jobs() -> list[str]:
    return [name for name in _names() if _load(name).can_submit()]


def _named(name: str, key: str = f"{CHOICE}=") -> type[Scheduler]:
    if name not in _names():
        raise LaunchError(
            f"{key}{name}: there is no such scheduler; give one of {', '.join(sorted(_names()))}, or install the "
            "package that has it"
        )
    return _load(name)


@functools.cache
def _names() -> list[str]:
    """Raises LaunchError if packages bring names that are taken."""
    try:
        found = plugins.plugins(plugins.SCHEDULERS)
    except plugins.PluginError as error:
        raise LaunchError(str(error)) from None
    for name, (_, package) in found.items():
        if name in (*_LAUNCHERS, _NONE):
            raise LaunchError(f"{package} brings {name} to {plugins.SCHEDULERS}, a name that is taken")
    return list(found)


@functools.cache
def _load(name: str) -> type[Scheduler]:
    target, package = plugins.plugins(plugins.SCHEDULERS)[name]
    begins = f"the scheduler {name} of {package} ({target})"
    mend = f"mend or uninstall {package}, or set {CHOICE} to another or to {_NONE}"
    try:
        found: type[Scheduler] = plugins.load(plugins.SCHEDULERS, name, Scheduler)
    except plugins.PluginError as error:
        raise LaunchError(f"the scheduler {error}; {mend}") from None
    if inspect.isabstract(found):
        raise LaunchError(f"{begins} has no detect; {mend}")
    if getattr(found, "name", None) != name:
        raise LaunchError(f"{begins} has the name {getattr(found, 'name', None)!r}, its entry point {name!r}; {mend}")
    return found


def _asked(scheduler: Scheduler | type[Scheduler], method: str, *arguments: Any) -> Any:
    """Return what a method of a scheduler answers. Raises LaunchError with both names if it raises an error."""
    try:
        return getattr(scheduler, method)(*arguments)
    except LaunchError:
        raise
    except Exception as error:
        from distrib.tracebacks import first_line, place

        raise LaunchError(
            f"the scheduler {_describe(scheduler)}: {method} failed: {first_line(error)}{place(error)}; mend it, or "
            f"set {CHOICE} to another or to {_NONE}"
        ) from None


def _describe(scheduler: Scheduler | type[Scheduler]) -> str:
    return f"{scheduler.name} ({plugins.plugins(plugins.SCHEDULERS)[scheduler.name].package})"
