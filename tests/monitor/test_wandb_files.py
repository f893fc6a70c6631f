"""Reading real offline folders of wandb, whole and torn, from distrib and from another program."""

import math
import shutil
import sys
from pathlib import Path

import pytest
from conftest import check, no_process_left, starter
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tasks import Masked

from distrib import Config, Trainer
from distrib.errors import RunDirError
from distrib.monitor.compare.comparison import compare
from distrib.monitor.compare.runs import load_runs
from distrib.monitor.trackers.wandb_files import offline_folders, read_offline

pytestmark = [pytest.mark.xdist_group("wandb"), pytest.mark.slow]  # one process makes what they share

# What distrib's tracker logs of a run folder, and a program of somebody else's.
WRITE = """
import json, sys, yaml, wandb
from pathlib import Path
folder = Path(sys.argv[1])
config = yaml.safe_load((folder / "config.yaml").read_text())
environment = json.loads((folder / "environment.json").read_text())
config["distrib"] = {**environment, **environment.pop("starts")[-1]}
steps = [json.loads(line) for line in (folder / "steps.jsonl").read_text().splitlines()]
evals = {e["step"]: e["metrics"] for e in map(json.loads, (folder / "evals.jsonl").read_text().splitlines())}
for name, part in (("begun", steps[:6]), ("resumed", steps[4:])):  # killed after 6 steps, gone on with after 4
    with wandb.init(dir=name, project="p", id="abc", name="tracked", config=config) as run:
        for step in part:
            metrics = {f"train/{key}": step[key] for key in ("loss", "lr", "grad_norm")}
            done = step["step"] + 1
            run.log(metrics | {"perf/step_seconds": step["seconds"]} | evals.get(done, {}), step=done)
with wandb.init(dir="other", project="q", name="other", config={"lr": 0.1, "model": {"depth": 2}}) as run:
    for step in range(300):
        text = "x" * 500  # to fill several blocks
        run.log({"loss": 2.0 ** -step, "val": {"acc": step}, "text": text, "nothing": float("nan"), "flag": True})
    run.config.update({"late": 1})
    run.summary["best"] = 3
run = wandb.init(dir="failed", project="q", name="failed")
run.log({"loss": 1.0})
run.mark_preempting()
run.finish(exit_code=3)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wandb")
    config = {
        "train": {"steps": 8},
        "eval": {"every_steps": 4},
        "data": {"global_batch_size": 8, "micro_batch_size": 8},
    }
    Trainer(Masked(), Config.from_dict(config), folder / "run").fit()
    (folder / "write.py").write_text(WRITE)
    for name in ("begun", "resumed", "other", "failed"):
        (folder / name).mkdir()
    with no_process_left() as mark:
        check(starter(mark, folder)(sys.executable, "write.py", "run", WANDB_MODE="offline", WANDB_SILENT="true"))
    return folder


def test_another_programs_run(folder: Path) -> None:
    (found,) = offline_folders(folder / "other" / "wandb")
    run = read_offline(found)
    assert (run.name, run.project, run.exit_code, run.preempting) == ("other", "q", 0, False)
    assert found.name.endswith(run.id)
    assert run.config == {"lr": 0.1, "model": {"depth": 2}, "late": 1}
    assert [entry["_step"] for entry in run.history] == list(range(300))
    assert run.history[3]["loss"] == 0.125
    assert run.history[3]["val.acc"] == 3
    assert math.isnan(run.history[3]["nothing"])
    assert run.summary["best"] == 3


def test_a_run_that_failed(folder: Path) -> None:
    run = read_offline(offline_folders(folder / "failed")[0])
    assert (run.exit_code, run.preempting) == (3, True)


def test_a_run_of_distrib_equals_its_run_folder(folder: Path, tmp_path: Path) -> None:
    """Two starts of one run; steps that were computed twice count once."""
    for second, name in enumerate(("begun", "resumed")):
        (at,) = offline_folders(folder / name)
        shutil.copytree(at, tmp_path / "wandb" / f"offline-run-20260101_00000{second}-abc")
    comparison = compare(load_runs([folder / "run", tmp_path]))
    run, tracked = comparison.runs
    assert (tracked.name, tracked.state, tracked.restarts) == ("tracked", "finished", 1)
    assert comparison.differences == []
    assert comparison.divergences[0].because == "the same to the last bit over 8 steps and 2 evaluations"
    assert comparison.figures[0].final == comparison.figures[1].final
    assert comparison.figures[0].best == comparison.figures[1].best
    assert tracked.seconds.values == pytest.approx(run.seconds.values)
    assert comparison.figures[1].samples_per_second == pytest.approx(comparison.figures[0].samples_per_second)


def test_a_run_of_distrib_and_one_of_another_program(folder: Path) -> None:
    comparison = compare(load_runs([folder / "run", folder / "other"]))
    assert comparison.divergences[0].steps == 0  # of another name: train/loss and loss
    assert set(comparison.figures[1].final) == {"loss", "val.acc"}
    assert comparison.runs[1].curves["loss"].steps[0] == 1


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_a_torn_file(folder: Path, tmp_path: Path, data: st.DataObject) -> None:
    """Wherever the file ends, its records are the first ones of the whole file."""
    (found,) = offline_folders(folder / "other")
    (file,) = found.glob("*.wandb")
    content = file.read_bytes()
    assert len(content) > 4 * 32768
    history = read_offline(found).history
    length = data.draw(st.integers(7, len(content)))
    (tmp_path / file.name).write_bytes(content[:length])
    torn = read_offline(tmp_path).history
    assert repr(torn) == repr(history[: len(torn)])  # with nan in it
    assert len(torn) >= (length - 32768) * len(history) // len(content) - 1


def test_a_damaged_file(folder: Path, tmp_path: Path) -> None:
    (file,) = offline_folders(folder / "other")[0].glob("*.wandb")
    content = bytearray(file.read_bytes())
    content[5000] ^= 1
    (tmp_path / file.name).write_bytes(content)
    with pytest.raises(RunDirError, match=r"run-.*\.wandb: cannot be read as wandb's records: damaged at byte"):
        read_offline(tmp_path)
    (tmp_path / file.name).write_bytes(b"something else")
    with pytest.raises(RunDirError, match="does not begin as such a file does"):
        read_offline(tmp_path)


def test_refusals(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(RunDirError, match=r"there is no run-\*\.wandb in it"):
        read_offline(tmp_path)
    for name in ("other", "failed"):
        shutil.copytree(offline_folders(folder / name)[0], tmp_path / "wandb" / offline_folders(folder / name)[0].name)
    with pytest.raises(RunDirError, match="holds several runs of wandb; give one of them, for example"):
        load_runs([folder / "run", tmp_path / "wandb"])
