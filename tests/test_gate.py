"""Connections through the gate of a job, over real sockets on loopback."""

import hashlib
import hmac
import socket
import threading
from contextlib import suppress
from datetime import timedelta
from threading import Thread

import psutil
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributed import TCPStore

from distrib.errors import LaunchError
from distrib.processes.gate import Gate, Relay, check_key
from distrib.processes.network import LOOPBACK, endpoint, keep_store, listen, own_address, parse_endpoint

KEY = "a secret of the tests"


@pytest.fixture(scope="module")
def store() -> TCPStore:
    return keep_store(listen(LOOPBACK, 0), 2, 10)


@pytest.fixture(scope="module", params=[LOOPBACK, "::1"])
def gate(request: pytest.FixtureRequest, store: TCPStore) -> tuple[Gate, str, int]:
    """Start a gate, and return it with its address and port."""
    try:
        server = listen(request.param, 0)
    except OSError:
        pytest.skip("this machine has no IPv6")
    gate = Gate(server, KEY)
    gate.stores[0] = store.port
    return gate, request.param, server.getsockname()[1]


def test_the_right_key_reaches_the_store(gate: tuple[Gate, str, int], store: TCPStore) -> None:
    _, host, port = gate
    relay = Relay(host, port, KEY, 10, "rank 0")
    far = TCPStore(LOOPBACK, relay.open(0), 2, False, timedelta(seconds=10), wait_for_workers=False)
    large = "x" * 1_000_000
    far.set("from-there", large)
    store.set("from-here", "y")
    assert store.get("from-there") == large.encode()
    assert far.get("from-here") == b"y"


def test_one_relay_port_serves_the_stores_of_all_rounds(gate: tuple[Gate, str, int]) -> None:
    """However often the ranks restart, no listener or thread is left behind."""
    there, host, port = gate
    relay, way = Relay(host, port, KEY, 10, "rank 0"), 0
    threads = threading.active_count()
    for number in (1, 2, 3):
        of_round = keep_store(listen(LOOPBACK, 0), 2, 10)
        of_round.set("round", str(number))
        there.stores[number] = of_round.port
        way = relay.open(number, way)
        far = TCPStore(LOOPBACK, way, 2, False, timedelta(seconds=10), wait_for_workers=False)
        assert far.get("round") == str(number).encode()
    assert threading.active_count() == threads + 1


def test_another_key_is_refused_on_both_sides(gate: tuple[Gate, str, int]) -> None:
    there, host, port = gate
    with pytest.raises(LaunchError, match="rank 0 has another key; give the same --rendezvous-key"):
        Relay(host, port, "another secret of theirs", 10, "rank 0")
    assert there.refused == {host}


def test_a_gate_without_the_key_is_refused() -> None:
    """It would accept everybody, to see what they send."""
    server = listen(LOOPBACK, 0)

    def pretend() -> None:
        connection, _ = server.accept()
        connection.sendall(b"distrib rendezvous 1\n" + bytes(32))
        connection.recv(68)
        connection.sendall(hmac.digest(b"a guess", bytes(68), hashlib.sha256))

    Thread(target=pretend, daemon=True).start()
    with pytest.raises(LaunchError, match="rank 0 has another key"):
        Relay(LOOPBACK, server.getsockname()[1], KEY, 10, "rank 0")


def test_a_gate_that_closes_before_it_answers_is_retried(store: TCPStore) -> None:
    """It may be restarting, and has not refused anybody."""
    server = listen(LOOPBACK, 0)
    port = server.getsockname()[1]

    def go_away_and_come_back() -> None:
        connection, _ = server.accept()
        connection.sendall(b"distrib rendezvous 1\n" + bytes(32))
        connection.recv(68, socket.MSG_WAITALL)
        connection.close()
        Gate(server, KEY).stores[0] = store.port

    Thread(target=go_away_and_come_back, daemon=True).start()
    Relay(LOOPBACK, port, KEY, 10, "rank 0")


def test_another_program_at_the_port_is_detected() -> None:
    server = listen(LOOPBACK, 0)

    def greet() -> None:
        while True:
            connection, _ = server.accept()
            connection.sendall(b"SSH-2.0-OpenSSH_9.2p1 Debian-2+deb12u3\r\n" * 2)

    Thread(target=greet, daemon=True).start()
    with pytest.raises(LaunchError, match="another program listens there"):
        Relay(LOOPBACK, server.getsockname()[1], KEY, 0.1, "rank 0")


@given(st.binary(max_size=200))
@settings(max_examples=50)
def test_other_bytes_never_reach_the_store(gate: tuple[Gate, str, int], junk: bytes) -> None:
    _, host, port = gate
    with socket.create_connection((host, port), timeout=10) as stranger, suppress(ConnectionError):
        stranger.sendall(junk)
        stranger.shutdown(socket.SHUT_WR)
        answer = b""
        while part := stranger.recv(1000):
            answer += part
        greeting = len(b"distrib rendezvous 1\n") + 32
        assert len(answer[:greeting]) == greeting
        assert answer[greeting:] == (b"" if len(junk) < 68 else bytes(32))  # the refusal, if the bytes were enough


def test_a_key_must_not_be_short() -> None:
    check_key("0123456789abcdef")
    with pytest.raises(LaunchError, match="it has 5 characters, give 16 or more"):
        check_key("short")


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("node0:29500", ("node0", 29500)),
        ("10.0.0.1:1", ("10.0.0.1", 1)),
        ("[::1]:29500", ("::1", 29500)),
        ("::1:29500", None),
        ("node0", None),
        ("node0:", None),
        (":29500", None),
        ("[]:29500", None),
        ("node0:0", None),
        ("node0:65536", None),
        ("node0:²", None),
    ],
)
def test_endpoints(text: str, found: tuple[str, int] | None) -> None:
    assert parse_endpoint(text) == found
    assert found is None or endpoint(*found) == text


def test_the_own_address_towards_loopback() -> None:
    assert own_address("127.0.0.1", 1) == "127.0.0.1"
    assert own_address("localhost", 1) in ("127.0.0.1", "::1")
    with pytest.raises(LaunchError, match=r"rendezvous at nowhere\.invalid:1 failed"):
        own_address("nowhere.invalid", 1)
    with pytest.raises(LaunchError, match=r"rendezvous at nowhere\.invalid:1 failed"):
        own_address("nowhere.invalid", 1, seconds=0.3)


def test_the_rendezvous_address_ignores_gloos_interface(monkeypatch: pytest.MonkeyPatch) -> None:
    addresses = [
        (interface, one.address)
        for interface, several in psutil.net_if_addrs().items()
        for one in several
        if one.family == socket.AF_INET
    ]
    for interface, _ in addresses:
        monkeypatch.setenv("GLOO_SOCKET_IFNAME", interface)
        for _, address in addresses:
            assert own_address(address, 1) == address
