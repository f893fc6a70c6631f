"""torch's elastic agent, adapted for `distrib launch`: it passes signals on to the ranks, and does not restart them
after an error of the user."""

import os
import signal
import sys
import threading
import time
from contextlib import suppress
from typing import Any

import psutil
from torch.distributed.elastic.agent.server.api import RunResult, WorkerGroup, WorkerState
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

from distrib.launching.rendezvous import NodeRendezvous
from distrib.processes import heartbeat
from distrib.processes.lifetimes import STOP_SIGNALS
from distrib.processes.signals import INTERRUPTED, LEAVE_SIGNALS, SAVED

USER_CODES = (2, SAVED)  # a process that exits with one of these has printed why, and would exit so again
_SECONDS_TO_FOLLOW = 10.0


class StoppedBeforeRanks(Exception):  # noqa: N818, it is a signal
    """The launcher was asked to stop before it had started a rank."""


class Agent(LocalElasticAgent):
    """Starts and monitors this machine's ranks. `grace`: seconds they have to save after a request to stop."""

    def __init__(self, *args: Any, grace: float, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.grace = grace
        self.asked: signal.Signals | None = None  # the first signal that asked to stop
        self.interrupts = 0
        self.killed = False
        self._deadline = 0.0
        self._looked = 0.0

    def start_watchdog(self, lost: str) -> None:
        """Print `lost` and kill the ranks if node 0's store does not answer, because torch waits for it without a
        timeout."""
        threading.Thread(target=self._watchdog, args=(lost,), daemon=True).start()

    def _watchdog(self, lost: str) -> None:
        woke = self._looked = time.monotonic()
        while True:
            time.sleep(1)
            slept, woke = time.monotonic() - woke, time.monotonic()
            if slept > 10 or self.get_worker_group().state is not WorkerState.HEALTHY:  # suspended, or not waiting
                self._looked = woke
            elif woke - self._looked > heartbeat.SILENCE:
                say(lost)
                _kill(_ranks())
                os._exit(1)

    def handle(self, number: int, _frame: Any) -> None:
        """Pass a signal on to the ranks, which save and end. On a second SIGINT, kill them at once."""
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
                os.kill(rank, number)

    def _rendezvous(self, worker_group: WorkerGroup) -> None:
        """Count a restart on every machine, also if its own ranks had not failed."""
        super()._rendezvous(worker_group)
        rendezvous = worker_group.spec.rdzv_handler
        assert isinstance(rendezvous, NodeRendezvous), "as launch made it"
        self._remaining_restarts = worker_group.spec.max_restarts - rendezvous.round

    def _start_workers(self, worker_group: WorkerGroup) -> dict[int, Any]:
        if self.asked is not None:  # the request came during a restart
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
            if self.asked is not None or self.left(result) is not None or failure.exitcode in USER_CODES:
                self._remaining_restarts = 0
            elif self._remaining_restarts > 0:
                attempt = worker_group.spec.max_restarts - self._remaining_restarts + 1
                say(
                    f"rank {rank} {how(failure)}; starting all again, restart {attempt} of "
                    f"{worker_group.spec.max_restarts}"
                )
        return result

    def left(self, result: RunResult) -> signal.Signals | None:
        """Return the signal that ended a rank before it trained; None otherwise. While it trains, a rank handles it."""
        for failure in result.failures.values():
            if self.asked is not None and failure.exitcode in (*(-number for number in STOP_SIGNALS), INTERRUPTED):
                return self.asked
            if -failure.exitcode in LEAVE_SIGNALS:
                return signal.Signals(-failure.exitcode)
        return None

    def _hurry_after_failure(self) -> None:
        """Kill the ranks 10 s after one has failed. Most fail soon after it, but torch waits 30 s for one that
        hangs."""
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
    """Print a message that the ranks cannot print."""
    print(f"distrib launch: {what}", file=sys.stderr, flush=True)


def first_failure(result: RunResult) -> tuple[int, ProcessFailure]:
    """Return the rank that failed first, and its failure."""
    return min(result.failures.items(), key=lambda item: item[1].timestamp)


def how(failure: ProcessFailure) -> str:
    """Describe a failure, as part of a sentence."""
    if failure.exitcode >= 0:
        return f"failed with exit code {failure.exitcode}"
    number = signal.Signals(-failure.exitcode)
    return f"was ended by {number.name}{' (out of memory?)' if number == signal.SIGKILL else ''}"


def _kill(ranks: list[int]) -> None:
    for rank in ranks:
        with suppress(ProcessLookupError):
            os.killpg(rank, signal.SIGKILL)  # a rank's workers are in its process group


def _ranks() -> list[int]:
    """Return the process ids of this machine's running ranks."""
    return [child.pid for child in psutil.Process().children() if _runs(child)]


def _runs(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
