"""Processes of `python -m distrib` that need not import torch: a server that has imported it forks them.

A fresh process takes a second or two to import what it trains with, which would be half of the time of all tests. A
process that the server forks is one of its own all the same: a child of who asked for it, with the exit status, the
session, and the environment and command line in the process table that it would have. `distrib launch` gets a server
of its own before it begins, and has its ranks from there.

What a fork cannot show is what differs from one start of Python to the next, above all the order of its sets of
strings: so the ranks of the fixture `world` are fresh processes, and what others than `distrib launch` start, and what
has variables that are read while libraries are imported.

python warm.py FD PADDING     answers at this socket, for as long as the other end is open
"""

import builtins
import ctypes
import gc
import importlib
import io
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
import types
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NoReturn

import numpy

# Read when libraries, or Python itself, are loaded; but for those that are read later.
EARLY = ("OMP_", "MKL_", "MALLOC_", "GLIBC_", "LD_", "LC_", "LANG", "PYTHON", "TORCH", "NVIDIA_", "KMP_")
_LATE = ("TORCHELASTIC_", "TORCH_NCCL_", "TORCH_EXTENSIONS_DIR", "TORCH_CPP_LOG_LEVEL")
_MODULES = ("distrib", "distrib.processes.exit", "torch.distributed.run", "accelerate.commands.accelerate_cli")
_IMPORTED = (
    "distrib.cli",
    "distrib.launching.local",
    "distrib.monitor.compare.command",
    "distrib.monitor.curves",
    "distrib.training.trainer",
    "torch._dynamo",  # by torch's optimizers
    "torch._inductor.compile_fx",  # by DeepSpeed
)
_LAUNCHERS = ("distrib launch", "distrib evaluate", "torch.distributed.run", "accelerate.commands.accelerate_cli")
_PR_SET_CHILD_SUBREAPER = 36  # linux/prctl.h
_PADDING = 16384  # bytes for the environment and the command line of who is forked
_libc = ctypes.CDLL(None, use_errno=True)


class Server:
    """The other end of `_serve`, for one process: what that starts is its child."""

    def __init__(
        self, connection: socket.socket, early: dict[str, str], process: "subprocess.Popen[bytes] | None" = None
    ) -> None:
        self.connection = connection
        self.early = early
        self.process = process

    @classmethod
    def start(cls, env: dict[str, str], enter: "list[str] | None" = None) -> "Server":
        """`enter`: a command that runs another, on another machine as it were, and becomes it."""
        ours, theirs = socket.socketpair()
        with theirs:
            own = {name: value for name, value in env.items() if name != "TEST_MARK"} | {"PADDING": "x" * _PADDING}
            process = subprocess.Popen(
                [*(enter or []), sys.executable, __file__, str(theirs.fileno()), "x" * _PADDING],
                env=own,
                pass_fds=[theirs.fileno()],
            )
        return cls(ours, _early(env), process)

    def fits(self, env: dict[str, str]) -> bool:
        """Whether Python would start in the same way with these variables; folders that accelerate appends, follow."""
        own, other = self.early, _early(env)
        path = own.get("PYTHONPATH", "")
        return f"{other.get('PYTHONPATH', '')}:".startswith(f"{path}:") and own == other | {"PYTHONPATH": path}

    def close(self) -> None:
        """End the server; what it forked goes on."""
        self.connection.close()
        if self.process is not None:
            self.process.wait()

    def fork(self, command: list[str], cwd: str, env: dict[str, str], files: list[int], own_session: bool) -> int:
        """Return the process number of a new child of this process. Signals that come meanwhile find it there."""
        request = json.dumps({"command": command, "cwd": cwd, "env": env, "own_session": own_session}).encode()
        later = signal.valid_signals() - {signal.SIGALRM}  # by which pytest ends what hangs
        blocked = signal.pthread_sigmask(signal.SIG_BLOCK, later)
        try:
            with _adopting():
                socket.send_fds(self.connection, [len(request).to_bytes(4, "big")], files)
                self.connection.sendall(request)
                return int.from_bytes(_receive(self.connection, 5)[:4], "big")
        except BaseException:
            self.connection.close()
            raise
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, blocked)


class Popen(subprocess.Popen):  # type: ignore[type-arg]
    """As subprocess.Popen, for what may be forked; anything else is started as ever."""

    server: "Server | None" = None

    def __init__(self, args: Any, *, server: "Server | None" = None, **kwargs: Any) -> None:
        self.server = server or self.server
        super().__init__(args, **kwargs)

    def _execute_child(self, *arguments: Any) -> None:
        args, preexec_fn, pass_fds, cwd, env, shell = (arguments[place] for place in (0, 2, 4, 5, 6, 9))
        pipes = arguments[10:16]  # of standard input, output and error, each to read from and to write to, or -1
        command = [os.fspath(argument) for argument in args] if isinstance(args, (list, tuple)) else []
        env = dict(os.environ if env is None else env)
        plain = preexec_fn is None and not pass_fds and not shell and _program(command)
        if not plain or not (server := self.server or _own_server()).fits(env):
            super()._execute_child(*arguments)
            return
        files = [own if own >= 0 else inherited for inherited, own in enumerate((pipes[0], pipes[3], pipes[5]))]
        self.pid = server.fork(command, os.fspath(cwd or os.getcwd()), env, files, arguments[21])
        self._child_created = True
        self._close_pipe_fds(*pipes)


_early_here: dict[str, str] = {}  # of the server, before it imports: libraries set more
_server: "tuple[int, Server] | None" = None  # whose it is
usual: dict[str, str] = {}  # the environment of what a test starts if it gives no variables; conftest.py sets it


def _own_server() -> Server:
    """Start one for this process, if there is none yet. It has the usual environment, whatever asks for it first."""
    global _server
    if _server is None or _server[0] != os.getpid() or _server[1].connection.fileno() < 0:
        _server = os.getpid(), Server.start(usual)
    return _server[1]


def run(
    command: list[str], cwd: Path, env: dict[str, str], timeout: float, fresh: bool
) -> "subprocess.CompletedProcess[str]":
    """As subprocess.run. Raises subprocess.TimeoutExpired."""
    pipe, popen = subprocess.PIPE, subprocess.Popen if fresh else Popen
    with popen(command, cwd=cwd, env=env, stdin=subprocess.DEVNULL, stdout=pipe, stderr=pipe, text=True) as process:
        try:
            said = process.communicate(timeout=timeout)
        except BaseException:
            process.kill()
            raise
    return subprocess.CompletedProcess(command, process.returncode, *said)


def _program(command: list[str]) -> list[str]:
    """Return the module or script that Python runs, and its arguments, if it may be forked, else nothing."""
    if sys.platform != "linux" or command[:1] != [sys.executable]:
        return []
    rest = command[2:] if command[1:2] == ["-u"] else command[1:]
    if rest[:1] == ["-m"]:
        return rest[1:] if rest[1:2] and rest[1] in _MODULES else []
    return rest if rest and rest[0].endswith(".py") else []


def _early(env: dict[str, str]) -> dict[str, str]:
    return {name: value for name, value in env.items() if name.startswith(EARLY) and not name.startswith(_LATE)}


@contextmanager
def _adopting() -> Iterator[None]:
    """Within, this process becomes the parent of descendants whose parent ends."""
    _libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    try:
        yield
    finally:
        _libc.prctl(_PR_SET_CHILD_SUBREAPER, 0, 0, 0, 0)


def _receive(connection: socket.socket, size: int) -> bytes:
    received = b""
    while len(received) < size:
        part = connection.recv(size - len(received))
        if not part:
            raise EOFError("the other end is gone")
        received += part
    return received


def _import() -> None:
    os.environ["TORCH_CPP_LOG_LEVEL"] = "ERROR"  # as processes.exit sets it before torch is imported
    for module in _IMPORTED:
        importlib.import_module(module)
    importlib.import_module("matplotlib.figure").Figure().savefig(io.BytesIO())  # what it imports only then
    assert len(os.listdir("/proc/self/task")) == 1, "a process with threads must not fork"
    gc.freeze()


def _serve(connection: socket.socket, mask: set[signal.Signals]) -> NoReturn:
    """Fork what is asked for, twice: when the first has ended, who asked has adopted the second."""
    while request := _request(connection):
        files, wanted = request
        between = os.fork()
        if between == 0:
            between = os.getpid()
            if (pid := os.fork()) != 0:
                connection.sendall(pid.to_bytes(4, "big"))
                os._exit(0)
            connection.close()
            while os.getppid() == between:
                time.sleep(0.0005)
            _become(files, mask, **wanted)
        for file in files:
            os.close(file)
        os.waitpid(between, 0)
        with suppress(ConnectionError):
            connection.sendall(b".")
    os._exit(0)


def _request(connection: socket.socket) -> "tuple[list[int], dict[str, Any]] | None":
    """None if the other end is gone."""
    with suppress(ConnectionError, EOFError):
        first, files, _, _ = socket.recv_fds(connection, 4, 3)
        return (files, json.loads(_receive(connection, int.from_bytes(first, "big")))) if first else None
    return None


def _become(
    files: list[int],
    mask: set[signal.Signals],
    command: list[str],
    cwd: str,
    env: dict[str, str],
    own_session: bool,
) -> NoReturn:
    """Be the process of this command, as Python would begin it."""
    for descriptor, file in enumerate(files):
        os.dup2(file, descriptor)
        os.close(file)
    if own_session:
        os.setsid()
    what, *arguments = _program(command)
    if "RANK" not in env and (what.endswith(".py") or " ".join([what, *arguments]).startswith(_LAUNCHERS)):
        _give_server(mask)
    os.chdir(cwd)
    behind = 1 + len(path := os.environ["PYTHONPATH"].split(":"))
    sys.path[behind:behind] = env["PYTHONPATH"].split(":")[len(path) :]
    os.environ.clear()
    os.environ.update(env)
    _show(command, env)
    tempfile.tempdir = None
    numpy.random.seed()  # from the system, as Python's own generator does after a fork
    if command[1] == "-u":
        sys.stdout.reconfigure(write_through=True)  # type: ignore[union-attr]
    sys.orig_argv, sys.argv = command, [what, *arguments]
    sys.modules["__main__"] = types.ModuleType("__main__")
    signal.pthread_sigmask(signal.SIG_SETMASK, mask)
    warnings.filterwarnings("ignore", ".* found in sys.modules after import of package", RuntimeWarning, "runpy")
    try:
        if what.endswith(".py"):
            sys.path[0] = os.path.dirname(os.path.abspath(what))
            own = sys.modules["__main__"].__dict__
            own |= {"__file__": what, "__builtins__": builtins}
            exec(compile(Path(what).read_bytes(), what, "exec"), own)
        else:
            sys.path[0] = cwd
            runpy._run_module_as_main(what)  # type: ignore[attr-defined]
    except Exception as error:
        trace = error.__traceback__
        traceback.print_exception(type(error), error, trace and trace.tb_next)
        sys.exit(1)
    sys.exit()


def _give_server(mask: set[signal.Signals]) -> None:
    """A server for this process, with whose end it ends: what it starts may be forked there."""
    from torch.distributed.elastic.multiprocessing.subprocess_handler import subprocess_handler

    ours, theirs = socket.socketpair()
    if os.fork() == 0:
        ours.close()
        null = os.open(os.devnull, os.O_RDWR)
        for descriptor in (0, 1, 2):
            os.dup2(null, descriptor)
        _serve(theirs, mask)
    theirs.close()
    Popen.server = Server(ours, _early_here)
    subprocess.Popen = subprocess_handler.Popen = Popen  # type: ignore[misc]


def _show(command: list[str], env: dict[str, str]) -> None:
    """Write the command line and the environment where /proc and ps read them."""
    fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    arguments, end, variables, last = (int(fields[number]) for number in (45, 46, 47, 48))
    for begin, size, parts in (
        (arguments, end - arguments, command),
        (variables, last - variables, [f"{name}={value}" for name, value in env.items()]),
    ):
        text = b"".join(os.fsencode(part) + b"\0" for part in parts)
        assert len(text) <= size, "larger than PADDING"
        ctypes.memmove(begin, text.ljust(size, b"\0"), size)


if __name__ == "__main__":
    before = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
    _early_here = _early(dict(os.environ))
    _import()
    _serve(socket.socket(fileno=int(sys.argv[1])), before)
