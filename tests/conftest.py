"""What the tests share: starting real processes, and checking that none is left."""

import json
import os
import pty
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import warm
from hypothesis import settings
from safetensors.numpy import load_file

from distrib.run_folder.verify import verify_run

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tests" / "distributed"))  # the tests' own tasks
BIN = Path(sys.executable).parent

# Several processes share the cores of the machine; two threads each would only make them wait for one another.
os.environ["OMP_NUM_THREADS"] = "1"

# Tests of tracking ask for it.
os.environ["WANDB_MODE"] = "disabled"

FOUND = frozenset(os.environ)  # libraries set more, as for threads, when a test in this process imports them

# Tests that were begun by nohup, or in the background, would hand on that a hangup, or Ctrl-C, does no harm.
signal.signal(signal.SIGHUP, signal.SIG_DFL)
signal.signal(signal.SIGINT, signal.default_int_handler)

# No test is a timed one: the machine has other things to do, among them the other tests.
settings.register_profile("distrib", deadline=None)
settings.load_profile("distrib")

Run = Callable[..., "subprocess.CompletedProcess[str]"]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark as slow what starts processes; what takes long for another reason marks itself."""
    for item in items:
        starts_processes = {"run", "mark", "world"} & set(getattr(item, "fixturenames", ()))
        if starts_processes or item.path.parent.name in ("distributed", "launching", "trackers"):
            item.add_marker("slow")


def processes_of(mark: str) -> list[psutil.Process]:
    """All live processes that were started, directly or not, with this mark in their environment. What they were found
    to be is in their `info`: asked now, one may have ended."""
    found = psutil.process_iter(["name", "cmdline", "environ", "status", "create_time"])
    return [
        process
        for process in found
        if (process.info["environ"] or {}).get("TEST_MARK") == mark and process.info["status"] != psutil.STATUS_ZOMBIE
    ]


def environment(mark: str, **more: str) -> dict[str, str]:
    """Ours, without what an outer launcher may have left in it, or a library has set; tests/ is importable."""
    of_a_launcher = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_PORT")
    of_libraries = {name for name in os.environ.keys() - FOUND if name.startswith(warm.EARLY)}
    clean = {k: v for k, v in os.environ.items() if k not in of_a_launcher and k not in of_libraries}
    path = os.pathsep.join(
        [
            *(str(ROOT / folder) for folder in ("tests/distributed", "tests")),
            *filter(None, [os.environ.get("PYTHONPATH")]),
        ]
    )
    return {**clean, "PYTHONPATH": path, "PATH": f"{BIN}:{os.environ['PATH']}", "TEST_MARK": mark, **more}


warm.usual = environment("")


@contextmanager
def no_process_left() -> Iterator[str]:
    """A mark for the environment of the processes that are started; afterwards none of them may be there."""
    mark = uuid.uuid4().hex
    yield mark
    deadline = time.monotonic() + 10
    while (left := processes_of(mark)) and time.monotonic() < deadline:
        time.sleep(0.1)
    lines = [" ".join(process.info["cmdline"] or []).strip() for process in left]
    for process in left:
        process.kill()
    assert not lines, f"left behind: {lines}"


def starter(mark: str, folder: Path) -> Run:
    def start(*command: object, cwd: Path = folder, timeout: float = 120, fresh: bool = False, **env: str) -> Any:
        first, *rest = (str(part) for part in command)
        program = [sys.executable, "-m", "distrib"] if first == "distrib" else [first]
        return warm.run([*program, *rest], cwd, environment(mark, **env), timeout, fresh)

    return start


BLOCK = re.compile(r"^```(\w+)(?: title=(\S+))?\n(.*?)^```$", re.MULTILINE | re.DOTALL)  # of a page: kind, title, text


def run_page(page: Path, run: Run, folder: Path) -> list[str]:
    """Write the files that a page shows, and run each line of its `sh` blocks in order. Return what they printed.

    A line is one command, without the shell's own words but `cd`; for others there is test_documentation.
    """
    printed = []
    for kind, title, text in BLOCK.findall(page.read_text()):
        if title:
            (folder / title).write_text(text)
        for line in text.splitlines() if kind == "sh" else ():
            first, *rest = shlex.split(line)
            if first == "cd":
                folder /= rest[0]
            else:
                printed.append(check(run(sys.executable if first == "python" else first, *rest, cwd=folder)))
    return printed


def start(mark: str, folder: Path, *command: object, fresh: bool = False, **env: str) -> "subprocess.Popen[str]":
    """`distrib`, beside the test, with pipes for what it says. `fresh`: a process that imports its libraries itself."""
    popen = subprocess.Popen if fresh else warm.Popen
    arguments = [sys.executable, "-m", "distrib", *(str(part) for part in command)]
    pipe = subprocess.PIPE
    return popen(
        arguments, cwd=folder, env=environment(mark, **env), stdout=pipe, stderr=pipe, text=True, start_new_session=True
    )


def on_a_terminal(mark: str, folder: Path, *command: object, **env: str) -> tuple[str, int]:
    """What `distrib` draws on a terminal until it ends, and its exit code."""
    ours, theirs = pty.openpty()
    arguments = [sys.executable, "-m", "distrib", *(str(part) for part in command)]
    with warm.Popen(
        arguments, cwd=folder, stdout=theirs, stderr=theirs, env=environment(mark, TERM="xterm", **env)
    ) as process:
        os.close(theirs)
        seen = b""
        while True:
            try:
                seen += os.read(ours, 65536)
            except OSError:  # the other end is closed
                break
    os.close(ours)
    return seen.decode(), process.returncode


def until(what: Callable[[], object], why: str, seconds: float = 60) -> None:
    """Wait for it. A test that waits longer has failed, whatever the machine is busy with."""
    deadline = time.monotonic() + seconds
    while not what():
        if time.monotonic() > deadline:
            raise TimeoutError(f"{why}, after {seconds:g} s")
        time.sleep(0.002)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def steps_done(run: Path) -> int:
    """Lines of the ledger, whole or not."""
    ledger = run / "steps.jsonl"
    return ledger.read_bytes().count(b"\n") if ledger.exists() else 0


def ranks(mark: str) -> dict[str, psutil.Process]:
    """The processes that train, by rank, without their workers."""
    found: dict[str, psutil.Process] = {}
    for process in sorted(processes_of(mark), key=lambda process: process.info["create_time"]):
        if (rank := process.info["environ"].get("RANK")) is not None:
            found.setdefault(rank, process)
    return found


def events(run: Path) -> list[str]:
    """Their names, in order."""
    return [event["event"] for event in lines(run, "events.jsonl")]


@pytest.fixture
def mark() -> Iterator[str]:
    with no_process_left() as mark:
        yield mark


@pytest.fixture
def run(mark: str, tmp_path: Path) -> Run:
    """`run("distrib", "train", …)`: a command of this environment in a temporary folder; returns when it ends."""
    return starter(mark, tmp_path)


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[int], Path]]:
    """The folder of what tests/distributed/members.py did on so many processes, started when first asked for."""
    with no_process_left() as mark:

        @cache  # of a failed launch too
        def launch(processes: int) -> "tuple[Path, subprocess.CompletedProcess[str]]":
            folder = tmp_path_factory.mktemp(f"world-{processes}-")
            command = ("distrib", "launch", "--processes", processes, ROOT / "tests/distributed/members.py", folder)
            run = starter(mark, folder)
            return folder, run(*command, timeout=800, fresh=True, TORCH_EXTENSIONS_DIR=str(folder / "extensions"))

        def folder_of(processes: int) -> Path:
            folder, result = launch(processes)
            check(result)
            assert "FutureWarning" not in result.stderr
            return folder

        yield folder_of


def lines(run: Path, file: str = "steps.jsonl") -> list[dict[str, Any]]:
    """A JSON-lines file of a run folder, the ledger by default."""
    return [json.loads(line) for line in (run / file).read_text().splitlines()]


def results(folder: Path, rank: int = 0) -> dict[str, Any]:
    """What a rank of `world` found besides training."""
    found: dict[str, Any] = json.loads((folder / f"rank-{rank}.json").read_text())
    return found


def tensors(run: Path, step: int | None = None) -> dict[str, np.ndarray[Any, Any]]:
    """What the newest checkpoint of a run, or that of `step`, holds: as docs/run-folder.md says, without our code."""
    folders = sorted((run / "checkpoints").glob("step-*" if step is None else f"step-{step:08d}"))
    manifest = json.loads((folders[-1] / "manifest.json").read_text())
    files = {name: load_file(folders[-1] / name) for name in manifest["files"]}
    return {
        name: np.concatenate([files[file][name] for file, *_ in entry["stretches"]]).reshape(entry["shape"])
        for name, entry in manifest["tensors"].items()
    }


def interrupted(run: Path, to: Path, after: int) -> Path:
    """A copy of a finished run, as it is where it is killed some time after the checkpoint of step `after`."""
    shutil.copytree(run, to)
    (to / "summary.json").unlink()
    for path in (to / "checkpoints").iterdir():
        if path.name > f"step-{after:08d}":
            shutil.rmtree(path)
    return to


def check_same(run: Path, undisturbed: Path) -> None:
    """The same run bit for bit, with each step once."""
    own = {key for line in lines(undisturbed) for key in line if key.startswith("train/")}
    for key in ("step", "loss", "grad_norm", "lr", "samples", "verdict", *own):
        assert [line[key] for line in lines(run)] == [line[key] for line in lines(undisturbed)], key
    for key in ("step", "count", "metrics"):
        assert [line[key] for line in lines(run, "evals.jsonl")] == [
            line[key] for line in lines(undisturbed, "evals.jsonl")
        ]
    found, expected = tensors(run), tensors(undisturbed)
    assert found.keys() == expected.keys()
    for name in expected:
        np.testing.assert_array_equal(found[name], expected[name], err_msg=name)
    assert verify_run(run).steps == verify_run(undisturbed).steps


def losses(run: Path) -> list[float]:
    return [line["loss"] for line in lines(run)]


def check(result: "subprocess.CompletedProcess[str]", code: int = 0) -> str:
    """Its standard output, after checking the exit code."""
    assert result.returncode == code, f"exit code {result.returncode}\n{result.stdout}\n{result.stderr}"
    return result.stdout


def refused(result: "subprocess.CompletedProcess[str]") -> str:
    """The one line of a command that the user's input made impossible."""
    check(result, code=2)
    lines = [line for line in result.stderr.splitlines() if line.strip()]
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith("error: ")
    return lines[0]
