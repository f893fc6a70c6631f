"""`distrib launch`: several processes on this machine, over torch's own elastic agent."""

import logging
import os
import signal
import socket
import sys
import uuid
from collections.abc import Sequence
from pathlib import Path

import torch
from torch.distributed.elastic.multiprocessing import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from distrib.config import Config
from distrib.errors import LaunchError
from distrib.launching.member import INTERRUPTED
from distrib.plan import window_size

_USER_CODES = (2, 75)  # a member that ends so has said why


def default_processes() -> int:
    """One for each accelerator of this machine, else 1."""
    return max(1, torch.accelerator.device_count())


def train_command(arguments: Sequence[str], config: Path, overrides: Sequence[str], processes: int) -> list[str]:
    """What each rank runs for a config. What is wrong with it is found here, once: ConfigError."""
    window_size(Config.load(config, overrides), max(1, processes))
    return ["-m", "distrib", "train", *arguments]


def script_command(arguments: Sequence[str], module: bool) -> list[str]:
    """What each rank runs for a script or module of the user's. Raises LaunchError where there is no such script."""
    if not module and not Path(arguments[0]).is_file():
        raise LaunchError(f"{arguments[0]}: there is no such script in {Path.cwd()}")
    return ["-m", "distrib.launching.member", *(["-m"] if module else []), *arguments]


def launch(arguments: Sequence[str], processes: int, port: int | None = None) -> int:
    """Start `python *arguments` once for each rank, wait for all, and return the exit code.

    When one rank ends with an error the others are ended too. Raises LaunchError before any process is started.
    """
    devices = torch.accelerator.device_count()
    if processes < 1:
        raise LaunchError(f"--processes: {processes}, give 1 or more")
    if 0 < devices < processes:
        raise LaunchError(
            f"--processes: {processes}, but this machine has {devices} accelerator(s); give at most {devices}"
        )
    if port is not None:
        _check_free(port)
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // processes)))
    os.environ.update(DISTRIB_LAUNCHER="distrib", DISTRIB_LAUNCHER_PID=str(os.getpid()))
    if not devices:  # or a script with an Accelerator of its own would make each process a world of its own
        os.environ.setdefault("ACCELERATE_USE_CPU", "true")
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # we say it ourselves, in one line
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=processes,
        run_id=uuid.uuid4().hex,  # or a second launch on the same port would join this one
        rdzv_backend="c10d",
        rdzv_endpoint=f"localhost:{port or 0}",
        local_addr="127.0.0.1",
        max_restarts=0,
        monitor_interval=0.1,
    )
    try:
        elastic_launch(config, sys.executable)(*arguments)
    except ChildFailedError as error:
        return _report(error)
    except (KeyboardInterrupt, SignalException) as error:
        return 128 + error.sigval if isinstance(error, SignalException) else INTERRUPTED
    return 0


def _report(error: ChildFailedError) -> int:
    """One line about the rank that failed first; what went wrong there it has said itself."""
    rank, failure = error.get_first_failure()
    if failure.exitcode in _USER_CODES:
        return failure.exitcode
    print(f"distrib launch: rank {rank} {_how(failure)}; all processes were ended", file=sys.stderr, flush=True)
    return 1


def _how(failure: ProcessFailure) -> str:
    if failure.exitcode < 0:
        return f"was ended by {signal.Signals(-failure.exitcode).name}"
    return f"failed with exit code {failure.exitcode}"


def _check_free(port: int) -> None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except (OSError, OverflowError) as error:
            reason = error.strerror if isinstance(error, OSError) else str(error)
            raise LaunchError(f"--port: {port} cannot be used: {reason}; leave --port out to have a free one") from None
