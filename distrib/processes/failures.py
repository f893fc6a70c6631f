"""Why a rank failed: by itself, or for want of another that did."""

import os
import socket

from torch.distributed import DistError

from distrib.processes.heartbeat import Heartbeat, joined
from distrib.tracebacks import format_error

_explained: tuple[BaseException, str | None, bool] | None = None  # the failure that was looked into last


def lost_to_others(error: BaseException) -> tuple[str | None, bool]:
    """Which rank's end made this one fail with `error`, in words, if another's did; and whether the failure began here.

    The first rank to fail says so in the job's store before its connections close, so that those who fail only for want
    of it can tell. The first call for an error may take some seconds.
    """
    global _explained
    me = joined()
    if me is None:
        return None, True
    if _explained is None or _explained[0] is not error:
        _explained = (error, *_explain(me, error))
    return _explained[1:]


def _explain(me: Heartbeat, error: BaseException) -> tuple[str | None, bool]:
    said, collective = str(error).lower(), is_collective(error)
    waited, lost = collective and ("timed out" in said or "timeout" in said), collective and "connection" in said
    first = me.claim_failure(began_here=not (waited or lost))
    if first not in (None, me.name(me.rank)):
        return f", because {first} had failed", False
    if waited:
        return f": it has waited too long for the others. {me.whereabouts()}", False
    if lost:
        return f": it lost contact with {me.missing()}", False
    return None, True


def report_failure(error: BaseException) -> tuple[str, bool]:
    """What this process should print of the exception that ended it, and whether the failure began here: one line of
    those who fail for want of another, so that the traceback that matters comes once."""
    me = joined()
    name = f"rank {os.environ.get('RANK', 0)} on {socket.gethostname()}" if me is None else me.name(me.rank)
    why, began_here = lost_to_others(error)
    if why is not None:
        return f"{name} stopped{why}", began_here
    return f"{name} failed:\n{format_error(error)}", began_here


def is_collective(error: BaseException) -> bool:
    """Was it raised by a collective, and so for want of another rank?"""
    said = str(error).lower()
    return isinstance(error, DistError) or (isinstance(error, RuntimeError) and ("gloo" in said or "nccl" in said))
