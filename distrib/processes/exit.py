"""How a process ends: its exit code, and what it says. Also runs a user's script as `distrib launch` does.

python -m distrib.processes.exit SCRIPT.py [ARGUMENTS …]
python -m distrib.processes.exit -m MODULE [ARGUMENTS …]
"""

import atexit
import importlib.util
import os
import runpy
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from typing import NoReturn

from distrib.errors import DistribError, LaunchError, Preempted, WriteError
from distrib.processes import temporary
from distrib.processes.lifetimes import die_with_launcher
from distrib.processes.output import end_with_reader, keep_writable
from distrib.processes.schedulers.registry import of_this_process, rank_variables
from distrib.processes.signals import INTERRUPTED, has_launcher, leave_when_asked

_SHOW = ("explain", "watch", "verify", "compare")  # these commands do nothing but print
_SECONDS_FOR_RANK_0 = 5.0
_SECONDS_TO_BE_SECOND = 1.0  # launchers name the first to end, and end the others


def run_as_member(work: Callable[[], object], command: str = "") -> int:
    """Run `work` and return the exit code: 0 done, 1 failed, 2 the user's input is wrong, 75 asked to stop.

    `command`: the command of distrib's that runs; none for a script. An error of the user's is one line, said by rank 0
    alone; a crash is a traceback, said by the rank that failed first. A failed process ends at once, without
    waiting for threads that wait for the other ranks.
    """
    die_with_launcher()
    try:
        os.environ.update(rank_variables(of_this_process(), os.environ))  # here and for what the user brings
        if command in ("train", "launch"):
            leave_when_asked(as_launcher=command == "launch")
        elif command in _SHOW:
            end_with_reader()
        work()
    except DistribError as error:
        if isinstance(error, WriteError):
            _name_failure()
        said: str | None = str(error) if isinstance(error, Preempted) else f"error: {error}"
        _end_by_sigterm(error.exit_code)
        if os.environ.get("RANK", "0") != "0":
            time.sleep(_SECONDS_FOR_RANK_0)  # every rank finds the same: let rank 0 say it
            said = None if isinstance(error, Preempted) else said
        _end(said, error.exit_code)
    except KeyboardInterrupt:
        _end(None if has_launcher() else "interrupted", INTERRUPTED)
    except Exception as error:
        _end_by_sigterm(1)
        from distrib.processes.failures import report_failure

        message, began_here = report_failure(error)
        print(message, file=sys.stderr, flush=True)
        if not began_here:
            time.sleep(_SECONDS_TO_BE_SECOND)
        _end(None, 1)
    return 0


def without_local_rank(arguments: list[str]) -> list[str]:
    """Return the arguments without --local_rank=N, which deepspeed and torch.distributed.launch put before them."""
    name, _, value = arguments[0].partition("=") if arguments else ("", "", "")
    if name not in ("--local_rank", "--local-rank"):
        return arguments
    os.environ.setdefault("LOCAL_RANK", value)
    return arguments[1:]


def run_and_end(program: Callable[[], object]) -> NoReturn:
    """Run a whole program, and end the process with its exit code, after its threads and exit handlers, before C++
    tears itself down: there gloo's threads, about 1 time in 100, abort a process whose work was done (seen)."""
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # warnings of a store that is gone are pages of addresses
    keep_writable()
    code: object = 0
    try:
        program()
    except SystemExit as end:
        code = end.code
    except BaseException:
        traceback.print_exc()
        code = 1
    if isinstance(code, str):
        print(code, file=sys.stderr)
    threading._shutdown()  # type: ignore[attr-defined]  # as Python itself: tells idle pools to end, then joins threads
    atexit._run_exitfuncs()
    _end(None, code if isinstance(code, int) else int(code is not None))


def _name_failure() -> None:
    """Tell the other ranks that this one failed: they would take it for a lost connection."""
    from distrib.processes.heartbeat import joined

    if (me := joined()) is not None:
        me.claim_failure(began_here=True)


def _end_by_sigterm(code: int) -> None:
    """Launchers send it to the others when the first has failed; the code says what happened here."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, lambda *_: _end(None, code))


def _end(message: str | None, code: int) -> NoReturn:
    if message is not None:
        print(message, file=sys.stderr)
    for stream in (sys.stdout, sys.stderr):
        with suppress(Exception):  # it may be closed, none at all, or be written to where a signal interrupted us
            stream.flush()
    temporary.remove()
    os._exit(code)


def _run_module(module: str) -> None:
    """As `python -m`. Raises LaunchError if there is no such module."""
    for name in (module, f"{module}.__main__"):
        try:
            spec = importlib.util.find_spec(name)
        except ModuleNotFoundError as error:
            if not f"{name}.".startswith(f"{error.name}."):
                raise  # an import within one of its packages
            spec = None
        if spec is None:
            raise LaunchError(f"-m: there is no module {name!r}, neither in {os.getcwd()} nor installed")
        if spec.submodule_search_locations is None:
            break
    runpy.run_module(module, run_name="__main__", alter_sys=True)


def main() -> None:
    """Run the script or module in sys.argv as __main__."""
    del sys.argv[0]
    if sys.argv[0] == "-m":
        del sys.argv[0]
        module = sys.argv[0]
        sys.path.insert(0, os.getcwd())
        sys.exit(run_as_member(lambda: _run_module(module)))
    script = sys.argv[0]
    sys.path.insert(0, os.path.dirname(os.path.abspath(script)))
    sys.exit(run_as_member(lambda: runpy.run_path(script, run_name="__main__")))


if __name__ == "__main__":
    run_and_end(main)
