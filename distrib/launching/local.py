"""`distrib launch`: starts one process for each rank on this machine, with torch's elastic agent. For a run on several
machines, it is started on each."""

import logging
import os
import signal
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch.distributed import DistError
from torch.distributed.elastic.agent.server.api import RunResult, WorkerSpec
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
from torch.distributed.elastic.rendezvous.api import RendezvousClosedError, RendezvousError, RendezvousTimeoutError

from distrib.config import Config
from distrib.errors import LaunchError
from distrib.launching.agent import USER_CODES, Agent, StoppedBeforeRanks, first_failure, how, say
from distrib.launching.rendezvous import NodeRendezvous
from distrib.plan import window_size
from distrib.processes import gate, network, tuning
from distrib.processes.heartbeat import KEPT_AT
from distrib.processes.lifetimes import LAUNCHER, STOP_SIGNALS
from distrib.processes.signals import INTERRUPTED, SAVED, handle, nothing_to_save
from distrib.processes.variables import check_threads


@dataclass(frozen=True)
class Options:
    """The options of `distrib launch`, under their names there. Times are in seconds."""

    processes: int = 1  # on this machine
    port: int | None = None
    nodes: int = 1
    node_rank: int | None = None
    rendezvous: str | None = None  # HOST:PORT of node 0
    rendezvous_key: str | None = field(default=None, repr=False)  # for several machines, the same on all
    max_restarts: int = 0
    grace: float = 30.0
    join_timeout: float = 300.0

    def check(self) -> None:
        """Raise LaunchError if the options contradict each other, or do not fit this machine."""
        check_threads(os.environ)
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
            return
        if self.node_rank is None or self.rendezvous is None or self.port is not None:
            raise LaunchError(
                f"--nodes: {self.nodes}, so give --node-rank R (0 to {self.nodes - 1}) and --rendezvous HOST:PORT of "
                "node 0, the same on all, and no --port"
            )
        if not 0 <= self.node_rank < self.nodes:
            raise LaunchError(f"--node-rank: {self.node_rank}, give 0 to {self.nodes - 1}")
        if network.parse_endpoint(self.rendezvous) is None:
            raise LaunchError(
                f"--rendezvous: {self.rendezvous!r}, give HOST:PORT of node 0, an IPv6 address as [ADDRESS]:PORT"
            )
        if self.rendezvous_key is None:
            raise LaunchError(
                f"--rendezvous-key: --nodes {self.nodes} needs a secret, the same on all machines, or anybody on the "
                f"network could join; make one by `openssl rand -hex 16`, and set {gate.KEY} to it on each"
            )
        gate.check_key(self.rendezvous_key)


def default_processes() -> int:
    """Return the number of accelerators of this machine, at least 1."""
    return max(1, torch.accelerator.device_count())


def train_command(arguments: Sequence[str], config: Config, world_size: int) -> list[str]:
    """Return the command of each rank for a config. Raises ConfigError if the batch size does not fit `world_size`."""
    window_size(config, max(1, world_size))
    return ["-m", "distrib", "train", *arguments]


def script_command(arguments: Sequence[str], module: bool) -> list[str]:
    """Return the command of each rank for the user's script or module. Raises LaunchError if the script is missing."""
    if not module and not Path(arguments[0]).is_file():
        raise LaunchError(f"{arguments[0]}: there is no such script in {Path.cwd()}")
    return ["-m", "distrib.processes.exit", *(["-m"] if module else []), *arguments]


def launch(arguments: Sequence[str], options: Options) -> int:
    """Start `python *arguments` once for each rank of this machine, wait for all, and return the exit code.

    If one rank fails, the ranks of all machines are ended. Raises LaunchError before any process is started.
    """
    options.check()
    os.environ.pop(gate.KEY, None)  # keep the key from the ranks and their child processes
    os.environ.setdefault("OMP_NUM_THREADS", str(tuning.threads(options.processes)))
    os.environ.update(
        DISTRIB_LAUNCHER="distrib",
        **{LAUNCHER: str(os.getpid())},
        DISTRIB_GRACE=f"{options.grace:g}",
        DISTRIB_JOIN_TIMEOUT=f"{options.join_timeout:g}",
        TORCHELASTIC_SIGNALS_TO_HANDLE="SIGQUIT",  # this module handles the others
    )
    if not torch.accelerator.device_count():
        # without it, an Accelerator in the user's script would take each process for a run of its own
        os.environ.setdefault("ACCELERATE_USE_CPU", "true")
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # distrib reports failures in one line
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
    logs = DefaultLogsSpecs(os.devnull)  # ranks share the launcher's output, so torch needs no folder for logs
    agent = Agent(spec, logs, grace=options.grace)
    if options.node_rank:
        agent.start_watchdog(f"node 0's launcher at {options.rendezvous} does not answer; ending all")
    handle(STOP_SIGNALS, agent.handle)
    try:
        result = agent.run()
    except StoppedBeforeRanks:
        nothing_to_save(agent.asked or signal.SIGTERM)
        return SAVED
    except RendezvousTimeoutError:
        absent = (
            f"not all of {options.nodes} nodes came to {options.rendezvous} within {options.join_timeout:g} s; start "
            f"distrib launch on each, with --node-rank 0 to {options.nodes - 1}"
        ) + rendezvous.whom_it_refused()
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
        rendezvous.shutdown()
    return _outcome(agent, result, options)


def _outcome(agent: Agent, result: RunResult, options: Options) -> int:
    """Return the exit code after the ranks have ended, and print why they ended if they could not."""
    if not result.is_failed():
        return 0
    rank, failure = first_failure(result)
    if agent.interrupts > 1:
        return INTERRUPTED
    if agent.killed and agent.asked is not None:
        say(f"the ranks did not save within {options.grace:g} s of {agent.asked.name} and were killed (--grace)")
        return 128 + agent.asked
    if (left := agent.left(result)) is not None:
        nothing_to_save(left)
        return SAVED
    if failure.exitcode in USER_CODES:
        if options.node_rank and failure.exitcode == SAVED:  # rank 0 has printed it, but on another machine
            say("asked to stop; saved, start it again to go on")
        return failure.exitcode
    say(f"rank {rank} {how(failure)}; all processes were ended")
    return 1


def _rendezvous(options: Options) -> NodeRendezvous:
    """Make the rendezvous of the launchers. With one machine, it listens on loopback only.

    Raises LaunchError if node 0 cannot be reached, or has another key.
    """
    if options.nodes == 1:
        _use_interface_of(network.LOOPBACK)
        return NodeRendezvous(0, 1, options.join_timeout, port=options.port or 0)
    found = network.parse_endpoint(options.rendezvous or "")
    assert found is not None, "checked"
    assert options.rendezvous_key is not None, "checked"
    host, port = found
    os.environ[KEPT_AT] = network.endpoint(host, port)
    if options.node_rank == 0:
        address = network.own_address(host, port, options.join_timeout)  # its name may become known late
        _use_interface_of(address)
        try:
            door = gate.Gate(network.listen(address, port), options.rendezvous_key)
        except OSError as error:
            raise LaunchError(
                f"--rendezvous: port {port} cannot be used: {error.strerror or error}; choose another, the same on all"
            ) from None
        return NodeRendezvous(0, options.nodes, options.join_timeout, gate=door)
    # The relay waits first: if machines start together, node 0's name may not resolve yet.
    relay = gate.Relay(host, port, options.rendezvous_key, options.join_timeout, "node 0's distrib launch")
    _use_interface_of(network.own_address(host, port))
    return NodeRendezvous(options.node_rank or 0, options.nodes, options.join_timeout, relay=relay)


def _use_interface_of(address: str) -> None:
    """Make gloo use only the interface that has this address. For loopback, also NCCL's bootstrap."""
    if (interface := network.interface_of(address)) is not None:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
        if address == network.LOOPBACK:
            os.environ.setdefault("NCCL_SOCKET_IFNAME", interface)
