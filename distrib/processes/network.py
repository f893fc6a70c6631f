"""Addresses of this machine, and sockets that listen on one of them.

torch's TCPStore would listen on all interfaces, without authentication. So it is given a socket that listens on one.
"""

import ipaddress
import os
import socket
import time
from contextlib import suppress
from datetime import timedelta

import psutil
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from distrib.errors import LaunchError

LOOPBACK = "127.0.0.1"
_UNASSIGNED = ("192.0.2.1", "2001:db8::1")  # addresses for documentation, RFC 5737 and RFC 3849


def parse_endpoint(endpoint: str) -> tuple[str, int] | None:
    """Return host and port of HOST:PORT, 10.0.0.1:PORT or [fd00::1]:PORT; None if it is not of that form."""
    host, _, port = endpoint.rpartition(":")
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
    elif ":" in host:
        return None
    if not host or not (port.isascii() and port.isdecimal()) or not 0 < int(port) < 65536:
        return None
    return host, int(port)


def endpoint(host: str, port: int) -> str:
    """Return HOST:PORT as users write it, [HOST]:PORT for an IPv6 address."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def listen(address: str, port: int) -> socket.socket:
    """Listen on one address of this machine; port 0 means any free one. Raises OSError."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    if not 0 <= port < 65536:
        raise OSError(None, "ports are 0 to 65535")
    return socket.create_server((address, port), family=family, backlog=4096)


def keep_store(server: socket.socket, world_size: int, seconds: float) -> TCPStore:
    """Start a TCPStore that listens on `server`."""
    address, port = server.getsockname()[:2]
    return TCPStore(
        address,
        port,
        world_size,
        True,
        timedelta(seconds=seconds),
        wait_for_workers=False,
        multi_tenant=True,
        master_listen_fd=server.detach(),
    )


def own_address(host: str, port: int, seconds: float = 0.0) -> str:
    """Return this machine's address on the interface towards `host`. Raises LaunchError.

    `seconds`: how long to wait until the name is known. GLOO_SOCKET_IFNAME is ignored, because the other ranks connect
    to the rendezvous at `host`.
    """
    deadline = time.monotonic() + seconds
    while True:
        try:
            address = _address_towards(host, port)
            break
        except OSError as error:
            if not isinstance(error, socket.gaierror) or time.monotonic() >= deadline:
                raise LaunchError(f"rendezvous at {endpoint(host, port)} failed: {error.strerror or error}") from None
        time.sleep(0.2)
    if _is_loopback(address) and host != "localhost" and not _is_loopback(host):
        # `host` is this machine's own name, which Debian maps to 127.0.1.1. Others reach the default route's address.
        for other in _UNASSIGNED:
            with suppress(OSError):
                return _address_towards(other, 9)
    return address


def address_of(host: str, port: int) -> str:
    """Return the address where rank 0 on `host` listens. Raises LaunchError.

    On rank 0's own machine, Debian maps the name `host` to loopback, but rank 0 does not listen there.
    """
    with suppress(OSError):
        if _is_loopback(_address_towards(host, port)):
            return own_address(host, port)
    return host


def interface_of(address: str) -> str | None:
    """Return the name of the interface that has this address."""
    for interface, addresses in psutil.net_if_addrs().items():
        if any(one.address == address for one in addresses):
            return interface
    return None


def wait_for_answer(host: str, port: int, seconds: float, who: str) -> None:
    """Wait until a program listens there. Raises LaunchError after `seconds`. `who`: the program, for the message."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            socket.create_connection((host, port), timeout=min(5.0, seconds)).close()
            return
        except OSError as error:
            if time.monotonic() > deadline:
                raise no_answer(host, port, seconds, error, who) from None
        time.sleep(0.2)


def no_answer(host: str, port: int, seconds: float, error: OSError, who: str) -> LaunchError:
    # strerror is clearer than asyncio's message; errors of name resolution have negative numbers
    reason = os.strerror(error.errno) if error.errno is not None and error.errno > 0 else error.strerror or error
    return LaunchError(
        f"rendezvous at {endpoint(host, port)} failed: no answer within {seconds:g} s ({reason}); "
        f"{who} should listen there, is it running and the port open?"
    )


def _address_towards(host: str, port: int) -> str:
    """Return the local address of a socket connected to `host`. Raises OSError."""
    problem: OSError | None = None
    for family, _, _, _, where in socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM):
        try:
            with socket.socket(family, socket.SOCK_DGRAM) as probe:
                probe.connect(where)  # sends nothing
                return str(probe.getsockname()[0])
        except OSError as error:
            problem = problem or error
    raise problem or OSError(None, "no address")


def _is_loopback(host: str) -> bool:
    with suppress(ValueError):
        return ipaddress.ip_address(host).is_loopback
    return False
