"""`distrib init`: what it writes trains as it stands on a user's files, and the same on one and on two processes."""

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from conftest import Run, check, lines, losses, refused
from matplotlib.image import imsave

POINTS = """
import torch
from torch import nn
from torch.utils.data import Dataset, TensorDataset


class Net(nn.Linear):
    def __init__(self) -> None:
        super().__init__(3, 2)


def numbers() -> TensorDataset:
    inputs = torch.rand(64, 3)
    return TensorDataset(inputs, inputs @ torch.ones(3, 2))


def classes() -> Dataset:
    inputs = torch.rand(64, 3)
    return TensorDataset(inputs, (inputs.sum(1) > 1.5).long())


def odd() -> list:
    return [1.0] * 64


def stream() -> Dataset:
    return Stream()


def none() -> Dataset:
    return TensorDataset(torch.ones(0, 3), torch.ones(0, 2))


def words() -> Dataset:
    return Words()


class Words(Dataset):
    def __len__(self):
        return 64

    def __getitem__(self, index):
        return torch.ones(3), "a word"


class Stream(torch.utils.data.IterableDataset):
    def __iter__(self):
        return iter(())


class Odd(Dataset):
    def __getitem__(self, index):
        return 1.0
"""


def train(run: Run, name: str, *overrides: str) -> Path:
    """Train on one process and on two, which must have the same losses. Return the run folder."""
    check(run("distrib", "train", f"{name}.yaml", *overrides, "--run-dir", "runs/alone", timeout=300))
    check(run("distrib", "launch", "--processes", 2, f"{name}.yaml", *overrides, timeout=300))
    return Path("runs") / name


def metrics_of(folder: Path) -> dict[str, float]:
    found: dict[str, float] = json.loads((folder / "summary.json").read_text())["metrics"]
    return found


def check_same_losses(tmp_path: Path, name: str) -> None:
    alone, two = (losses(tmp_path / "runs" / run) for run in ("alone", name))
    np.testing.assert_allclose(two, alone, rtol=1e-4)  # hundreds of steps, each within 1e-5


def test_without_files(run: Run, tmp_path: Path) -> None:
    said = check(run("distrib", "init"))
    assert "distrib launch --processes 2 first.yaml" in said
    assert sorted(path.name for path in tmp_path.iterdir()) == ["first.yaml", "first_task.py"]
    folder = tmp_path / train(run, "first", "train.epochs=20")
    check_same_losses(tmp_path, "first")
    assert metrics_of(folder)["eval/accuracy"] > 0.9  # one half by guessing
    assert "error: first.yaml: is there already; give another name with --name" in refused(run("distrib", "init"))
    check(run("distrib", "init", "--name", "second"))
    assert (tmp_path / "second_task.py").read_text() == (tmp_path / "first_task.py").read_text()


def write_table(path: Path, rows: int = 150) -> None:
    """Columns: a number that may be missing, a text of three, an identifier, a constant, a class, and a number."""
    chance = np.random.default_rng(3)
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["size", "colour, of it", "name", "same", "kind", "price"])
        for row in range(rows):
            size, colour = chance.uniform(1, 9), chance.integers(3)
            price = 2 * size + 5 * colour + chance.normal() / 10
            known = "" if row % 10 == 3 else f"{size:.3f}"
            kind = "large" if size > 5 else "small"
            writer.writerow([known, ["red", "green", "blue"][colour], f"thing {row}", 7, kind, f"{price:.3f}"])


def test_a_table(run: Run, tmp_path: Path) -> None:
    write_table(tmp_path / "My things-2.csv")
    check(run("distrib", "init", "--from", "csv", "My things-2.csv"))
    config = yaml.safe_load((tmp_path / "my_things_2.yaml").read_text())
    task = {"target": "my_things_2_task:Table", "path": "My things-2.csv", "column": "price", "kind": "number"}
    assert config["task"] == task
    folder = tmp_path / train(run, "my_things_2")
    check_same_losses(tmp_path, "my_things_2")
    assert metrics_of(folder)["eval/r2"] > 0.8  # 0 by the mean; the size is missing in a tenth
    assert next((folder / "samples").glob("*/worst.csv")).read_bytes().startswith(b"answer,guess\r\n")
    check(run("distrib", "init", "--from", "csv", "My things-2.csv", "--column", "kind", "--name", "kinds"))
    check(run("distrib", "train", "kinds.yaml", timeout=300))
    folder = tmp_path / "runs" / "kinds"
    assert metrics_of(folder)["eval/accuracy"] > 0.85
    (confusion, *_) = sorted((folder / "samples").glob("*/confusion.csv"))
    header, *counts = csv.reader(confusion.open())
    assert header == ["answer", "large", "small"]
    assert sum(int(count) for row in counts for count in row[1:]) == 30


def test_pictures(run: Run, tmp_path: Path) -> None:
    chance = np.random.default_rng(3)
    for number in range(40):
        shade = np.zeros((20, 30, 3))
        shade[:, :, number % 2] = chance.uniform(0.6, 1)
        folder = tmp_path / "photos" / ("red", "green")[number % 2] / "deeper"
        folder.mkdir(parents=True, exist_ok=True)
        imsave(folder / f"{number}.{'png' if number % 3 else 'jpg'}", shade)
    (tmp_path / "photos" / "red" / "notes.txt").write_text("not a picture")
    (tmp_path / "photos" / "red" / "._1.png").write_text("what macOS leaves")
    (tmp_path / "photos" / ".cache").mkdir()
    (tmp_path / "photos" / ".cache" / "1.png").write_text("hidden")
    check(run("distrib", "init", "--from", "images", "photos/"))
    folder = tmp_path / train(run, "photos", "train.epochs=10", "task.size=16")
    check_same_losses(tmp_path, "photos")
    assert metrics_of(folder)["eval/accuracy"] > 0.9


def test_text(run: Run, tmp_path: Path) -> None:
    (tmp_path / "books" / "more").mkdir(parents=True)
    (tmp_path / "books" / "one.txt").write_text("the cat sat on the mat. " * 200)
    (tmp_path / "books" / "more" / "two.md").write_text("the dog sat on the log. " * 200)
    check(run("distrib", "init", "--from", "text", "books"))
    folder = tmp_path / train(run, "books", "train.epochs=4", "task.width=32", "task.layers=2")
    check_same_losses(tmp_path, "books")
    assert metrics_of(folder)["eval/bits_per_byte"] < 4.5  # 8 by guessing
    evaluations = lines(folder, "evals.jsonl")
    assert all(name.endswith(("hardest.txt", "easiest.txt")) for line in evaluations for name in line["samples"])


@pytest.mark.parametrize(("dataset", "loss"), [("numbers", "MSELoss"), ("classes", "CrossEntropyLoss")])
def test_a_module_of_ones_own(run: Run, tmp_path: Path, dataset: str, loss: str) -> None:
    (tmp_path / "points.py").write_text(POINTS)
    check(run("distrib", "init", "--from", "module", "points:Net", f"points:{dataset}", f"points:{dataset}"))
    assert not (tmp_path / "points_task.py").exists()
    assert yaml.safe_load((tmp_path / "points.yaml").read_text())["task"]["loss"] == loss
    check(run("distrib", "train", "points.yaml", "train.epochs=5"))
    first, last = losses(tmp_path / "runs" / "points")[0], losses(tmp_path / "runs" / "points")[-1]
    assert last < first


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["table.csv"], "error: table.csv: what is it? Add --from csv, images, text or module"),
        (["--from", "cvs", "table.csv"], "--from: 'cvs'; give csv, images, text or module, did you mean csv?"),
        (["--from", "csv"], "--from csv: give a CSV file, such as table.csv; given: nothing"),
        (["--from", "csv", "a.csv", "b.csv"], "--from csv: give a CSV file, such as table.csv; given: a.csv b.csv"),
        (["--from", "csv", "none.csv"], "none.csv: cannot be read as a CSV file: "),
        (["--from", "csv", "photos"], "photos: cannot be read as a CSV file: "),
        (
            ["--from", "csv", "table.csv", "--column", "prise"],
            "--column: 'prise' is not among those of table.csv",
        ),
        (
            ["--from", "csv", "table.csv", "--column", "name"],
            "name has 150 different values in 150 rows, too many",
        ),
        (
            ["--from", "csv", "table.csv", "--column", "same"],
            "table.csv: all rows have the same same; there is",
        ),
        (["--from", "csv", "short.csv"], "short.csv: 5 rows with a value of price; give 20 or more"),
        (["--from", "csv", "uneven.csv"], "uneven.csv: row 3 has more or fewer values than the first line has names"),
        (["--from", "csv", "twice.csv"], "twice.csv: its first line has the name 'a' twice; give each column its own"),
        (["--from", "csv", "bytes.csv"], "bytes.csv: cannot be read as a CSV file: 'utf-8' codec can't decode byte"),
        (
            ["--from", "csv", "table.csv", "--name", "1st"],
            "--name: '1st'; give up to 100 letters, digits and '_'",
        ),
        (["--from", "images", "none"], "none: no such folder; give a folder with a folder of pictures for each class"),
        (["--from", "images", "photos"], "photos: pictures of 0 class(es); give a folder with a folder of pictures fo"),
        (["--from", "text", "none.txt"], "none.txt: cannot be read: No such file or directory"),
        (["--from", "text", "short.csv"], "short.csv: 1 pieces of 128 bytes; give 20 or more"),
        (
            ["--from", "csv", "names.csv"],
            "no column can be used to predict price: name have one value, or too many diff",
        ),
        (
            ["--from", "text", "empty"],
            "empty: no .txt or .md file in it; give a text file, or a folder of .txt and .md",
        ),
        (["--from", "images", "broken"], "broken/a/0.png: cannot be read as a picture: cannot identify image file"),
        (
            ["--from", "module", "points:Net", "points:stream"],
            "points:stream: is a stream, has no __len__, or no samples",
        ),
        (["--from", "module", "points:Net", "points:none"], "points:none: is a stream, has no __len__, or no samples"),
        (["--from", "module", "points:Net", "points:words"], "points:words: give a dataset of samples (input, target)"),
        (["--from", "csv", "table.csv", "--name", "n" * 300], "give up to 100 letters, digits and '_'"),
        (["--from", "text", "short.csv", "--column", "a"], "--column: 'a' is for --from csv"),
        (
            ["--from", "module", "points:Net"],
            "--from module: give your module and your dataset, as net:Net",
        ),
        (["--from", "module", "points:Nat", "points:numbers"], "module 'points' has no 'Nat'"),
        (["--from", "module", "points:Net", "points:Net"], "points:Net is not a Dataset but a class Net"),
        (["--from", "module", "points:Net", "points:Odd"], "points:Odd: is a stream, has no __len__, or no samples"),
    ],
)
def test_bad_input(run: Run, tmp_path: Path, arguments: list[str], said: str) -> None:
    write_table(tmp_path / "table.csv")
    write_table(tmp_path / "short.csv", rows=5)
    (tmp_path / "uneven.csv").write_text("a,b\n1,2\n1\n")
    (tmp_path / "twice.csv").write_text("a,a\n1,2\n")
    (tmp_path / "bytes.csv").write_bytes(b"a,b\n\xff,1\n")
    rows = "".join(f"name {row},{row}.5\n" for row in range(100))
    (tmp_path / "names.csv").write_text(f"name,price\n{rows}")
    (tmp_path / "photos").mkdir()
    (tmp_path / "empty").mkdir()
    for name in ("broken/a", "broken/b", "broken/a/.hidden"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "0.png").write_text("no picture")
    (tmp_path / "points.py").write_text(POINTS)
    before = sorted(path.name for path in tmp_path.iterdir())
    assert said in refused(run("distrib", "init", *arguments))
    assert sorted(path.name for path in tmp_path.iterdir() if path.name != "__pycache__") == before


def test_existing_links(run: Run, tmp_path: Path) -> None:
    (tmp_path / "first_task.py").symlink_to("elsewhere.py")
    assert "first_task.py: is there already; give another name" in refused(run("distrib", "init"))
    assert not (tmp_path / "elsewhere.py").exists()


def test_a_table_with_missing_values_and_columns_of_no_use(run: Run, tmp_path: Path) -> None:
    """NA and its like are no texts. What is left out is said. A name like a number stays a name. The rows of the class
    that each fifth row has are trained on too."""
    chance = np.random.default_rng(5)
    with (tmp_path / "2024 things.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["1e5", "id", "same", "size", "on"])
        for row in range(200):
            size = ["NA", "null", "?", "nan", ""][row // 5] if row < 25 and not row % 5 else f"{3 * (row % 5):.1f}"
            writer.writerow([f"{chance.normal():.3f}", f"no {row}", 7, size, "abcde"[row % 5]])
    said = check(run("distrib", "init", "--from", "csv", "2024 things.csv"))
    assert "on is predicted as a class from 2 column(s); without id, same: one value, or too many" in said
    check(run("distrib", "train", "run_2024_things.yaml", timeout=300))
    assert metrics_of(tmp_path / "runs" / "run_2024_things")["eval/accuracy"] > 0.9
    check(run("distrib", "init", "--from", "csv", "2024 things.csv", "--column", "1e5", "--name", "number"))
    assert 'column: "1e5"' in (tmp_path / "number.yaml").read_text().replace('"column"', "column")
    check(run("distrib", "train", "number.yaml", "train.epochs=1"))


def test_the_configs_batches_suit_four_processes(run: Run, tmp_path: Path) -> None:
    write_table(tmp_path / "table.csv", rows=20)
    check(run("distrib", "init", "--from", "csv", "table.csv"))
    config: dict[str, Any] = yaml.safe_load((tmp_path / "table.yaml").read_text())
    check(run("distrib", "explain", "table.yaml", "--processes", 4))
    assert config["data"]["global_batch_size"] == 4 * config["data"]["micro_batch_size"]
