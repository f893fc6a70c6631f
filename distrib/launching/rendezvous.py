"""The rendezvous of the launchers of a job's machines, and the store for the ranks.

A round is a start of all ranks: the first one, or a restart after a crash. Each round has its own store for the ranks.
Launchers exchange JSON through a store. Nothing is unpickled, unlike in torch's dynamic rendezvous
(docs/decisions/0019).
"""

import json
import socket
import time
import uuid
from collections.abc import Sequence
from contextlib import suppress
from datetime import timedelta

from torch.distributed import DistError, HashStore, PrefixStore, Store, TCPStore  # type: ignore[attr-defined]
from torch.distributed.elastic.rendezvous import RendezvousHandler, RendezvousInfo, RendezvousStoreInfo
from torch.distributed.elastic.rendezvous.api import RendezvousClosedError, RendezvousTimeoutError

from distrib.errors import LaunchError
from distrib.processes.gate import Gate, Relay
from distrib.processes.network import LOOPBACK, keep_store, listen

_CLOSED = "closed"
_SECONDS_TO_ANSWER = 30.0  # timeout of a request to node 0's store
_SECONDS_TO_LEAVE = 15.0
_SECONDS_BETWEEN_LOOKS = 0.1


class NodeRendezvous(RendezvousHandler):
    """A rendezvous in which `--node-rank` decides the ranks of each node. `hosts`: of all nodes, once they have met."""

    def __init__(
        self,
        node_rank: int,
        nodes: int,
        seconds: float,
        gate: Gate | None = None,
        relay: Relay | None = None,
        port: int = 0,
    ) -> None:
        """`seconds`: how long each round waits for all nodes. With several nodes, node 0 has a `gate` and the others a
        `relay`. With one, `port` is where the store for the ranks listens; 0 means any free port."""
        self.round = -1
        self.hosts: Sequence[str] = ()
        self.node_rank, self._nodes, self._seconds = node_rank, nodes, seconds
        self._gate, self._relay, self._port = gate, relay, port
        self._me = json.dumps({"host": socket.gethostname(), "launcher": uuid.uuid4().hex})
        self._has_place = False  # whether the others count this launcher; not if its node rank was taken
        self._kept: TCPStore | None = None  # the store for the ranks in this round
        self._store: Store = HashStore() if nodes == 1 else self._launchers_store()

    def whom_it_refused(self) -> str:
        """Name the addresses that were refused for lack of the key, as the end of a sentence."""
        if self._gate is None or not self._gate.refused:
            return ""
        return f"; somebody without the --rendezvous-key came from {', '.join(sorted(self._gate.refused)[:4])}"

    def get_backend(self) -> str:
        return "distrib"

    def get_run_id(self) -> str:
        return "distrib"

    @property
    def use_agent_store(self) -> bool:
        return True  # node 0's launcher keeps the store for the ranks

    def next_rendezvous(self) -> RendezvousInfo:
        """Wait for all nodes. Raises LaunchError if two launchers gave the same node rank."""
        self.round += 1
        store = PrefixStore(str(self.round), self._store)
        self._kept = None  # close the last round's store, so that its port is free
        if self.node_rank == 0:
            try:
                server = listen(LOOPBACK, self._port)
            except OSError as error:
                raise LaunchError(
                    f"--port: port {self._port} cannot be used: {error.strerror or error}; leave --port out to have a "
                    "free one"
                ) from None
            self._kept = keep_store(server, self._nodes, self._seconds)
            port = self._kept.port
            if self._gate is not None:
                if self.round > 0:
                    del self._gate.stores[self.round]
                self._gate.stores[self.round + 1] = port
        nodes = [f"node/{rank}" for rank in range(self._nodes)]
        found = json.loads(store.compare_set(nodes[self.node_rank], "", self._me))
        if found != json.loads(self._me):
            host = found["host"]
            refusal = (
                f"--node-rank: launchers on {host} and {socket.gethostname()} both gave {self.node_rank}; give each "
                f"node its own, 0 to {self._nodes - 1}"
            )
            _tell(store, "refused", json.dumps(refusal))
            raise LaunchError(refusal)
        self._has_place = True
        store.set("begun", "")
        self._wait_for(nodes, store)
        self.hosts = [json.loads(value)["host"] for value in store.multi_get(nodes)]
        if self._relay is not None:
            port = self._port = self._relay.open(self.round + 1, self._port)  # the same port in all rounds
        return RendezvousInfo(store, self.node_rank, self._nodes, RendezvousStoreInfo(LOOPBACK, port))

    def num_nodes_waiting(self) -> int:
        """Return 1 if another node has begun the next round because its ranks failed."""
        return int(self._nodes > 1 and self._store.check([f"{self.round + 1}/begun"]))

    def is_closed(self) -> bool:
        return bool(self._store.check([_CLOSED]))

    def set_closed(self) -> None:
        _tell(self._store, _CLOSED, "")

    def shutdown(self) -> bool:
        """Close the rendezvous, so that no node begins another round. Node 0 leaves last, because it has the store."""
        if self._nodes == 1 or not self._has_place:
            return True
        with suppress(DistError):
            self.set_closed()
            _tell(self._store, f"left/{self.node_rank}", "")
            if self.node_rank == 0:
                came = [rank for rank in range(self._nodes) if self._store.check([f"{self.round}/node/{rank}"])]
                self._store.wait([f"left/{rank}" for rank in came], timedelta(seconds=_SECONDS_TO_LEAVE))
        return True

    def _launchers_store(self) -> TCPStore:
        """Return the store of the launchers. Node 0 keeps it, as store number 0 behind the gate."""
        if self._gate is not None:
            store = keep_store(listen(LOOPBACK, 0), self._nodes, _SECONDS_TO_ANSWER)
            self._gate.stores[0] = store.port
            return store
        assert self._relay is not None, "a node of several has a gate or a relay"
        return TCPStore(
            LOOPBACK,
            self._relay.open(0),
            self._nodes,
            False,
            timedelta(seconds=_SECONDS_TO_ANSWER),
            wait_for_workers=False,
        )

    def _wait_for(self, nodes: list[str], store: Store) -> None:
        deadline = time.monotonic() + self._seconds
        while not store.check(nodes):
            if store.check(["refused"]):
                raise LaunchError(json.loads(store.get("refused")))
            if self.is_closed():
                raise RendezvousClosedError
            if time.monotonic() > deadline:
                raise RendezvousTimeoutError
            time.sleep(_SECONDS_BETWEEN_LOOKS)


def _tell(store: Store, key: str, value: str) -> None:
    """Set a key, and wait until it is in the store, so that this process may end.

    `set` alone returns before that. The store handles requests in order, so the answer to `check` comes after `set`.
    """
    store.set(key, value)
    store.check([key])
