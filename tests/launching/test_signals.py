"""`distrib launch` is sent each signal in each phase, with workers alive: it ends with 75, nothing is left running, and
started again it is the run that was never disturbed."""

import os
import signal
import subprocess
import sys
import time
from contextlib import ExitStack, suppress
from pathlib import Path

import psutil
import pytest
import yaml
from conftest import check_same, environment, events, no_process_left, processes_of, ranks, start, steps_done, until

STEPS = 40
# What is sent, in quick succession; of SIGINT the second has a meaning of its own.
SIGNALS = [
    [signal.SIGTERM, signal.SIGXCPU],
    [signal.SIGINT],
    [signal.SIGUSR1, signal.SIGUSR1],
    [signal.SIGHUP, signal.SIGUSR2],
]
PHASES = ["start-up", "training", "evaluation", "saving"]


def write(folder: Path, **changes: object) -> None:
    config = {
        "name": "run",
        "task": {"target": "tasks:Phased", "folder": str(folder)},
        "data": {"global_batch_size": 16, "micro_batch_size": 4, "num_workers": 1},
        "train": {"steps": STEPS},
        "eval": {"every_steps": 8},
        "checkpoint": {"every_steps": 12, "keep": 1},
    }
    (folder / "phased.yaml").write_text(yaml.safe_dump({**config, **changes}))


NOTHING_TO_SAVE = "asked to stop while not training, nothing to save; start it again\n"
LAUNCH = ["launch", "--processes", 2, "phased.yaml"]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed")
    write(folder)
    with no_process_left() as mark:
        launcher = start(mark, folder, *LAUNCH)
        _, said = launcher.communicate(timeout=100)
    assert launcher.returncode == 0, said
    return folder / "runs" / "run"


def come(folder: Path, phase: str) -> None:
    """Wait until the run is there, in this start of it."""
    run = folder / "runs" / "run"
    before = steps_done(run)
    there = {
        "training": lambda: steps_done(run) > before + 2,
        "saving": lambda: list((run / "checkpoints").glob(".*.partial")),
    }
    until(there.get(phase, (folder / phase).exists), f"{phase} does not come")


@pytest.mark.parametrize("numbers", SIGNALS, ids=lambda numbers: numbers[0].name)
def test_a_signal_in_each_phase(mark: str, tmp_path: Path, undisturbed: Path, numbers: list[signal.Signals]) -> None:
    """Of one run, which is started again after each."""
    write(tmp_path)
    run = tmp_path / "runs" / "run"
    for phase in PHASES:
        for left in (tmp_path / other for other in PHASES):
            left.unlink(missing_ok=True)
        # Forked ranks start so soon that rank 0 may be there before rank 1 handles signals.
        launcher = start(mark, tmp_path, *LAUNCH, fresh=phase == "start-up")
        come(tmp_path, phase)
        for number in numbers:
            launcher.send_signal(number)
        _, said = launcher.communicate(timeout=60)
        assert launcher.returncode == 75, f"{phase}: {said}"
        assert "Traceback" not in said, phase
        until(lambda: not processes_of(mark), "something is left running", 10)
        if phase == "start-up":
            assert not run.exists()
            assert said == NOTHING_TO_SAVE
        else:
            assert events(run)[-1] == "preempted", phase
            assert 0 < steps_done(run) < STEPS, phase
    launcher = start(mark, tmp_path, *LAUNCH)
    _, said = launcher.communicate(timeout=100)
    assert launcher.returncode == 0, said
    assert events(run).count("preempted") == len(PHASES) - 1
    check_same(run, undisturbed)


@pytest.mark.parametrize("library", ["_multiarray_umath", "libtorch_python"])
@pytest.mark.parametrize(
    ("command", "code", "expected"),
    [(LAUNCH, 75, NOTHING_TO_SAVE), (["train", "phased.yaml"], 130, "interrupted\n")],
    ids=["launch", "train"],
)
def test_an_interrupt_while_libraries_are_imported(
    mark: str, tmp_path: Path, library: str, command: list[object], code: int, expected: str
) -> None:
    """numpy's import turns a KeyboardInterrupt into another error."""
    write(tmp_path)
    started = start(mark, tmp_path, *command, fresh=True)

    def imports() -> bool:
        process = ranks(mark).get("0") if command is LAUNCH else psutil.Process(started.pid)
        return process is not None and any(library in loaded.path for loaded in process.memory_maps())

    until(imports, f"it does not import {library}")
    started.send_signal(signal.SIGINT)
    _, said = started.communicate(timeout=60)
    assert (started.returncode, said) == (code, expected)


def test_a_rank_0_that_cannot_speak_while_it_starts(mark: str, tmp_path: Path) -> None:
    """As on a busy machine. Rank 1 used to end the launch meanwhile, and nobody said a word."""
    write(tmp_path, train={"steps": 1})
    launcher = start(mark, tmp_path, *LAUNCH, fresh=True)
    come(tmp_path, "start-up")
    rank_0 = ranks(mark)["0"]
    rank_0.suspend()
    launcher.send_signal(signal.SIGUSR1)
    launcher.send_signal(signal.SIGUSR1)
    with suppress(TimeoutError):
        until(lambda: launcher.poll() is not None, "it waits for rank 0", 2)
    with suppress(psutil.NoSuchProcess):  # it may have died of the signal
        rank_0.resume()
    _, said = launcher.communicate(timeout=60)
    assert (launcher.returncode, said) == (75, NOTHING_TO_SAVE)


@pytest.mark.parametrize(
    ("grace", "signals", "code", "said"),
    [
        (3, [signal.SIGTERM], 143, "the ranks did not save within 3 s of SIGTERM and were killed (--grace)"),
        (50, [signal.SIGINT, signal.SIGINT], 130, ""),
        (50, [signal.SIGKILL], -9, ""),
    ],
    ids=["grace", "Ctrl-C twice", "SIGKILL"],
)
def test_ranks_that_cannot_save(
    mark: str, tmp_path: Path, grace: int, signals: list[signal.Signals], code: int, said: str
) -> None:
    """A rank that hangs never comes to the end of its step."""
    write(tmp_path, task={"target": "tasks:Misbehaving", "how": "sleep", "on_rank": 1, "at": 9})
    launcher = start(mark, tmp_path, "launch", "--processes", 2, "--grace", grace, "phased.yaml")
    until(lambda: steps_done(tmp_path / "runs" / "run") == 3, "it does not begin")  # four, the last not written down
    assert len(processes_of(mark)) >= 5  # the launcher, two ranks and a worker of each
    for place, number in enumerate(signals):
        if place > 0:  # or the two would be one
            with pytest.raises(TimeoutError):
                until(lambda: launcher.poll() is not None, "it waits for the ranks", 1)
        launcher.send_signal(number)
    _, stderr = launcher.communicate(timeout=60)
    assert launcher.returncode == code
    assert "Traceback" not in stderr
    assert stderr.splitlines() == ([f"distrib launch: {said}"] if said else [])
    # the mark's fixture now checks that all of them end


def test_after_a_crash_all_start_again(mark: str, tmp_path: Path, undisturbed: Path) -> None:
    """A rank is killed in each start, after five steps more: with enough restarts the run comes to its end."""
    write(tmp_path, checkpoint={"every_steps": 4, "keep": 2})
    run = tmp_path / "runs" / "run"
    launcher = start(mark, tmp_path, "launch", "--processes", 2, "--max-restarts", 2, "phased.yaml")

    def comes_to(steps: int, resumed: int) -> bool:
        """A step more may have been made since this was last asked."""
        return steps_done(run) >= steps and events(run).count("resumed") == resumed

    for resumed, steps in enumerate((9, 22)):
        until(lambda steps=steps, resumed=resumed: comes_to(steps, resumed), "it does not go on")  # type: ignore[misc]
        os.kill(ranks(mark)["1"].pid, signal.SIGKILL)
    _, said = launcher.communicate(timeout=100)
    assert launcher.returncode == 0, said
    for attempt in (1, 2):
        assert f"rank 1 was ended by SIGKILL (out of memory?); starting all again, restart {attempt} of 2" in said
    assert [name for name in events(run) if name in ("started", "resumed", "finished")] == [
        *("started", "started", "resumed", "started", "resumed", "finished"),
    ]
    check_same(run, undisturbed)


def test_a_launcher_killed_while_its_ranks_start(tmp_path: Path) -> None:
    """None of them stays: within 10 s, or `no_process_left` would find them."""
    write(tmp_path)
    with ExitStack() as stack:
        marks = [stack.enter_context(no_process_left()) for _ in range(4)]
        launchers = [start(mark, tmp_path, *LAUNCH, fresh=True) for mark in marks]
        for mark, launcher, wait in zip(marks, launchers, (0.0, 0.05, 0.3, 1.0), strict=True):
            until(lambda mark=mark: ranks(mark), "no rank is started")  # type: ignore[misc]
            time.sleep(wait)
            launcher.kill()
            launcher.communicate()


@pytest.mark.parametrize("command", [["distrib", "train", "nowhere.yaml"], ["distrib.processes.exit", "script.py"]])
def test_a_rank_whose_launcher_is_gone_before_it_begins(mark: str, tmp_path: Path, command: list[str]) -> None:
    """It ends at once, and has not even read its arguments."""
    env = environment(mark, DISTRIB_LAUNCHER_PID=str(os.getppid()))
    result = subprocess.run([sys.executable, "-m", *command], cwd=tmp_path, env=env, capture_output=True, timeout=60)
    assert (result.returncode, result.stdout, result.stderr) == (1, b"", b"")


def test_restarts_come_to_an_end(mark: str, tmp_path: Path) -> None:
    write(tmp_path, task={"target": "tasks:Misbehaving", "how": "raise", "on_rank": 1, "at": 9})
    launcher = start(mark, tmp_path, "launch", "--processes", 2, "--max-restarts", 1, "phased.yaml")
    _, said = launcher.communicate(timeout=100)
    assert launcher.returncode == 1
    assert said.count("ZeroDivisionError: the task divided by zero") == 2
    assert "restart 1 of 1" in said
    assert said.splitlines()[-1] == "distrib launch: rank 1 failed with exit code 1; all processes were ended"


def test_what_the_user_must_mend_is_not_restarted(mark: str, tmp_path: Path) -> None:
    write(tmp_path, data={"global_batch_size": 128, "micro_batch_size": 4})
    launcher = start(mark, tmp_path, "launch", "--processes", 2, "--max-restarts", 5, "phased.yaml")
    _, said = launcher.communicate(timeout=100)
    assert launcher.returncode == 2
    assert said.count("the training set has only 97 samples") == 1
    assert "restart" not in said


def test_a_save_that_does_not_fit_the_grace_period(mark: str, tmp_path: Path) -> None:
    write(tmp_path, eval={"every_steps": 0})
    launcher = start(mark, tmp_path, "launch", "--grace", 0.01, "phased.yaml")
    said, _ = launcher.communicate(timeout=100)
    warnings = [line for line in said.splitlines() if line.startswith("warning: a save takes ")]
    assert len(warnings) == 1, said
    assert "but a run is killed 0.01 s after it is asked to stop" in warnings[0]
    assert events(tmp_path / "runs" / "run").count("warning") == 1
