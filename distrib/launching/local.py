"""`distrib launch`: several processes on this machine, and on others where it is started too, over torch's own elastic
agent."""

import logging
import os
import signal
import socket
import sys
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
from torch.distributed import DistError
from torch.distributed.elastic.agent.server.api import RunResult, WorkerSpec
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
from torch.distributed.elastic.rendezvous import RendezvousParameters
from torch.distributed.elastic.rendezvous.api import RendezvousClosedError, RendezvousError, RendezvousTimeoutError
from torch.distributed.elastic.rendezvous.c10d_rendezvous_backend import create_backend
from torch.distributed.elastic.rendezvous.dynamic_rendezvous import RendezvousTimeout

from distrib import presence, tuning
from distrib.config import Config
from distrib.errors import LaunchError
from distrib.launching.agent import USER_CODES, Agent, NodeRendezvous, StoppedBeforeRanks, first_failure, how, say
from distrib.launching.member import INTERRUPTED
from distrib.plan import window_size
from distrib.stopping import SAVED

_SECONDS_TO_ANSWER = 30  # for node 0's launcher, to another's question
_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)


@dataclass(frozen=True)
class Options:
    """Of `distrib launch`, by the names that it has there; times are in seconds."""

    processes: int = 1  # on this machine
    port: int | None = None
    nodes: int = 1
    node_rank: int | None = None
    rendezvous: str | None = None  # HOST:PORT of node 0
    max_restarts: int = 0
    grace: float = 30.0
    join_timeout: float = 300.0

    def check(self) -> None:
        """Raises LaunchError where they do not fit together, or this machine."""
        devices = torch.accelerator.device_count()
        if self.processes < 1:
            raise LaunchError(f"--processes: {self.processes}, give 1 or more")
        if 0 < devices < self.processes:
            raise LaunchError(
                f"--processes: {self.processes}, but this machine has {devices} accelerator(s); give at most {devices}"
            )
        if self.nodes == 1:
            if self.node_rank or self.rendezvous:
                raise LaunchError("--node-rank and --rendezvous are for several machines; give --nodes N too")
            if self.port is not None:
                _check_free(self.port, "--port", "leave --port out to have a free one")
            return
        if self.node_rank is None or self.rendezvous is None or self.port is not None:
            raise LaunchError(
                f"--nodes: {self.nodes}, so give --node-rank R (0 to {self.nodes - 1}) and --rendezvous HOST:PORT of "
                "node 0, the same on all, and no --port"
            )
        if not 0 <= self.node_rank < self.nodes:
            raise LaunchError(f"--node-rank: {self.node_rank}, give 0 to {self.nodes - 1}")
        if not self.rendezvous.rpartition(":")[0] or not self.rendezvous.rpartition(":")[2].isdecimal():
            raise LaunchError(f"--rendezvous: {self.rendezvous!r}, give HOST:PORT of node 0")
        if self.node_rank == 0:
            _check_free(int(self.rendezvous.rpartition(":")[2]), "--rendezvous", "choose another, the same on all")


def default_processes() -> int:
    """One for each accelerator of this machine, else 1."""
    return max(1, torch.accelerator.device_count())


def train_command(arguments: Sequence[str], config: Path, overrides: Sequence[str], world_size: int) -> list[str]:
    """What each rank runs for a config. What is wrong with it is found here, once: ConfigError."""
    window_size(Config.load(config, overrides), max(1, world_size))
    return ["-m", "distrib", "train", *arguments]


def script_command(arguments: Sequence[str], module: bool) -> list[str]:
    """What each rank runs for a script or module of the user's. Raises LaunchError where there is no such script."""
    if not module and not Path(arguments[0]).is_file():
        raise LaunchError(f"{arguments[0]}: there is no such script in {Path.cwd()}")
    return ["-m", "distrib.launching.member", *(["-m"] if module else []), *arguments]


def launch(arguments: Sequence[str], options: Options) -> int:
    """Start `python *arguments` once for each rank of this machine, wait for all, and return the exit code.

    When one rank ends with an error the others are ended too, on all machines. Raises LaunchError before any process
    is started.
    """
    options.check()
    os.environ.setdefault("OMP_NUM_THREADS", str(tuning.threads(options.processes)))
    os.environ.update(
        DISTRIB_LAUNCHER="distrib",
        DISTRIB_GRACE=f"{options.grace:g}",
        DISTRIB_JOIN_TIMEOUT=f"{options.join_timeout:g}",
        TORCHELASTIC_SIGNALS_TO_HANDLE="SIGQUIT",  # the others are handled here
    )
    if not torch.accelerator.device_count():
        # or a script with an Accelerator of its own would make each process a world of its own
        os.environ.setdefault("ACCELERATE_USE_CPU", "true")
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # we say it ourselves, in one line
    rendezvous = _rendezvous(options)
    spec = WorkerSpec(
        role="default",
        local_world_size=options.processes,
        entrypoint=sys.executable,
        args=tuple(arguments),
        rdzv_handler=rendezvous,
        max_restarts=options.max_restarts,
        monitor_interval=0.1,
    )
    agent = Agent(spec, DefaultLogsSpecs(), grace=options.grace)
    if options.node_rank:
        agent.start_watchdog(f"node 0's launcher at {options.rendezvous} does not answer; ending all")
    for number in _SIGNALS:
        if signal.getsignal(number) is not signal.SIG_IGN:  # by nohup
            signal.signal(number, agent.handle)
    try:
        result = agent.run()
    except StoppedBeforeRanks:
        return SAVED
    except RendezvousTimeoutError:
        absent = (
            f"not all of {options.nodes} nodes came to {options.rendezvous} within {options.join_timeout:g} s; start "
            f"distrib launch on each, with --node-rank 0 to {options.nodes - 1}"
        )
        if not rendezvous.hosts:
            raise LaunchError(absent) from None
        say(absent)
        return 1
    except RendezvousClosedError:
        say("another machine's launcher gave up; all processes here were ended")
        return 1
    except (RendezvousError, DistError):
        where = f"on {rendezvous.hosts[0]} ({options.rendezvous})" if rendezvous.hosts else f"at {options.rendezvous}"
        say(f"lost contact with node 0's launcher {where}; all processes here were ended")
        return 1
    finally:
        rendezvous.leave()
    return _outcome(agent, result, options)


def _outcome(agent: Agent, result: RunResult, options: Options) -> int:
    """The exit code of a launch whose ranks have ended; says what they could not say themselves."""
    if not result.is_failed():
        return 0
    rank, failure = first_failure(result)
    if agent.interrupts > 1:
        return INTERRUPTED
    if agent.killed and agent.asked is not None:
        say(f"the ranks did not save within {options.grace:g} s of {agent.asked.name} and were killed (--grace)")
        return 128 + agent.asked
    if agent.asked is not None and failure.exitcode in (*(-number for number in _SIGNALS), INTERRUPTED):
        # by the signal itself, for which only training has a handler
        say("asked to stop before training began; start it again")
        return SAVED
    if failure.exitcode in USER_CODES:
        if options.node_rank and failure.exitcode == SAVED:  # rank 0 said it on another machine
            say("asked to stop; saved, start it again to go on")
        return failure.exitcode
    say(f"rank {rank} {how(failure)}; all processes were ended")
    return 1


def _rendezvous(options: Options) -> NodeRendezvous:
    """Where the launchers of all machines meet. Raises LaunchError where node 0's cannot be reached."""
    node_rank, endpoint = options.node_rank or 0, options.rendezvous or f"localhost:{options.port or 0}"
    host, _, port = endpoint.rpartition(":")
    if node_rank > 0:
        presence.wait_for_answer(host, int(port), options.join_timeout, "node 0's distrib launch")
    parameters = RendezvousParameters(
        backend="c10d",
        endpoint=endpoint,
        run_id="distrib" if options.nodes > 1 else uuid.uuid4().hex,  # or a second launch on the port would join
        min_nodes=options.nodes,
        max_nodes=options.nodes,
        is_host=node_rank == 0,
        read_timeout=_SECONDS_TO_ANSWER,
    )
    backend, store = create_backend(parameters)
    handler: NodeRendezvous = NodeRendezvous.from_backend(
        parameters.run_id,
        store,
        backend,
        options.nodes,
        options.nodes,
        presence.own_address(host, int(port)) if options.nodes > 1 else "127.0.0.1",
        RendezvousTimeout(join=timedelta(seconds=options.join_timeout)),
    )
    handler.node_rank = node_rank
    return handler


def _check_free(port: int, option: str, advice: str) -> None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except (OSError, OverflowError) as error:
            reason = error.strerror if isinstance(error, OSError) else str(error)
            raise LaunchError(f"{option}: port {port} cannot be used: {reason}; {advice}") from None
