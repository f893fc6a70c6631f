"""Write errors at each file operation of a run: one line names file and reason, and the run can resume."""

import errno
import io
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib.figure
import pytest
from conftest import check_same, lines
from tasks import Masked

from distrib import Config, Trainer
from distrib.errors import DistribError

STEPS = 4
# System calls with which a run writes its files, and the index of the argument that names the file.
OPERATIONS = (
    (os, "open", 0),
    (os, "write", 0),
    (os, "fsync", 0),
    (os, "replace", 1),
    (os, "rename", 1),
    (os, "mkdir", 0),
    (io, "open", 0),
)


def fit(folder: Path) -> dict[str, Any]:
    config = {
        "data": {"global_batch_size": 8, "micro_batch_size": 4},
        "train": {"steps": STEPS},
        "eval": {"every_steps": 2},
        "checkpoint": {"every_steps": 2, "keep": 1},
    }
    return Trainer(Masked(17, dropout=0.1), Config.from_dict(config), folder, verbosity="quiet").fit()


def writes(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    if name != "open":
        return True
    mode = args[1] if len(args) > 1 else kwargs.get("mode", "r")
    return bool(mode & (os.O_WRONLY | os.O_RDWR)) if isinstance(mode, int) else bool(set(mode) & set("wax+"))


def with_operations(patch: pytest.MonkeyPatch, folder: Path, before: Callable[[str, Any], None]) -> None:
    """Call `before('OPERATION FILE', second argument)` before each operation that writes in `folder`."""
    for place, name, which in OPERATIONS:
        original = getattr(place, name)

        def counted(*args: Any, original: Any = original, name: str = name, which: int = which, **kwargs: Any) -> Any:
            path = args[which]
            if isinstance(path, int):
                path = os.readlink(f"/proc/self/fd/{path}")
            if Path(os.fsdecode(path)).is_relative_to(folder) and writes(name, args, kwargs):
                relative = Path(os.fsdecode(path)).relative_to(folder)
                before(f"{name} {relative}", (original, args))
            return original(*args, **kwargs)

        patch.setattr(place, name, counted)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole") / "run"
    fit(folder)
    return folder


@pytest.mark.slow
def test_every_operation_of_a_run_may_fail(whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Fails the first of each operation on each file, and the last one that writes."""
    done: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        with_operations(patch, tmp_path / "counted", lambda operation, _: done.append(operation))
        fit(tmp_path / "counted")
    for name in ("steps.jsonl", "evals.jsonl", "events.jsonl"):
        assert f"write {name}" in done
    for name in ("config.yaml", "environment.json", "summary.json", "curves.png", f"checkpoints/step-{STEPS:08d}"):
        assert {f"replace {name}", f"rename {name}"} & set(done), name
    # tests/run_folder/test_checkpoint.py tests those of a save alone; here training continues meanwhile.
    outside = [operation for operation in done if "checkpoints/" not in operation]
    cases = {(operation, done.index(operation)) for operation in [*outside, f"rename checkpoints/step-{STEPS:08d}"]}
    cases |= {(operation, len(done) - 1 - done[::-1].index(operation)) for operation in outside if "write" in operation}
    for operation, number in sorted(cases):
        folder, seen = tmp_path / "run", 0

        def fail(
            now: str, call: Any, operation: str = operation, occurrence: int = done[:number].count(operation)
        ) -> None:
            nonlocal seen
            if now == operation:
                seen += 1
                if seen == occurrence + 1:
                    original, args = call
                    if now.startswith("write"):
                        original(args[0], args[1][: len(args[1]) // 2])  # there was room for half of it
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        said = None
        with pytest.MonkeyPatch.context() as patch:
            with_operations(patch, folder, fail)
            try:
                fit(folder)
            except DistribError as error:
                said, code = str(error), error.exit_code
        if "curves.png" in operation:
            assert said is None
            (warning,) = (event["reason"] for event in lines(folder, "events.jsonl") if event["event"] == "warning")
            assert warning == f"{folder / 'curves.png'}: not drawn: OSError: No space left on device"
        else:
            assert said is not None, operation
            assert "No space left on device" in said, operation
            assert str(folder) in said
            assert "\n" not in said
            assert code == (2 if operation in ("mkdir .", "open .lock") else 1), operation
        fit(folder)
        check_same(folder, whole)
        assert not list(folder.glob(".*.partial"))
        shutil.rmtree(folder)
        capsys.readouterr()


@pytest.mark.parametrize(
    "error", [UnicodeEncodeError("ascii", "ä", 0, 1, "ordinal not in range"), PermissionError(13, "Permission denied")]
)
def test_curves_that_cannot_be_drawn_are_a_warning(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Any
) -> None:
    """For example with an ASCII locale, or if matplotlib cannot write its cache. The run finishes."""

    def refuse(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(matplotlib.figure.Figure, "savefig", refuse)
    run = tmp_path / "run"
    fit(run)
    check_same(run, whole)
    assert [event["event"] for event in lines(run, "events.jsonl")][-2:] == ["warning", "finished"]
    assert "curves.png: not drawn: " in lines(run, "events.jsonl")[-2]["reason"]
