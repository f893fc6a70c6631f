"""How ranks find the job's store."""

import socket

import pytest
from conftest import free_port

from distrib.processes.heartbeat import enter


def test_ranks_find_the_store_by_their_machines_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a SLURM job with several tasks per node. The name may resolve to loopback, where rank 0 does not listen."""
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "")  # restored after the test
    host, port = socket.gethostname(), free_port()
    first, second = (enter(host, port, rank, 2, "here", 10.0, one_machine=False) for rank in (0, 1))
    assert first.claim_failure(began_here=True) in (None, "rank 0 of 2 on here")
    assert second.claim_failure(began_here=False) == "rank 0 of 2 on here"
