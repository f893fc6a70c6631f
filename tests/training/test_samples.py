"""`Task.samples` and `Loss.sums`: what people look at, in the run folder, the trackers and the page."""

import csv
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from conftest import Run, check, check_same, lines, refused
from matplotlib.figure import Figure
from matplotlib.image import imread

from distrib.errors import ConfigError
from distrib.monitor.trackers.wandb_files import read_offline
from distrib.samples import Image, Table, Text, encode

CONFIG: dict[str, Any] = {
    "task": {"target": "tasks:Shown"},
    "data": {"global_batch_size": 16, "micro_batch_size": 4},
    "optim": {"name": "adamw", "lr": 0.01},
    "train": {"steps": 12},
    "eval": {"every_steps": 4},
    "checkpoint": {"every_steps": 4, "best": {"metric": "eval/right", "mode": "max"}},
}
NAMES = ["colours.png", "grey.png", "note.txt", "tokens.csv"]


def write(folder: Path, **changes: Any) -> Path:
    (folder / "shown.yaml").write_text(yaml.safe_dump({**CONFIG, **changes}))
    return folder / "runs" / "shown"


def files_of(run: Path) -> dict[str, bytes]:
    return {path.relative_to(run).as_posix(): path.read_bytes() for path in (run / "samples").rglob("*.*")}


def test_the_same_files_for_any_number_of_processes_and_after_a_kill(run: Run, tmp_path: Path) -> None:
    """The files of the second real evaluation are not written yet when the process is killed in it."""
    for name in ("alone", "two", "killed"):
        (tmp_path / name).mkdir()
    alone = write(tmp_path / "alone")
    check(run("distrib", "train", "shown.yaml", cwd=tmp_path / "alone"))
    found = files_of(alone)
    assert sorted(found) == [f"samples/step-{step:08d}/{name}" for step in (4, 8, 12) for name in NAMES]
    for line in lines(alone, "evals.jsonl"):
        assert sorted(line["samples"]) == [f"samples/step-{line['step']:08d}/{name}" for name in NAMES]
        folder = alone / "samples" / f"step-{line['step']:08d}"
        _, *rows = csv.reader(io.StringIO((folder / "tokens.csv").read_text()))
        assert sum(int(right) for _, right in rows) == line["metrics"]["eval/right"]
        assert (folder / "note.txt").read_text().startswith(f"{line['metrics']['eval/right']:.0f} are right")
        assert imread(folder / "grey.png").shape == imread(folder / "colours.png").shape == (8, 12, 4)
    two = write(tmp_path / "two")
    check(run("distrib", "launch", "--processes", 2, "shown.yaml", cwd=tmp_path / "two"))
    assert files_of(two) == found
    killed = write(tmp_path / "killed", task={"target": "tasks:Shown", "at": 3})  # the first is the trial
    check(run("distrib", "train", "shown.yaml", cwd=tmp_path / "killed"), code=-9)
    assert len(files_of(killed)) == len(NAMES)
    check(run("distrib", "train", "shown.yaml", cwd=tmp_path / "killed"))
    assert files_of(killed) == found
    check_same(killed, alone)


def test_files_of_lost_steps_go(run: Run, tmp_path: Path) -> None:
    folder = write(tmp_path)
    check(run("distrib", "train", "shown.yaml"))
    check(run("distrib", "train", "shown.yaml", "--resume", folder / "checkpoints" / "step-00000008", "train.steps=12"))
    assert len(files_of(folder)) == 3 * len(NAMES)
    (folder / "samples" / "step-00000099").mkdir()
    check(run("distrib", "train", "shown.yaml", "--resume", folder / "checkpoints" / "step-00000008"))
    assert not (folder / "samples" / "step-00000099").exists()


def test_several_sets(run: Run, tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text(
        "import tasks\n\nclass Own(tasks.Shown):\n"
        "    def eval_datasets(self):\n        return {'one': self._data(2), 'two': self._data(3)}\n\n"
        "    def samples(self, rows, name):\n        return {'name': tasks.Text(name)}\n"
    )
    folder = write(tmp_path, task={"target": "own:Own"}, checkpoint={}, eval={})
    check(run("distrib", "train", "shown.yaml"))
    assert files_of(folder) == {
        "samples/step-00000012/one/name.txt": b"one",
        "samples/step-00000012/two/name.txt": b"two",
    }


def test_sums_and_samples_in_summary_trackers_and_list(run: Run, tmp_path: Path) -> None:
    folder = write(tmp_path, tracking={"wandb": "offline", "others": ["tensorboard"]})
    check(run("distrib", "train", "shown.yaml", WANDB_MODE="offline"))
    ledger = lines(folder)
    last = {key: value for key, value in ledger[-1].items() if key.startswith("train/")}
    assert last.keys() == {"train/right", "train/squares", "train/none"}
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["metrics"].items() >= last.items()
    (listed,) = json.loads(check(run("distrib", "ls", "--json", "runs")))
    assert listed["metrics"].items() >= last.items()
    (offline,) = (folder / "wandb").glob("offline-run-*")
    history = read_offline(offline).history
    assert [row["train/squares"] for row in history] == [line["train/squares"] for line in ledger]
    for row in (history[step - 1] for step in (4, 8, 12)):
        kinds = {key: row[f"samples/{key}._type"] for key in ("grey", "colours", "tokens", "note")}
        assert kinds == {"grey": "image-file", "colours": "image-file", "tokens": "table-file", "note": "html-file"}
    (picture,) = offline.glob("files/media/images/samples/grey_12_*.png")
    assert picture.read_bytes() == (folder / "samples/step-00000012/grey.png").read_bytes()
    found = in_tensorboard(folder)
    assert found["images"] == ["samples/colours", "samples/grey"]
    assert found["tensors"] == ["samples/note/text_summary", "samples/tokens/text_summary"]
    assert found["train/right"] == pytest.approx([line["train/right"] for line in ledger], rel=1e-6)  # single precision


def in_tensorboard(folder: Path) -> dict[str, Any]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (file,) = (file for file in folder.rglob("events.out.tfevents.*") if file.parent.name == "shown")
    read = EventAccumulator(str(file))
    read.Reload()
    tags = {kind: sorted(read.Tags()[kind]) for kind in ("images", "tensors")}
    return {**tags, "train/right": [scalar.value for scalar in read.Scalars("train/right")]}


def test_compare_at_a_checkpoint(run: Run, tmp_path: Path) -> None:
    """Metrics and samples are those at the best evaluation, or after a step."""
    folder = write(tmp_path)
    check(run("distrib", "train", "shown.yaml"))
    check(run("distrib", "train", "shown.yaml", "optim.lr=0.03", "--run-dir", "runs/other"))
    evaluations = {path: lines(tmp_path / "runs" / path, "evals.jsonl") for path in ("shown", "other")}
    best = {
        path: max(found, key=lambda line: (line["metrics"]["eval/right"], -line["step"]))
        for path, found in evaluations.items()
    }
    for chosen, expected in (
        ("best", best),
        ("4", {path: found[0] for path, found in evaluations.items()}),
        ("newest", {path: found[-1] for path, found in evaluations.items()}),
    ):
        said = check(run("distrib", "compare", folder, "runs/other", "--checkpoint", chosen))
        page = (tmp_path / "comparison.html").read_text()
        for path, line in expected.items():
            assert f"{line['metrics']['eval/right']:.5g}" in said
            assert f"{line['metrics']['eval/loss']:.5g}" in said
            text = (tmp_path / "runs" / path / "samples" / f"step-{line['step']:08d}" / "note.txt").read_text()
            assert text in page
    line = refused(run("distrib", "compare", folder, "runs/other", "--checkpoint", 13))
    assert f"--checkpoint 13: {folder} has 12 steps; give one of them" in line
    for chosen, why in (("worst", "worst is not newest, best or a step"), ("-1", "-1 is not newest, best or a step")):
        assert why in refused(run("distrib", "compare", folder, "runs/other", "--checkpoint", chosen))
    check(run("distrib", "train", "shown.yaml", "checkpoint.best=null", "--run-dir", "runs/none"))
    line = refused(run("distrib", "compare", "runs/none", "runs/other", "--checkpoint", "best"))
    assert "no evaluation of runs/none was the best by its checkpoint.best or train.stop; give newest or a step" in line


@pytest.mark.parametrize(
    ("pixels", "shape", "corner"),
    [
        (np.full((3, 5), 200, np.uint8), (3, 5, 4), (200, 200, 200)),
        (torch.full((3, 5), 0.4), (3, 5, 4), (102, 102, 102)),
        (torch.ones(3, 5, dtype=torch.bool), (3, 5, 4), (255, 255, 255)),
        (torch.full((1, 4, 5), 0.2, dtype=torch.float64), (4, 5, 4), (51, 51, 51)),
        (torch.tensor([0.0, 0.2, 1.0])[:, None, None].expand(3, 4, 5), (4, 5, 4), (0, 51, 255)),
        (np.array([0, 51, 255], np.uint8)[None, None].repeat(4, 0).repeat(5, 1), (4, 5, 4), (0, 51, 255)),
        (torch.rand(3, 4, 5, requires_grad=True) * 0, (4, 5, 4), (0, 0, 0)),
        (np.zeros((4, 5, 4), np.uint8), (4, 5, 4), (0, 0, 0)),
    ],
)
def test_pixels(pixels: Any, shape: tuple[int, ...], corner: tuple[int, ...]) -> None:
    content = encode({"a": Image(pixels)})["a.png"]
    read = imread(io.BytesIO(content))
    assert read.shape == shape
    assert tuple(round(float(value) * 255) for value in read[0, 0, :3]) == corner
    assert encode({"a": Image(pixels)})["a.png"] == content


def test_a_figure() -> None:
    figure = Figure(figsize=(1, 2), dpi=50)
    assert imread(io.BytesIO(encode({"a": Image(figure)})["a.png"])).shape == (100, 50, 4)


@pytest.mark.parametrize(
    ("samples", "said"),
    [
        (3, "task.samples: returned int; return a dict of distrib.Image, Text and Table by name"),
        ({"../a": Text("")}, "task.samples: '../a' is no name; give letters, digits, '_', '-', and later '.'"),
        ({".a": Text("")}, "task.samples: '.a' is no name; give letters, digits, '_', '-', and later '.'"),
        ({3: Text("")}, "task.samples: 3 is no name; give letters, digits, '_', '-', and later '.'"),
        ({"a": "text"}, "task.samples: 'a': it is str; give distrib.Image, distrib.Text or distrib.Table"),
        ({"a": Text(3)}, "task.samples: 'a': the text is int, not a string"),  # type: ignore[arg-type]
        ({"a": Table(["x"], [[1], [2, 3]])}, "task.samples: 'a': row 2 of the table has 2 values for 1 columns"),
        ({"a": Table(["x"], [["long" * 30_000]])}, "'a': row 1 of the table has a value of 120,000 characters; cut it"),
        ({"a": Image(np.ones(3))}, "task.samples: 'a': pixels of shape (3,); give (H, W), (H, W, C) or (C, H, W) with"),
        ({"a": Image(np.ones((2, 2, 2)))}, "'a': pixels of shape (2, 2, 2); give (H, W), (H, W, C) or (C, H, W) w"),
        ({"a": Image(torch.full((2, 2), 1.5))}, "'a': pixels of float32 that are not all from 0 to 1; give these, or"),
        ({"a": Image(torch.full((2, 2), torch.nan))}, "'a': pixels of float32 that are not all from 0 to 1; give th"),
        ({"a": Image(torch.ones(2, 2).int())}, "'a': pixels of int32 that are not all from 0 to 1; give these, or byt"),
    ],
)
def test_wrong_samples(samples: Any, said: str) -> None:
    with pytest.raises(ConfigError) as error:
        encode(samples)
    assert said in str(error.value)
    assert "\n" not in str(error.value)


def test_samples_are_tried_before_training(run: Run, tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text(
        "import tasks\n\nclass Own(tasks.Shown):\n    def samples(self, rows):\n        return {'a': 'text'}\n"
    )
    folder = write(tmp_path, task={"target": "own:Own"})
    said = refused(run("distrib", "launch", "--processes", 2, "shown.yaml"))
    assert said == "error: task.samples: 'a': it is str; give distrib.Image, distrib.Text or distrib.Table"
    assert not (folder / "steps.jsonl").exists() or not lines(folder)


def test_a_failure_in_the_middle_is_a_warning(run: Run, tmp_path: Path) -> None:
    """The metrics are kept, and the run goes on; the trial and the first evaluation had samples."""
    (tmp_path / "own.py").write_text(
        "import tasks\n\n\nclass Own(tasks.Shown):\n"
        "    def samples(self, rows):\n        self.seen += 1\n"
        "        return {'a': tasks.Image(rows['right'][None].float() * (self.seen > 2))}\n"
    )
    folder = write(tmp_path, task={"target": "own:Own"})
    check(run("distrib", "launch", "--processes", 2, "shown.yaml"))
    assert ["samples" in line for line in lines(folder, "evals.jsonl")] == [True, False, False]
    reasons = [event["reason"] for event in lines(folder, "events.jsonl") if event["event"] == "warning"]
    assert [reason.partition(",")[0] for reason in reasons] == [
        "task.samples failed after step 8",
        "task.samples failed after step 12",
    ]
    assert "pixels of float32 that are not all from 0 to 1" in reasons[0]


@pytest.mark.parametrize(
    ("decorator", "parameters"),
    [("", "self, rows, limit=8"), ("@staticmethod\n    ", "rows"), ("@classmethod\n    ", "cls, rows, name")],
)
def test_kinds_of_methods(run: Run, tmp_path: Path, decorator: str, parameters: str) -> None:
    (tmp_path / "own.py").write_text(
        f"import tasks\n\n\nclass Own(tasks.Masked):\n    {decorator}def samples({parameters}):\n"
        "        return {'a': tasks.Text(f'{locals().get(\"limit\")}{locals().get(\"name\")}')}\n"
    )
    folder = write(tmp_path, task={"target": "own:Own"}, eval={}, checkpoint={})
    check(run("distrib", "train", "shown.yaml"))
    expected = {"self, rows, limit=8": b"8None", "rows": b"NoneNone", "cls, rows, name": b"None"}[parameters]
    assert files_of(folder) == {"samples/step-00000012/a.txt": expected}


def test_a_table_that_only_quotes_keep_together(run: Run, tmp_path: Path) -> None:
    """Trackers and the page read what is written; a sample that they cannot read does not keep numbers from them."""
    (tmp_path / "own.py").write_text(
        "import tasks\n\n\nclass Own(tasks.Shown):\n    def samples(self, rows):\n"
        "        return {'step-3': tasks.Table(['x', 'y'], [['a\\rb', 1], ['\"c\\n,', '=d']])}\n"
    )
    folder = write(tmp_path, task={"target": "own:Own"}, tracking={"wandb": "offline"})
    check(run("distrib", "train", "shown.yaml", WANDB_MODE="offline"))
    (file, *_) = sorted((folder / "samples").rglob("step-3.csv"))
    assert list(csv.reader(file.open(newline=""))) == [["x", "y"], ["a\rb", "1"], ['"c\n,', "=d"]]
    (offline,) = (folder / "wandb").glob("offline-run-*")
    assert len(read_offline(offline).history) == 12
    check(run("distrib", "train", "shown.yaml", "seed=5", "--run-dir", "runs/other", WANDB_MODE="offline"))
    file.write_bytes(b"x,y\na\rb,1\n")
    check(run("distrib", "compare", folder, "runs/other"))
