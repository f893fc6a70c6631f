"""Authentication for a job's store: connections from other machines must prove that they know the job's key.

torch's TCPStore has no authentication, so it listens on loopback only. The machine that keeps it has a gate on the
network interface towards the other machines. Each other machine has a relay on its loopback, which proves the key to
the gate and then forwards bytes. Both sides prove the key with an HMAC-SHA256 of two nonces; the key itself is never
sent. Forwarded bytes are neither encrypted nor signed: docs/launchers.md describes what is trusted.
"""

import asyncio
import hmac
import resource
import secrets
import socket
import threading
import time
from collections.abc import Awaitable, Callable
from functools import partial

from distrib.errors import LaunchError
from distrib.processes.network import LOOPBACK, endpoint, listen, no_answer

KEY = "DISTRIB_RENDEZVOUS_KEY"
SHORTEST_KEY = 16
_HELLO = b"distrib rendezvous 1\n"
_NONCE = 32
_REFUSED = bytes(32)  # sent instead of the keeper's proof, so that a refusal differs from a closed connection
_SECONDS_TO_PROVE = 10.0
_FILES = 65_536  # a forwarded connection takes two file descriptors, and a third in the store

Connection = tuple[asyncio.StreamReader, asyncio.StreamWriter]
Handler = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


def check_key(key: str) -> None:
    """Raise LaunchError if the key is too short to be a secret."""
    if len(key) < SHORTEST_KEY:
        raise LaunchError(f"--rendezvous-key: it has {len(key)} characters, give {SHORTEST_KEY} or more")


class Gate:
    """Accepts connections on `server`, and forwards each that proves the key to one of this machine's stores."""

    def __init__(self, server: socket.socket, key: str) -> None:
        self.stores: dict[int, int] = {}  # number -> port on loopback
        self.refused: set[str] = set()  # addresses of connections without the key
        self._key = key.encode()
        _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
        files = _FILES if most == resource.RLIM_INFINITY else min(_FILES, most)
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(files, resource.getrlimit(resource.RLIMIT_NOFILE)[0]), most))
        _serve(server, self._admit)

    async def _admit(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        number = await asyncio.wait_for(self._ask(reader, writer), _SECONDS_TO_PROVE)
        if number is None:
            self.refused.add(writer.get_extra_info("peername")[0])
            writer.write(_REFUSED)
        elif (port := self.stores.get(number)) is not None:
            await _forward((reader, writer), await asyncio.open_connection(LOOPBACK, port))

    async def _ask(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> int | None:
        """Return the number of the store that the other side requests; None if it does not know the key."""
        ours = secrets.token_bytes(_NONCE)
        writer.write(_HELLO + ours)
        theirs = await reader.readexactly(_NONCE)
        number = await reader.readexactly(4)
        proof = await reader.readexactly(32)
        if not hmac.compare_digest(proof, _proof(self._key, b"joiner", ours, theirs, number)):
            return None
        writer.write(_proof(self._key, b"keeper", ours, theirs, number))
        return int.from_bytes(number, "big")


class Relay:
    """Opens ports on loopback that lead through the gate at `host` to its stores.

    The constructor waits for the gate. It raises LaunchError if there is no answer within `seconds`, and at once if the
    gate has another key. `who`: the name of the gate's owner in messages.
    """

    def __init__(self, host: str, port: int, key: str, seconds: float, who: str) -> None:
        self._host, self._port, self._key, self._who = host, port, key.encode(), who
        self._leads_to: dict[int, int] = {}  # port on loopback -> number of a store
        asyncio.run(self._wait(seconds))

    def open(self, number: int, port: int = 0) -> int:
        """Return a port on loopback that leads to the store of this number.

        `port`: one that this relay has opened before, to redirect its later connections; 0 means a new port.
        """
        if port == 0:
            server = listen(LOOPBACK, 0)
            port = server.getsockname()[1]
            _serve(server, partial(self._pass_on, port))
        self._leads_to[port] = number
        return port

    async def _wait(self, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while True:
            try:
                _, writer = await asyncio.wait_for(self._enter(0), _SECONDS_TO_PROVE)
                writer.close()
                return
            except (OSError, asyncio.TimeoutError) as error:
                if time.monotonic() > deadline:
                    reason = error if isinstance(error, OSError) else OSError(None, "it accepts, but sends nothing")
                    raise no_answer(self._host, self._port, seconds, reason, self._who) from None
            await asyncio.sleep(0.2)

    async def _pass_on(self, port: int, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await _forward((reader, writer), await self._enter(self._leads_to[port]))

    async def _enter(self, number: int) -> Connection:
        reader, writer = await asyncio.open_connection(self._host, self._port)
        try:
            hello, theirs = await reader.readexactly(len(_HELLO)), await reader.readexactly(_NONCE)
            if hello != _HELLO:
                raise ConnectionError(None, "another program listens there")
            ours, wanted = secrets.token_bytes(_NONCE), number.to_bytes(4, "big")
            writer.write(ours + wanted + _proof(self._key, b"joiner", theirs, ours, wanted))
            proof = await reader.readexactly(len(_REFUSED))
        except EOFError:
            writer.close()
            raise ConnectionError(None, "the connection was closed") from None
        except BaseException:
            writer.close()
            raise
        if not hmac.compare_digest(proof, _proof(self._key, b"keeper", theirs, ours, wanted)):
            writer.close()
            raise LaunchError(
                f"rendezvous at {endpoint(self._host, self._port)} refused: {self._who} has another key; give the "
                f"same --rendezvous-key, or {KEY}, on all machines"
            )
        return reader, writer


def _proof(key: bytes, who: bytes, *parts: bytes) -> bytes:
    return hmac.digest(key, who + b"".join(parts), "sha256")


def _serve(
    server: socket.socket, handle: Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]
) -> None:
    """Accept connections in a daemon thread, until this process ends."""

    async def one(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await handle(reader, writer)
        except (OSError, EOFError, asyncio.TimeoutError, LaunchError):
            pass  # not a client of ours, or a connection that ended
        finally:
            writer.close()

    async def forever() -> None:
        async with await asyncio.start_server(one, sock=server) as running:
            await running.serve_forever()

    threading.Thread(target=asyncio.run, args=(forever(),), daemon=True).start()


async def _forward(one: Connection, other: Connection) -> None:
    """Forward bytes in both directions until one side closes."""
    pumps = [asyncio.ensure_future(_pump(one[0], other[1])), asyncio.ensure_future(_pump(other[0], one[1]))]
    try:
        await asyncio.wait(pumps, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for pump in pumps:
            pump.cancel()
        await asyncio.gather(*pumps, return_exceptions=True)
        for _, writer in (one, other):
            writer.close()


async def _pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while data := await reader.read(65_536):
        writer.write(data)
        await writer.drain()
