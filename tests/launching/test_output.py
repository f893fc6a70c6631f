"""Output that can no longer be written ends no run; a command that only shows something ends as others do."""

import os
import pty
import subprocess
import sys
from pathlib import Path
from typing import Any

import warm
import yaml
from conftest import environment, events, lines, start, steps_done

CONFIG = {
    "task": {"target": "tasks:Masked"},
    "data": {"global_batch_size": 16, "micro_batch_size": 4},
    "train": {"steps": 30},
    "eval": {"every_steps": 3},
}
DISTRIB = [sys.executable, "-m", "distrib"]


def write(folder: Path, **changes: Any) -> None:
    (folder / "run.yaml").write_text(yaml.safe_dump({**CONFIG, **changes}))


def finished(run: Path) -> bool:
    return events(run)[-1] == "finished" and steps_done(run) == 30


def warnings(run: Path) -> list[str]:
    return [event["reason"] for event in lines(run, "events.jsonl") if event["event"] == "warning"]


def test_a_reader_that_goes_away(mark: str, tmp_path: Path) -> None:
    """distrib launch … | head -1, which ends before the run prints its next line."""
    write(tmp_path, task={"target": "tasks:Held", "go": str(tmp_path / "go")})
    launcher = start(mark, tmp_path, "launch", "--processes", 2, "run.yaml")
    assert launcher.stdout is not None
    assert launcher.stderr is not None
    assert launcher.stdout.readline().startswith("step 3/30  eval/loss")
    launcher.stdout.close()
    (tmp_path / "go").touch()
    assert launcher.stderr.read() == ""
    assert launcher.wait(60) == 0
    assert finished(tmp_path / "runs/run")
    assert warnings(tmp_path / "runs/run") == ["<stdout>: Broken pipe; what is printed is lost, the run goes on"]


def test_output_that_cannot_be_written(mark: str, tmp_path: Path) -> None:
    """A full disk, a terminal that is gone, none at all: three runs at once."""
    write(tmp_path)
    ours, terminal = pty.openpty()
    with Path("/dev/full").open("w") as full:

        def train(name: str, command: list[str], **streams: Any) -> "subprocess.Popen[bytes]":
            command = [*command, "train", "run.yaml", "--verbose", "--run-dir", name]
            return warm.Popen(command, cwd=tmp_path, env=environment(mark, TERM="xterm"), **streams)

        closing = ["sh", "-c", 'exec "$@" <&- >&- 2>&-', "sh", *DISTRIB]
        runs = {
            "full": train("full", DISTRIB, stdout=full, stderr=full),
            "gone": train("gone", DISTRIB, stdin=terminal, stdout=terminal, stderr=terminal),
            "none": train("none", closing),
        }
    os.close(terminal)
    seen = b""
    while b"step 1/30" not in seen:  # before that, a slow start says on standard error what it does
        seen += os.read(ours, 1000)
    os.close(ours)
    for name, process in runs.items():
        assert process.wait(100) == 0, name
        assert finished(tmp_path / name), name
    assert warnings(tmp_path / "full") == [
        "<stdout>: No space left on device; what is printed is lost, the run goes on"
    ]
    assert warnings(tmp_path / "gone") == ["<stdout>: Input/output error; what is printed is lost, the run goes on"]
    assert warnings(tmp_path / "none") == []


def test_a_command_that_shows_something(tmp_path: Path) -> None:
    """… | true, as of any other program; a full disk is an error."""
    write(tmp_path)
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer) as pipe, Path("/dev/full").open("w") as full:
        for stream, code, said in (
            (pipe, 141, b""),
            (full, 1, b"error: <stdout>: No space left on device\n"),
        ):
            shown = subprocess.run(
                [*DISTRIB, "explain", "run.yaml"], cwd=tmp_path, env=environment(""), stdout=stream, stderr=-1
            )
            assert (shown.returncode, shown.stderr) == (code, said)


SCRIPT = """
import sys
from distrib.processes.output import keep_writable

keep_writable()
keep_writable()
print("a metric of another alphabet: \\u03b1")
for number in range(100_000):
    print(number)
"""


def test_a_pipe_that_another_program_made_non_blocking() -> None:
    """And an encoding that lacks what is printed."""
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT], env=environment("", PYTHONIOENCODING="ascii"), stdout=writer, stderr=-1
    )
    os.close(writer)
    with os.fdopen(reader) as pipe:
        said = pipe.read().splitlines()
    assert process.wait(60) == 0
    assert said == ["a metric of another alphabet: \\u03b1", *map(str, range(100_000))]
