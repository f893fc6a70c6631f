"""Finds out whether a rank failed by itself, or only because another rank had failed."""

import os
import socket

from torch.distributed import DistError

from distrib.processes.heartbeat import Heartbeat, joined
from distrib.tracebacks import format_error

WAITED = "it has waited too long for the others"  # what `lost_to_others` returns begins so when a rank hangs
_explained: tuple[BaseException, str | None, bool] | None = None  # the last result of lost_to_others, with its error


def lost_to_others(error: BaseException) -> tuple[str | None, bool]:
    """Return why another rank made this one fail with `error`, or None; and whether the failure began on this rank.

    The first rank that fails records this in the job's store before its connections close, so the others can read it
    there. The first call for an error may take some seconds.
    """
    global _explained
    me = joined()
    if me is None:
        return None, True
    if _explained is None or _explained[0] is not error:
        _explained = (error, *_explain(me, error))
    return _explained[1:]


def _explain(me: Heartbeat, error: BaseException) -> tuple[str | None, bool]:
    message, collective = str(error).lower(), is_collective(error)
    waited = collective and ("timed out" in message or "timeout" in message)
    lost = collective and "connection" in message
    first = me.claim_failure(began_here=not (waited or lost))
    if first not in (None, me.name(me.rank)):
        return f", because {first} had failed", False
    if waited:
        return f": {WAITED}. {me.whereabouts()}", False
    if lost:
        return f": it lost contact with {me.missing()}", False
    return None, True


def report_failure(error: BaseException) -> tuple[str, bool]:
    """Return what to print about the exception that ends this process, and whether the failure began on this rank.

    If another rank failed first, it is one line, so that only the traceback of the cause is printed.
    """
    me = joined()
    name = f"rank {os.environ.get('RANK', 0)} on {socket.gethostname()}" if me is None else me.name(me.rank)
    why, began_here = lost_to_others(error)
    if why is not None:
        return f"{name} stopped{why}", began_here
    return f"{name} failed:\n{format_error(error)}", began_here


def is_collective(error: BaseException) -> bool:
    """Return whether a collective raised the error, which means that another rank is missing."""
    message = str(error).lower()
    return isinstance(error, DistError) or (
        isinstance(error, RuntimeError) and ("gloo" in message or "nccl" in message)
    )
