"""The ranks' heartbeats over the job's store: which ranks have joined, which are alive, and what line each is at.

Collectives cannot tell this: if a rank is missing, they wait for half an hour or for ever, without naming it.
"""

import json
import os
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from typing import Any

from torch.distributed import DistNetworkError, TCPStore  # type: ignore[attr-defined]
from torch.distributed.distributed_c10d import PrefixStore, Store

from distrib.errors import LaunchError, and_more
from distrib.processes import gate
from distrib.processes.network import LOOPBACK, address_of, endpoint, keep_store, listen, own_address, wait_for_answer

KEPT_AT = "DISTRIB_STORE_AT"  # the address of distrib launch's store, if its ranks reach it through a relay
SILENCE = 60.0  # seconds without a heartbeat after which a rank counts as lost
_MOST_NAMES = 4  # in a message
_BEAT = 2.0  # seconds between two heartbeats
_FAILED, _JOINED = "failed", "joined"
before_exit: list[Callable[[str], None]] = []  # called with the reason if the next rank's heartbeats stop
_joined: "Heartbeat | None" = None  # this process's, once it has joined


class Heartbeat:
    """One rank's heartbeat. `everyone`: host and versions of each rank, in rank order, after `join`."""

    def __init__(self, store: Store, store_host: str, rank: int, world_size: int, host: str) -> None:
        """`store_host`: a name in messages for the process that keeps the store."""
        self.store_host, self.rank, self.world_size, self.host = store_host, rank, world_size, host
        start = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")  # torchrun keeps the store when it restarts
        self._store = PrefixStore(f"distrib/{start}", store)
        self.everyone: list[dict[str, Any]] = []
        self._watching: threading.Event | None = None
        self._heard, self._silent = 0.0, store_host

    def join(self, versions: dict[str, str | None], seconds: float, one_a_host: bool = False) -> None:
        """Wait until all ranks have joined. Later calls return at once.

        Raises LaunchError if ranks are missing, have other versions than rank 0, or if two are on one host although
        `one_a_host` is true.
        """
        global _joined
        if self.everyone:
            return
        me = {"host": self.host, "versions": versions, "one_a_host": one_a_host}
        if self._store.add(f"count/{self.rank}", 1) > 1:
            raise LaunchError(f"two processes have been started as {self.name(self.rank)}; give each its own rank")
        self._store.set(f"beat/{self.rank}", json.dumps([0, _whereabouts()]))
        self._store.set(f"came/{self.rank}", json.dumps(me))
        if self.rank == 0:
            self._store.set(_JOINED, json.dumps(self._count(seconds)))
        try:
            self._store.wait([_JOINED], timedelta(seconds=seconds + 2 * _BEAT))
            outcome = json.loads(self._store.get(_JOINED))
        except RuntimeError as error:
            raise LaunchError(
                f"rank 0 of {self.world_size} did not join within {seconds:g} s: {_first(error)}"
            ) from None
        if isinstance(outcome, str):
            raise LaunchError(outcome)
        self.everyone = outcome
        _joined = self

    def name(self, rank: int) -> str:
        """Return a rank's name for messages."""
        host = self.host if rank == self.rank else self.everyone[rank]["host"] if self.everyone else None
        return f"rank {rank} of {self.world_size}" + (f" on {host}" if host else "")

    def watch(self) -> None:
        """Start to send heartbeats, and end this process if the next rank's heartbeats stop."""
        if self._watching is None:
            self._watching, self._heard = threading.Event(), time.monotonic()
            for part in (self._exchange, self._judge):
                threading.Thread(target=part, args=(self._watching,), daemon=True).start()

    def stop(self) -> None:
        """Stop sending and watching heartbeats."""
        if self._watching is not None:
            self._watching.set()
            self._watching = None

    def claim_failure(self, began_here: bool) -> str | None:
        """Return the name of the rank that failed first. If none has and `began_here`, record this rank as the
        first."""
        try:
            first = self._store.get(_FAILED).decode() if self._store.check([_FAILED]) else None
            if first is None and began_here:
                first = self._store.compare_set(_FAILED, "", self.name(self.rank)).decode()
        except RuntimeError:  # the process that kept the store has ended
            return None
        return first

    def missing(self) -> str:
        """Return the names of the ranks whose heartbeats have stopped. Takes a few seconds."""
        try:
            before = self._beats()
            time.sleep(2 * _BEAT)
            now = self._beats()
        except RuntimeError:
            return self.store_host
        gone = [rank for rank in range(self.world_size) if before[rank] == now[rank] and rank != self.rank]
        return and_more([self.name(rank) for rank in gone], _MOST_NAMES) or "another rank"

    def whereabouts(self) -> str:
        """Describe which line each rank's main thread is at. A rank that hangs is at another line than the others."""
        try:
            beats = self._beats()
        except RuntimeError:
            return f"{self.store_host} is gone"
        places: dict[str, list[str]] = {}
        for rank, beat in enumerate(beats):
            places.setdefault(json.loads(beat)[1], []).append(self.name(rank))
        return "; ".join(f"at {place}: {and_more(names, _MOST_NAMES)}" for place, names in places.items())

    def _count(self, seconds: float) -> list[dict[str, Any]] | str:
        """On rank 0: wait for all ranks, and return host and versions of each, or what is wrong."""
        keys = [f"came/{rank}" for rank in range(self.world_size)]
        try:
            self._store.wait(keys, timedelta(seconds=seconds))
        except RuntimeError:
            came = {rank for rank, key in enumerate(keys) if self._store.check([key])}
            absent = [rank for rank in range(self.world_size) if rank not in came]
            hosts = sorted({json.loads(self._store.get(keys[rank]))["host"] for rank in came})
            return (
                f"rank {', '.join(map(str, absent))} of {self.world_size} did not join within {seconds:g} s; the "
                f"others are on {', '.join(hosts)}; check that the missing ones were started, and what they printed"
            )
        everyone = [json.loads(value) for value in self._store.multi_get(keys)]
        on_host: dict[str, int] = {}
        for rank, one in enumerate(everyone):
            first = on_host.setdefault(one["host"], rank)
            if first != rank and one["one_a_host"]:
                return (
                    f"ranks {first} and {rank} are both on {one['host']}, but LOCAL_RANK is not set; set it for each, "
                    "from 0 on every machine"
                )
            for package, version in everyone[0]["versions"].items():
                if (other := one["versions"].get(package)) != version:
                    return (
                        f"rank {rank} on {one['host']} has {package} {other}, rank 0 on {everyone[0]['host']} has "
                        f"{version}; install the same on all"
                    )
        return everyone

    def _own_connection(self) -> PrefixStore:
        return self._store.clone()  # type: ignore[attr-defined,no-any-return]

    def _beats(self) -> list[bytes]:
        store = self._own_connection()  # the main thread's connection may be blocked in a request
        store.set_timeout(timedelta(seconds=2 * _BEAT))
        beats: list[bytes] = store.multi_get([f"beat/{rank}" for rank in range(self.world_size)])
        return beats

    def _exchange(self, done: threading.Event) -> None:
        """Send heartbeats, and read the next rank's. If this machine loses the network, this may block for ever."""
        store = self._own_connection()
        neighbour, seen, beat = (self.rank + 1) % self.world_size, b"", 1
        while not done.wait(_BEAT):
            try:
                self._silent = self.store_host
                store.set(f"beat/{self.rank}", json.dumps([beat, _whereabouts()]))
                now = store.get(f"beat/{neighbour}")
                self._silent = self.name(neighbour)
            except RuntimeError:
                return
            if now != seen:
                seen, self._heard = now, time.monotonic()
            beat += 1

    def _judge(self, done: threading.Event) -> None:
        """End this process if it has read no new heartbeat for `SILENCE` seconds, unless it was suspended itself."""
        woke = time.monotonic()
        while not done.wait(_BEAT):
            slept, woke = time.monotonic() - woke, time.monotonic()
            if slept > 5 * _BEAT:
                self._heard = woke
            elif woke - self._heard > SILENCE:
                reason = f"{self.name(self.rank)} stopped: {self._silent} has not been heard of for {SILENCE:g} s"
                further = "start the run again, and it resumes from its newest checkpoint"
                print(f"{reason}; {further}", file=sys.stderr, flush=True)
                for call in before_exit:
                    with suppress(Exception):
                        call(reason)
                os._exit(1)


def joined() -> Heartbeat | None:
    """Return this process's heartbeat if it has joined before, because a script may train several times."""
    return _joined


def enter(host: str, port: int, rank: int, world_size: int, node: str, seconds: float, one_machine: bool) -> Heartbeat:
    """Connect to the job's store. If no launcher keeps one, rank 0 does.

    `one_machine`: all ranks are known to be on this machine. Sets MASTER_ADDR and MASTER_PORT to where this process
    reaches the store. Raises LaunchError.
    """
    kept_by_launcher = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    key = os.environ.pop(gate.KEY, None)  # keep it from child processes
    if one_machine:
        key = None  # the store listens on loopback only
    elif key is not None:
        gate.check_key(key)
        if kept_by_launcher:
            raise LaunchError(
                f"{gate.KEY} is set, but this launcher does not check it; use distrib launch, or unset it"
            )
    if kept_by_launcher:
        store_host = f"the launcher at {os.environ.get(KEPT_AT) or endpoint(host, port)}"
    else:
        store_host = f"rank 0 of {world_size} on {host}"
        host = LOOPBACK if one_machine else host
    if rank == 0 and not kept_by_launcher:
        store = _keep(host, port, world_size, seconds, key)
        host, port = store.host, store.port
    else:
        host = host if kept_by_launcher else address_of(host, port)
        if key is not None:
            host, port = LOOPBACK, gate.Relay(host, port, key, seconds, "rank 0").open(0)
        wait_for_answer(host, port, seconds, "rank 0 or its launcher")
        try:
            store = TCPStore(host, port, world_size, False, timedelta(seconds=seconds), wait_for_workers=False)
        except DistNetworkError as error:
            raise LaunchError(f"rendezvous at {endpoint(host, port)} failed: {_first(error)}") from None
    os.environ.update(MASTER_ADDR=host, MASTER_PORT=str(port))
    return Heartbeat(store, store_host, rank, world_size, node)


def _keep(host: str, port: int, world_size: int, seconds: float, key: str | None) -> TCPStore:
    """Start the job's store where the other ranks expect it. If there is a key, it is on loopback behind a gate."""
    try:
        server = listen(own_address(host, port), port)
        if key is not None:
            door, server = gate.Gate(server, key), listen(LOOPBACK, 0)
            door.stores[0] = server.getsockname()[1]
        return keep_store(server, world_size, seconds)
    except (OSError, DistNetworkError) as error:
        raise LaunchError(
            f"rendezvous at {endpoint(host, port)} failed: {_first(error)}; if the port is taken, choose another"
        ) from None


def _whereabouts() -> str:
    """Return the line that the main thread is at: the innermost one outside torch."""
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    while frame is not None and "/torch/" in frame.f_code.co_filename:
        frame = frame.f_back
    if frame is None:
        return "its end"
    return f"{os.path.basename(frame.f_code.co_filename)}:{frame.f_lineno} in {frame.f_code.co_name}"


def _first(error: Exception) -> str:
    return str(error).splitlines()[0]
