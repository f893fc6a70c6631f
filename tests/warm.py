"""A process that has imported what `distrib` imports, and forks itself for each command that a test runs and waits for.

A fresh process takes more than a second to import torch, which would be a fifth of the time of all tests. What a
command starts itself, such as the ranks of `distrib launch`, are fresh processes as ever. So are commands with
variables that are read while libraries are imported, and those that a test starts beside itself.

python tests/warm.py FD     answers at this socket, for as long as the other end is open
"""

import gc
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

# Read when libraries, or Python itself, are loaded.
_EARLY = ("OMP_", "MKL_", "MALLOC_", "GLIBC_", "LD_", "LC_", "LANG", "PYTHON", "TORCH", "NVIDIA_", "KMP_")
_server: tuple[int, socket.socket, dict[str, str]] | None = None  # whose it is, its socket, its early variables


def fits(env: dict[str, str]) -> bool:
    """Return whether a command with this environment may be forked."""
    return _early(env) == _connect(env)[1]


def run(arguments: list[str], cwd: Path, env: dict[str, str], timeout: float) -> "subprocess.CompletedProcess[str]":
    """Run `distrib ARGUMENTS`, as subprocess.run does. Raises subprocess.TimeoutExpired."""
    command = [sys.executable, "-m", "distrib", *arguments]
    with tempfile.TemporaryFile() as stdout, tempfile.TemporaryFile() as stderr, open(os.devnull) as stdin:
        request = json.dumps({"arguments": arguments, "cwd": str(cwd), "env": env}).encode()
        files = [stdin.fileno(), stdout.fileno(), stderr.fileno()]
        try:
            status = _status(_connect(env)[0], request, files, timeout)
        except TimeoutError:
            raise subprocess.TimeoutExpired(command, timeout) from None
        texts = []
        for file in (stdout, stderr):
            file.seek(0)
            texts.append(file.read().decode())
    return subprocess.CompletedProcess(command, os.waitstatus_to_exitcode(status), *texts)


def _status(server: socket.socket, request: bytes, files: list[int], timeout: float) -> int:
    """The exit status of what the server forks. If nobody waits any longer, it is killed, and the server left."""
    global _server
    socket.send_fds(server, [len(request).to_bytes(4, "big")], files)
    server.sendall(request)
    pid = int.from_bytes(_receive(server, 4), "big")
    try:
        server.settimeout(timeout)
        status = int.from_bytes(_receive(server, 4), "big")
        server.settimeout(None)
    except BaseException:
        os.kill(pid, signal.SIGKILL)
        server.close()
        _server = None
        raise
    return status


def _early(env: dict[str, str]) -> dict[str, str]:
    return {name: value for name, value in env.items() if name.startswith(_EARLY)}


def _connect(env: dict[str, str]) -> tuple[socket.socket, dict[str, str]]:
    """Start the server for this process, if there is none yet."""
    global _server
    if _server is None or _server[0] != os.getpid():
        ours, theirs = socket.socketpair()
        subprocess.Popen(
            [sys.executable, __file__, str(theirs.fileno())],
            env={name: value for name, value in env.items() if name != "TEST_MARK"},
            pass_fds=[theirs.fileno()],
        )
        theirs.close()
        _server = os.getpid(), ours, _early(env)
    return _server[1:]


def _receive(connection: socket.socket, size: int) -> bytes:
    received = b""
    while len(received) < size:
        part = connection.recv(size - len(received))
        if not part:
            raise EOFError("the other end is gone")
        received += part
    return received


def _serve(connection: socket.socket) -> None:
    os.environ["TORCH_CPP_LOG_LEVEL"] = "ERROR"  # as processes.exit sets it before torch is imported
    import distrib.cli
    import distrib.launching.local
    import distrib.monitor.compare.command
    import distrib.training.trainer  # noqa: F401

    assert len(os.listdir("/proc/self/task")) == 1, "a process with threads must not fork"
    gc.freeze()
    while True:
        first, files, _, _ = socket.recv_fds(connection, 4, 3)
        if not first:
            return
        request = json.loads(_receive(connection, int.from_bytes(first, "big")))
        pid = os.fork()
        if pid == 0:
            connection.close()
            _become(request, files)
        for file in files:
            os.close(file)
        connection.sendall(pid.to_bytes(4, "big"))
        _, status = os.waitpid(pid, 0)
        connection.sendall(status.to_bytes(4, "big"))


def _become(request: dict[str, Any], files: list[int]) -> NoReturn:
    """Be the process of the command, as `python -m distrib` would begin."""
    for descriptor, file in enumerate(files):
        os.dup2(file, descriptor)
        os.close(file)
    os.chdir(request["cwd"])
    os.environ.clear()
    os.environ.update(request["env"])
    tempfile.tempdir = None
    sys.argv = ["distrib", *request["arguments"]]
    sys.path[0] = request["cwd"]
    from distrib.cli import main

    main()
    raise AssertionError("main ends the process")


if __name__ == "__main__":
    with suppress(ConnectionError):  # the test was ended
        _serve(socket.socket(fileno=int(sys.argv[1])))
