"""A damaged run folder: the run resumes from a valid checkpoint or ends with one line; commands show what can be read.

Each case damages a copy of one small run in one place, and then runs every command on it.
"""

import json
import os
import random
import shutil
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import Run, check, check_same, lines, tensors
from tasks import Masked

from distrib import Config, Trainer
from distrib.errors import CheckpointError, DistribError, LedgerError, RunDirError
from distrib.monitor.compare.comparison import compare
from distrib.monitor.compare.runs import load_runs
from distrib.monitor.watch import watch_run
from distrib.processes.world import World
from distrib.run_folder.files import read_lines
from distrib.run_folder.folder import RunDir
from distrib.run_folder.formats import EVALUATION, STEP
from distrib.run_folder.ledger import last_line
from distrib.run_folder.manifest import sealed as seal
from distrib.run_folder.resume import latest_valid
from distrib.run_folder.verify import verify_run
from distrib.training.commands import export_run

STEPS, AT = 8, 6  # AT: the newest checkpoint of the interrupted run
SMALL = ("config.yaml", "environment.json", "evals.jsonl", "events.jsonl", "steps.jsonl", "summary.json")
CONFIG: dict[str, Any] = {
    "task": {"target": "tasks:Masked", "samples": 17, "dropout": 0.1},
    "data": {"global_batch_size": 8, "micro_batch_size": 4},
    "train": {"steps": STEPS},
    "eval": {"every_steps": 2},
    "checkpoint": {"every_steps": 3, "keep": 9},
}


def fit(folder: Path, lr: float = 0.001, **options: Any) -> dict[str, Any]:
    config = Config.from_dict({**CONFIG, "optim": {"lr": lr}})
    return Trainer(Masked(17, dropout=0.1), config, folder, verbosity="quiet", **options).fit()


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole") / "run"
    fit(folder)
    return folder


@pytest.fixture(scope="module")
def interrupted(whole: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make the same run as `whole`, killed before its last save."""
    folder = tmp_path_factory.mktemp("interrupted") / "run"
    shutil.copytree(whole, folder)
    (folder / "summary.json").unlink()
    shutil.rmtree(folder / "checkpoints" / f"step-{STEPS:08d}")
    return folder


def copy(run: Path, to: Path) -> Path:
    shutil.copytree(run, to / "run")
    return to / "run"


def flipped(file: Path, chance: random.Random) -> None:
    """Flip four bytes anywhere."""
    content = bytearray(file.read_bytes())
    for _ in range(4):
        content[chance.randrange(len(content))] ^= chance.randrange(1, 256)
    file.write_bytes(content)


def a_line_flipped(file: Path, chance: random.Random) -> None:
    """Flip bytes in the first third of the file, an early line of the ledger."""
    content = bytearray(file.read_bytes())
    content[chance.randrange(max(1, len(content) // 3))] ^= chance.randrange(1, 256)
    file.write_bytes(content)


def instead(put: Callable[[Path], object]) -> Callable[[Path, random.Random], None]:
    def damage(file: Path, _: random.Random) -> None:
        file.unlink()
        put(file)

    return damage


def a_socket(file: Path) -> None:
    before = os.getcwd()
    os.chdir(file.parent)  # because the paths of sockets are limited
    try:
        with socket.socket(socket.AF_UNIX) as end:
            end.bind(file.name)
    finally:
        os.chdir(before)


def other_values(file: Path, chance: random.Random) -> None:
    """Write the same JSON or YAML with one value of another type."""
    text = file.read_text()
    value = chance.choice([None, [], {}, "x", -1, 10**30, 1.5, True, "\ud800"])
    if file.suffix == ".yaml":
        loaded = yaml.safe_load(text)
        loaded[chance.choice(sorted(loaded))] = value if value != "\ud800" else "x"
        file.write_text(yaml.safe_dump(loaded))
        return
    parts = text.splitlines() if file.suffix == ".jsonl" else [text]
    place = chance.randrange(len(parts))
    loaded = json.loads(parts[place])
    loaded[chance.choice(sorted(loaded))] = value
    parts[place] = json.dumps(loaded, separators=(",", ":"))
    file.write_text("\n".join(parts) + "\n")


def truncated(file: Path, chance: random.Random) -> None:
    os.truncate(file, chance.randrange(file.stat().st_size))


DAMAGES: dict[str, Callable[[Path, random.Random], None]] = {
    "flipped": flipped,
    "a line flipped": a_line_flipped,
    "other values": other_values,
    "truncated": truncated,
    "empty": lambda file, _: os.truncate(file, 0),
    "zeros": lambda file, _: file.write_bytes(bytes(4096)) and None,
    "a list": lambda file, _: file.write_text("[]\n") and None,
    "a number": lambda file, _: file.write_text("9" * 5000 + "\n") and None,
    "nested": lambda file, _: file.write_text("[" * 100_000 + "\n") and None,
    "not UTF-8": lambda file, _: file.write_bytes(b'{"a": "\xff\xfe"}\n') and None,
    "missing": lambda file, _: file.unlink(),
    "a folder": instead(Path.mkdir),
    "a FIFO": instead(lambda file: os.mkfifo(file)),
    "a socket": instead(a_socket),
    "a device": instead(lambda file: file.symlink_to("/dev/zero")),
    "a loop": instead(lambda file: file.symlink_to(file)),
}
GONE_ON_FROM = (
    "flipped",
    "other values",
    "missing",
    "a FIFO",
)  # the other kinds have the same result, so this saves time


def in_one_line(work: Callable[[], object]) -> str:
    """Return the message of the DistribError that `work` raises, which must be one line; or an empty string."""
    said = ""
    try:
        work()
    except DistribError as error:
        said = str(error)
    assert "\n" not in said
    return said


def readable(run: Path, other: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Check that every command that reads a run ends, with output or with one line."""
    in_one_line(lambda: verify_run(run))
    in_one_line(lambda: watch_run(run))
    in_one_line(lambda: compare(load_runs([other, run])))
    in_one_line(lambda: export_run(run, run.parent / "exported"))
    capsys.readouterr()


def steps_of(run: Path) -> list[dict[str, Any]]:
    """Return the valid lines of the ledger."""
    trouble: list[str] = []
    return list(read_lines(run / "steps.jsonl", STEP, trouble))


def check_goes_on(run: Path, whole: Path, kind: str) -> None:
    """Resume, and check that the bits equal those of the undisturbed run, with all last steps and evaluations."""
    assert fit(run)["steps"] == STEPS, kind
    found, expected = tensors(run), tensors(whole)
    assert all((found[key] == expected[key]).all() for key in expected), kind
    ledger = steps_of(run)
    assert [line["step"] for line in ledger[-2:]] == [STEPS - 2, STEPS - 1], kind
    losses = {line["step"]: line["loss"] for line in steps_of(whole)}
    assert all(line["loss"] == losses[line["step"]] for line in ledger[-2:]), kind
    evaluations = [[entry["metrics"] for entry in lines(folder, "evals.jsonl")] for folder in (run, whole)]
    assert evaluations[0] == evaluations[1], kind


@pytest.mark.parametrize("name", SMALL)
def test_any_damage_of_a_small_file(
    whole: Path, interrupted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    """The run resumes to the same bits, because every checkpoint is valid."""
    for number, (kind, damage) in enumerate(DAMAGES.items()):
        folder = tmp_path / str(number)
        run = copy(whole if name == "summary.json" else interrupted, folder)
        damage(run / name, random.Random(f"{name} {kind}"))
        readable(run, whole, capsys)
        if kind in GONE_ON_FROM:
            check_goes_on(run, whole, kind)
            in_one_line(lambda run=run: verify_run(run))  # type: ignore[misc]
        shutil.rmtree(folder)


def test_files_that_are_set_aside_are_reported(whole: Path, interrupted: Path, tmp_path: Path) -> None:
    """There is an event for each file, and verify then finds no problem."""
    run = copy(interrupted, tmp_path)
    for name in ("config.yaml", "environment.json", "evals.jsonl", "events.jsonl"):
        file = run / name
        file.write_text(file.read_text()[:40] + "\0\n" + file.read_text()[60:])
    with pytest.raises(LedgerError) as error:
        verify_run(run)
    for name in ("config.yaml", "environment.json", "evals.jsonl", "events.jsonl"):
        assert f"{run / name}: damaged: " in str(error.value)
    fit(run)
    found = verify_run(run)
    assert found.steps == STEPS
    assert found.set_aside == [
        f"{name}.damaged-1" for name in ("config.yaml", "environment.json", "evals.jsonl", "events.jsonl")
    ]
    warnings = [event["reason"] for event in lines(run, "events.jsonl") if event["event"] == "warning"]
    at = run / "checkpoints" / f"step-{AT:08d}"
    for name in ("config.yaml", "environment.json"):
        (line,) = (line for line in warnings if name in line)
        assert line.endswith(f"; set aside as {name}.damaged-1; taken from {at}")
    for name in ("events.jsonl", "evals.jsonl"):
        said = f"{run / name}: damaged: cannot read 2 lines, the first is line 1; set aside as {name}.damaged-1"
        assert said in warnings
    starts = json.loads((run / "environment.json").read_text())["starts"]
    assert len(starts) == 2  # the first is the checkpoint's
    shutil.copytree(run, tmp_path / "plain")  # it does not affect another start
    (tmp_path / "plain" / "summary.json").unlink()
    check_same(run, whole)
    fit(tmp_path / "plain")


def test_changed_values_are_restored_from_the_checkpoint(interrupted: Path, tmp_path: Path) -> None:
    """The checkpoint's copy takes precedence."""
    run = copy(interrupted, tmp_path)
    for name, before, after in (
        ("config.yaml", "lr: 0.001", "lr: 0.002"),
        ("environment.json", '"training_samples": 17', '"training_samples": 16'),
        ("evals.jsonl", '"count":17', '"count":16'),
    ):
        text = (run / name).read_text()
        assert before in text
        (run / name).write_text(text.replace(before, after, 1))
    with pytest.raises(LedgerError) as error:
        verify_run(run)
    for said in ("optim.lr was 0.001, is 0.002", "training_samples is 16, was 17", "holds other evaluations"):
        assert said in str(error.value)
    fit(run)
    assert verify_run(run).set_aside == [
        f"{name}.damaged-1" for name in ("config.yaml", "environment.json", "evals.jsonl")
    ]


@pytest.mark.parametrize("kind", ["missing", "empty"])
def test_another_config_is_refused_if_the_ledger_is_lost(
    whole: Path, interrupted: Path, tmp_path: Path, kind: str
) -> None:
    """The checkpoints belong to the run, and another run may not resume from them."""
    run = copy(interrupted, tmp_path)
    DAMAGES[kind](run / "steps.jsonl", random.Random(0))
    with pytest.raises(RunDirError, match=r"another config \(optim\.lr was 0\.001, is 1\.0\)"):
        fit(run, lr=1.0)
    check_goes_on(run, whole, kind)


def test_a_config_changed_in_the_run_folder_is_refused(interrupted: Path, tmp_path: Path) -> None:
    """The run is resumed with `distrib train RUN/config.yaml --run-dir RUN`, but the checkpoint's copy differs."""
    run = copy(interrupted, tmp_path)
    text = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(text.replace("lr: 0.001", "lr: 0.002", 1))
    with pytest.raises(RunDirError, match=r"another config \(optim\.lr was 0\.001, is 0\.002, because .*config\.yaml"):
        fit(run, lr=0.002)
    assert len(lines(run)) == STEPS


@pytest.mark.parametrize("kind", ["missing", "a list"])
def test_a_fork_whose_origin_is_lost_is_refused(interrupted: Path, tmp_path: Path, kind: str) -> None:
    """Before its first save it would otherwise start from random weights."""
    run = tmp_path / "fork"
    fit(run, resume=str(interrupted), fork=True)
    (run / "summary.json").unlink()
    shutil.rmtree(run / "checkpoints")
    before = (run / "steps.jsonl").read_text()
    environment = (run / "environment.json").read_text()
    DAMAGES[kind](run / "environment.json", random.Random(0))
    with pytest.raises(RunDirError, match=r"environment\.json: cannot be read, .*--resume CHECKPOINT --fork"):
        fit(run)
    assert (run / "steps.jsonl").read_text() == before
    (run / "environment.json").write_text(environment)
    assert fit(run)["steps"] == STEPS
    assert (run / "steps.jsonl").read_text().count("\n") == STEPS - AT


def test_a_last_line_of_many_blocks(tmp_path: Path) -> None:
    """An incomplete last line of many blocks is ignored, and the lines before it are found."""
    file = tmp_path / "evals.jsonl"
    entries = [
        {"step": step, "count": 1, "metrics": {"x" * size: 1.0}, "seconds": 0.0}
        for step, size in enumerate((1, 1 << 17, 65_536, 3))
    ]
    file.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    ends = file.stat().st_size
    for tail in (0, 1, (1 << 16) - 1, 1 << 16, 5 << 16):
        with file.open("ab") as more:
            more.write(bytes(tail))
        assert last_line(file, EVALUATION) == entries[-1]
        os.truncate(file, ends)
    os.truncate(file, len(json.dumps(entries[0])) + 1 + len(json.dumps(entries[1])) + 1)
    assert last_line(file, EVALUATION) == entries[1]


def test_a_ledger_that_leads_to_no_checkpoint_is_repaired(whole: Path, interrupted: Path, tmp_path: Path) -> None:
    """The run resumes at the newest checkpoint, and names the steps whose lines are lost."""
    run = copy(interrupted, tmp_path)
    ledger = (run / "steps.jsonl").read_text().splitlines(keepends=True)
    for number in (2, 5):  # lines before the checkpoints
        ledger[number] = ledger[number].replace('"loss":', '"less":')
    (run / "steps.jsonl").write_text("".join(ledger))
    check_goes_on(run, whole, "")
    assert [line["step"] for line in steps_of(run)] == [0, 1, 3, 4, 6, 7]
    assert (run / "steps.jsonl.damaged-1").read_text() == "".join(ledger)
    with pytest.raises(LedgerError) as error:
        verify_run(run)
    assert f"{run / 'steps.jsonl'}: step 5 is not there: the file was damaged and set aside" in str(error.value)
    assert "line 3: is of step 3, where step 2 belongs; step 2 is missing before it" in str(error.value)
    assert str(error.value).count("steps.jsonl") == 2  # nothing else is reported
    (run / "summary.json").unlink()  # interrupted again, after the gap and at it
    shutil.rmtree(run / "checkpoints" / f"step-{STEPS:08d}")
    check_goes_on(run, whole, "again")
    assert not (run / "steps.jsonl.damaged-2").exists()
    assert [line["step"] for line in steps_of(run)] == [0, 1, 3, 4, 6, 7]
    shutil.rmtree(run / "checkpoints")
    shutil.copytree(interrupted / "checkpoints" / "step-00000003", run / "checkpoints" / "step-00000003")
    (run / "summary.json").unlink()
    check_goes_on(run, whole, "before the gap")
    assert [line["step"] for line in steps_of(run)] == [0, 1, 3, 4, 5, 6, 7]


def sealed(file: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Write a manifest with a valid digest and other content."""
    manifest = json.loads(file.read_text())
    del manifest["sha256"]
    file.write_text(seal(change(manifest)))


def test_a_damaged_manifest_is_passed_over(whole: Path, interrupted: Path, tmp_path: Path) -> None:
    """The checkpoint before is taken, and one line tells why."""
    others: dict[str, Callable[[Path, random.Random], None]] = {
        "other tensors": lambda file, _: sealed(file, lambda manifest: {**manifest, "tensors": []}),
        "no step": lambda file, _: sealed(file, lambda manifest: {**manifest, "step": None}),
        "other files": lambda file, _: sealed(file, lambda manifest: {**manifest, "files": {"x": 1}}),
    }
    for number, (kind, damage) in enumerate({**DAMAGES, **others}.items()):
        run = copy(interrupted, tmp_path / str(number))
        damage(run / "checkpoints" / f"step-{AT:08d}" / "manifest.json", random.Random(kind))
        found = latest_valid(RunDir(run), World())
        assert found is not None
        assert found.manifest["step"] == 3, kind
        (passed_over,) = found.passed_over
        assert f"step-{AT:08d}" in passed_over, kind
        assert "\n" not in passed_over, kind
        assert f"step-{AT:08d}" in in_one_line(lambda run=run: verify_run(run)), kind  # type: ignore[misc]
    check_goes_on(run, whole, "other files")


def test_checkpoints_of_older_versions_without_copies_of_files(whole: Path, interrupted: Path, tmp_path: Path) -> None:
    run = copy(interrupted, tmp_path)
    for manifest in run.rglob("manifest.json"):
        sealed(manifest, lambda manifest: {key: value for key, value in manifest.items() if key != "run"})
    undamaged = copy(run, tmp_path / "undamaged")
    verify_run(undamaged)
    fit(undamaged)
    check_same(undamaged, whole)
    (run / "environment.json").write_text("[]")
    with pytest.raises(LedgerError, match=r"environment.json: damaged: .*; no checkpoint holds a copy"):
        verify_run(run)
    check_goes_on(run, whole, "environment.json")  # which is started again
    run = copy(undamaged, tmp_path / "config")
    (run / "summary.json").unlink()
    for manifest in run.rglob("manifest.json"):
        sealed(manifest, lambda manifest: {key: value for key, value in manifest.items() if key != "run"})
    (run / "config.yaml").write_text("[]")
    assert "config.yaml: damaged: " in in_one_line(lambda: fit(run))


def test_no_command_blocks_on_a_fifo(whole: Path, interrupted: Path, tmp_path: Path, monkeypatch: Any) -> None:
    """A FIFO takes the place of a partial file, or of a file that trackers keep."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    run = copy(interrupted, tmp_path)
    (run / "wandb").mkdir(exist_ok=True)
    for name in (
        ".config.yaml.partial",
        ".summary.json.partial",
        ".curves.png.partial",
        "tracking.log",
        "wandb/run-id",
    ):
        os.mkfifo(run / name)
    check_goes_on(run, whole, "FIFOs")
    (run / "wandb" / "run-id").unlink()
    (run / "summary.json").unlink()
    check_goes_on(run, whole, "a FIFO for tracking.log")
    assert not list(run.glob(".*.partial"))


def test_an_environment_without_a_key_is_reported(whole: Path, tmp_path: Path) -> None:
    run = copy(whole, tmp_path)
    text = (run / "environment.json").read_text()
    (run / "environment.json").write_text(text.replace('"git_commit"', '"git_c0mmit"'))
    assert compare(load_runs([whole, run])).divergences[0].cause == "nothing"


@pytest.mark.parametrize("kind", ["a FIFO", "a device", "a folder"])
def test_a_finished_run_started_again(whole: Path, tmp_path: Path, kind: str) -> None:
    """Its summary is returned, and nothing that is not a regular file is opened."""
    run = copy(whole, tmp_path)
    for name in ("environment.json", "config.yaml"):
        DAMAGES[kind](run / name, random.Random(0))
    summary = json.loads((run / "summary.json").read_text())
    assert fit(run)["metrics"] == summary["metrics"]


def test_a_checkpoints_path_that_is_not_a_folder(interrupted: Path, tmp_path: Path) -> None:
    """The run does not start from scratch."""
    run = copy(interrupted, tmp_path)
    shutil.rmtree(run / "checkpoints")
    (run / "checkpoints").write_text("")
    with pytest.raises(CheckpointError, match=r"checkpoints: cannot be read: Not a directory"):
        fit(run)
    assert len(lines(run)) == STEPS


def test_commands_on_a_damaged_run(run: Run, whole: Path, interrupted: Path, tmp_path: Path) -> None:
    """Real processes print what can be read, and one line about what cannot."""
    folder = copy(interrupted, tmp_path)
    (folder / "config.yaml").write_bytes(b"\0\xff")
    os.unlink(folder / "evals.jsonl")
    os.mkfifo(folder / "evals.jsonl")
    text = (folder / "steps.jsonl").read_text()
    (folder / "steps.jsonl").write_text(text.replace('"step":1,', '"step":[],'))
    evaluated = run("distrib", "evaluate", folder)
    assert "eval/right" in check(evaluated)
    assert "config.yaml: damaged: " in evaluated.stderr
    watched = check(run("distrib", "watch", folder))
    assert f"step {STEPS}/{STEPS}" in watched
    assert f"{folder / 'evals.jsonl'}: damaged: not a regular file" in watched
    assert f"{folder / 'steps.jsonl'}: damaged: cannot read line 2" in watched
    compared = check(run("distrib", "compare", whole, folder))
    assert f"{folder / 'steps.jsonl'}: damaged: cannot read line 2" in compared
    verified = run("distrib", "verify", folder)
    check(verified, code=1)
    assert verified.stderr.count("\n") == 1, verified.stderr
    for name in ("config.yaml", "evals.jsonl", "steps.jsonl line 2"):
        assert name in verified.stderr
    check(run("distrib", "export", folder, "--out", "out"))
