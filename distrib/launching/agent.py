"""torch's elastic agent, as `distrib launch` needs it: nodes keep the ranks they were given, ranks hear what the
launcher hears, and what the user must mend is not restarted."""

import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from datetime import timedelta
from typing import Any

import psutil
from torch.distributed import DistError, DistStoreError, Store  # type: ignore[attr-defined]
from torch.distributed.elastic.agent.server.api import RunResult, WorkerGroup, WorkerState
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing.errors import ProcessFailure
from torch.distributed.elastic.rendezvous import RendezvousInfo
from torch.distributed.elastic.rendezvous.api import RendezvousError
from torch.distributed.elastic.rendezvous.dynamic_rendezvous import DynamicRendezvousHandler

from distrib import presence
from distrib.errors import LaunchError
from distrib.stopping import SAVED

USER_CODES = (2, SAVED)  # a member that ends so has said why, and would do so again
_SECONDS_TO_SAY_RANKS = 10.0
_SECONDS_TO_FOLLOW = 10.0
_SECONDS_TO_LEAVE = 15.0


class StoppedBeforeRanks(Exception):  # noqa: N818, it is a signal
    """Asked to stop while there was no rank yet to pass it on to."""


class NodeRendezvous(DynamicRendezvousHandler):
    """Launchers meet; each node's ranks follow from the `--node-rank` that its user gave, not from its address."""

    node_rank = 0
    hosts: Sequence[str] = ()  # of the nodes, when they have met
    _meeting: Store | None = None

    def next_rendezvous(self) -> RendezvousInfo:
        """Raises LaunchError where two launchers gave the same node rank."""
        self._bootstrap_store_info = None  # or the ranks would find in their store what those before a restart left
        self._shared_tcp_store_server = None
        info = super().next_rendezvous()
        self._meeting = info.store
        keys = [f"distrib/node/{rank}" for rank in range(info.world_size)]
        info.store.set(keys[self.node_rank], socket.gethostname())
        try:
            info.store.wait(keys, timedelta(seconds=_SECONDS_TO_SAY_RANKS))
        except DistStoreError:
            absent = [str(rank) for rank, key in enumerate(keys) if not info.store.check([key])]
            raise LaunchError(
                f"--node-rank: {info.world_size} launchers came, but none with node rank {', '.join(absent)}; give "
                f"each node its own, 0 to {info.world_size - 1}"
            ) from None
        self.hosts = [host.decode() for host in info.store.multi_get(keys)]
        return RendezvousInfo(info.store, self.node_rank, info.world_size, info.bootstrap_store_info)  # type: ignore[arg-type]

    def leave(self) -> None:
        """Node 0 keeps the store at which the others look for one another: it leaves last."""
        if self._meeting is not None:
            with suppress(DistError):
                self._meeting.set(f"distrib/left/{self.node_rank}", "")
                if self.node_rank == 0:
                    everyone = [f"distrib/left/{rank}" for rank in range(self.settings.max_nodes)]
                    self._meeting.wait(everyone, timedelta(seconds=_SECONDS_TO_LEAVE))
        with suppress(RendezvousError, DistError):
            self.shutdown()


class Agent(LocalElasticAgent):
    """Watches this machine's ranks. `grace`: seconds that they have to save when they are asked to stop."""

    def __init__(self, *args: Any, grace: float, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.grace = grace
        self.asked: signal.Signals | None = None  # to stop, first by this
        self.interrupts = 0
        self.killed = False
        self._deadline = 0.0
        self._looked = 0.0

    def start_watchdog(self, lost: str) -> None:
        """Say `lost` and end all where node 0's store does not answer: torch waits for it in C++, without an end."""
        threading.Thread(target=self._watchdog, args=(lost,), daemon=True).start()

    def _watchdog(self, lost: str) -> None:
        woke = self._looked = time.monotonic()
        while True:
            time.sleep(1)
            slept, woke = time.monotonic() - woke, time.monotonic()
            if slept > 10 or self.get_worker_group().state is not WorkerState.HEALTHY:  # suspended, or not waiting
                self._looked = woke
            elif woke - self._looked > presence.SILENCE:
                say(lost)
                _kill(_ranks())
                os._exit(1)

    def handle(self, number: int, _frame: Any) -> None:
        """Pass a signal on to the ranks, which save and end; on a second SIGINT end them at once."""
        self.interrupts += number == signal.SIGINT
        if self.interrupts > 1:
            self._kill_ranks()
        ranks = _ranks()
        if self.asked is None:
            self.asked, self._deadline = signal.Signals(number), time.monotonic() + self.grace
            if not ranks and self.get_worker_group().state in (WorkerState.INIT, WorkerState.STOPPED):
                raise StoppedBeforeRanks
        for rank in ranks:
            with suppress(ProcessLookupError):
                os.kill(rank, signal.SIGTERM if number == signal.SIGHUP else number)

    def _start_workers(self, worker_group: WorkerGroup) -> dict[int, Any]:
        if self.asked is not None:  # while those before were being ended, to start again
            raise StoppedBeforeRanks
        workers: dict[int, Any] = super()._start_workers(worker_group)
        return workers

    def _monitor_workers(self, worker_group: WorkerGroup) -> RunResult:
        self._looked = time.monotonic()
        if self.asked is not None and time.monotonic() > self._deadline:
            self._kill_ranks()
        self._hurry_after_failure()
        result: RunResult = super()._monitor_workers(worker_group)
        if result.state is WorkerState.FAILED:
            rank, failure = first_failure(result)
            if self.asked is not None or failure.exitcode in USER_CODES:
                self._remaining_restarts = 0
            elif self._remaining_restarts > 0:
                attempt = worker_group.spec.max_restarts - self._remaining_restarts + 1
                say(
                    f"rank {rank} {how(failure)}; starting all again, restart {attempt} of "
                    f"{worker_group.spec.max_restarts}"
                )
        return result

    def _hurry_after_failure(self) -> None:
        """Where a rank has failed the others soon do so too, but for one that hangs: torch gives it 30 s."""
        for pid in self._pcontext.pids().values() if self._pcontext is not None else ():
            with suppress(ChildProcessError):
                ended = os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
                if ended is not None and ended.si_status != 0:
                    timer = threading.Timer(_SECONDS_TO_FOLLOW, _kill, [_ranks()])
                    timer.daemon = True
                    timer.start()
                    return

    def _kill_ranks(self) -> None:
        self.killed = True
        _kill(_ranks())


def say(what: str) -> None:
    """What the ranks cannot say themselves."""
    print(f"distrib launch: {what}", file=sys.stderr, flush=True)


def first_failure(result: RunResult) -> tuple[int, ProcessFailure]:
    """The rank that ended first, and how."""
    return min(result.failures.items(), key=lambda item: item[1].timestamp)


def how(failure: ProcessFailure) -> str:
    """As part of a sentence."""
    if failure.exitcode >= 0:
        return f"failed with exit code {failure.exitcode}"
    number = signal.Signals(-failure.exitcode)
    return f"was ended by {number.name}{' (out of memory?)' if number == signal.SIGKILL else ''}"


def _kill(ranks: list[int]) -> None:
    for rank in ranks:
        with suppress(ProcessLookupError):
            os.killpg(rank, signal.SIGKILL)  # each leads a group, of its workers


def _ranks() -> list[int]:
    """The processes that this one started and that still run."""
    children = psutil.Process().children()
    return [child.pid for child in children if child.is_running() and child.status() != psutil.STATUS_ZOMBIE]
