"""accelerate's trackers, by their names."""

import signal
from pathlib import Path

import pytest
import yaml
from conftest import Run, check, lines, refused, start, steps_done, until

CONFIG = {
    "task": {"target": "tasks:Slow", "dropout": 0.1},
    "data": {"global_batch_size": 16, "micro_batch_size": 4},
    "train": {"steps": 400},
    "eval": {"every_steps": 20},
    "checkpoint": {"every_steps": 20},
    "tracking": {"wandb": "off", "others": ["tensorboard"]},
}


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(CONFIG))
    return path


def test_tensorboard_through_a_restart(mark: str, run: Run, tmp_path: Path, config: Path) -> None:
    """TensorBoard's own reader reads the files back."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    process = start(mark, tmp_path, "train", config)
    folder = tmp_path / "runs" / "run"
    until(lambda: steps_done(folder) >= 30 and any((folder / "run").glob("events.out.tfevents.*")), "it does not begin")
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 75, said
    check(run("distrib", "train", config))
    files = sorted(folder.rglob("events.out.tfevents.*"))
    found: dict[str, dict[int, float]] = {}
    for file in files:
        read = EventAccumulator(str(file))
        read.Reload()
        for tag in read.Tags()["scalars"]:
            for scalar in read.Scalars(tag):
                assert scalar.step not in found.setdefault(tag, {}), (tag, scalar.step)
                found[tag][scalar.step] = scalar.value
    losses = {line["step"] + 1: line["loss"] for line in lines(folder)}
    assert found["train/loss"] == pytest.approx(losses, rel=1e-6)  # it keeps single precision
    assert found["eval/right"] == {line["step"]: line["metrics"]["eval/right"] for line in lines(folder, "evals.jsonl")}


def test_an_unknown_tracker_is_refused(run: Run, config: Path) -> None:
    said = refused(run("distrib", "train", config, "tracking.others=[scrapbook]"))
    assert "tracking.others: 'scrapbook' is no tracker that accelerate has: aim, " in said


def test_a_tracker_that_is_not_installed_is_refused(run: Run, config: Path) -> None:
    assert "dvclive is not installed here" in refused(run("distrib", "train", config, "tracking.others=[dvclive]"))
