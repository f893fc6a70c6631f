"""Variables that a launcher, or the user, has set, and those that are set here for a library."""

import os
from collections.abc import Mapping

from distrib.errors import LaunchError

_provided: set[str] = set()  # by this process


def provide(name: str, value: str) -> None:
    """Set a variable that a library reads, if nobody has set it."""
    if name not in os.environ:
        os.environ[name] = value
        _provided.add(name)


def from_outside() -> dict[str, str]:
    """Return this process's variables without those that `provide` set: these are no launcher's."""
    return {name: value for name, value in os.environ.items() if name not in _provided}


def whole_number(environ: Mapping[str, str], name: str, default: int = 0) -> int:
    """Return the whole number, 0 or more, that a variable holds; `default` if it is not set. Raises LaunchError."""
    text = environ.get(name)
    if text is None:
        return default
    if not (text.strip().isascii() and text.strip().isdecimal()) or len(text) > 18:
        raise LaunchError(f"{name}={text[:60]!r} is not a whole number; set it to one, or start where it is not set")
    return int(text)


def seconds(environ: Mapping[str, str], name: str, default: float | None) -> float | None:
    """Return the number of seconds that a variable holds; `default` if it is not set. Raises LaunchError."""
    try:
        return float(environ[name]) if name in environ else default
    except ValueError:
        raise LaunchError(f"{name}={environ[name][:60]!r} is not a number of seconds") from None


def check_threads(environ: Mapping[str, str]) -> None:
    """Raises LaunchError if OMP_NUM_THREADS is nothing that torch and accelerate can read; OpenMP allows lists."""
    if "OMP_NUM_THREADS" in environ and whole_number(environ, "OMP_NUM_THREADS") < 1:
        raise LaunchError("OMP_NUM_THREADS=0, give 1 or more, or unset it")
