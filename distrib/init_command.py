"""`distrib init`: writes a task and a config that train as they stand, on the user's own files."""

import csv
import re
import shutil
from collections.abc import Sequence, Sized
from pathlib import Path
from typing import Any

import yaml

from distrib import config_yaml
from distrib.errors import ConfigError, did_you_mean
from distrib.tracebacks import first_line

_USAGE = {  # what follows --from, and what else it needs
    "csv": "a CSV file, such as table.csv",
    "images": "a folder with a folder of pictures for each class",
    "text": "a text file, or a folder of .txt and .md files",
    "module": "your module and your dataset, as net:Net data:Points, and a dataset to evaluate on, if there is one",
}
_FEWEST = 20  # samples
_LONGEST_NAME = 100  # characters
_MOST_CLASSES = 20  # of whole numbers; a column with more different ones is predicted as a number
_STOP = {"metric": "eval/loss", "patience": 10}
_BEST = {"metric": "eval/loss", "mode": "min"}


def write_start(kind: str | None, given: Sequence[str], column: str | None, name: str | None) -> None:
    """Write NAME_task.py and NAME.yaml into the working directory, and print what to do next.

    `kind`: csv, images, text or module; None for an example without files. `given`: what _USAGE says of the kind.
    `column`: the one of a CSV file to predict, by default the last. Raises ConfigError if a file is there already, or
    the user's files cannot be trained on.
    """
    if kind is not None and kind not in _USAGE:
        raise ConfigError(f"--from: {kind!r}; give csv, images, text or module{did_you_mean(kind, _USAGE)}")
    if kind is None and given:
        raise ConfigError(f"{given[0]}: what is it? Add --from csv, images, text or module")
    if column is not None and kind != "csv":
        raise ConfigError(f"--column: {column!r} is for --from csv")
    if kind is not None and not (len(given) in (2, 3) if kind == "module" else len(given) == 1):
        raise ConfigError(f"--from {kind}: give {_USAGE[kind]}; given: {' '.join(given) or 'nothing'}")
    name = _checked_name(name or _name_of(kind, given))
    module = f"{name}_task"
    if kind == "module":
        config: dict[str, Any] = _for_module(*given)
        source = None
    else:
        config, source = _for_files(kind, module, given[0] if given else "", column)
    written = {Path(f"{name}.yaml"): None, **({Path(f"{module}.py"): source} if source else {})}
    for path in written:
        if path.exists() or path.is_symlink():
            raise ConfigError(f"{path}: is there already; give another name with --name")
    try:
        for path, starter in written.items():
            if starter is not None:
                shutil.copyfile(Path(__file__).parent / "starters" / f"{starter}.py", path)
        Path(f"{name}.yaml").write_text(_as_yaml({"name": name, "seed": 0, **config}), encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{error.filename}: cannot be written: {error.strerror}") from None
    what = f"the task is {module}.py, its arguments and all else are in {name}.yaml" if source else f"see {name}.yaml"
    print(f"{what}; train with:\n\n    distrib launch --processes {_processes()} {name}.yaml\n")


def _processes() -> int:
    """Return two, or one on a machine with one accelerator: a process needs one of its own."""
    import torch

    return min(2, torch.accelerator.device_count() or 2)


def _for_files(kind: str | None, module: str, path: str, column: str | None) -> tuple[dict[str, Any], str]:
    """Return the config, and which of distrib/starters is its task."""
    if kind == "csv":
        return _for_csv(module, path, column)
    if kind == "images":
        return _for_images(module, path)
    return _for_text(module, path) if kind == "text" else _first(module)


def _first(module: str) -> tuple[dict[str, Any], str]:
    task = {"target": f"{module}:First", "points": 2000, "hidden": 64}
    return _config(task, 2000, 500, lr=0.01), "first"


def _for_csv(module: str, path: str, column: str | None) -> tuple[dict[str, Any], str]:
    from distrib.starters.table import Table, known

    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file)
            columns, rows = list(reader.fieldnames or ()), list(reader)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ConfigError(f"{path}: cannot be read as a CSV file: {error}") from None
    if len(columns) < 2:
        raise ConfigError(
            f"{path}: its first line has {len(columns)} column(s); give names of two or more, with commas"
        )
    if twice := [name for place, name in enumerate(columns) if name in columns[:place]]:
        raise ConfigError(f"{path}: its first line has the name {twice[0]!r} twice; give each column its own")
    column = columns[-1] if column is None else column
    if column not in columns:
        raise ConfigError(
            f"--column: {column!r} is not among those of {path}: {', '.join(columns)}{did_you_mean(column, columns)}"
        )
    for number, row in enumerate(rows, start=2):
        if None in row or None in row.values():
            raise ConfigError(f"{path}: row {number} has more or fewer values than the first line has names")
    answers = [answer for row in rows if (answer := known(row[column]))]
    _require_enough(path, len(answers), f"rows with a value of {column}")
    kind = "number" if _are_numbers(answers) else "class"
    classes = len(set(answers))
    if classes < 2:
        raise ConfigError(f"{path}: all rows have the same {column}; there is nothing to learn")
    if kind == "class" and classes > len(answers) / 2:
        raise ConfigError(
            f"{path}: {column} has {classes} different values in {len(answers)} rows, too many to predict as "
            "classes; choose another with --column"
        )
    made = Table(path, column, kind)
    if not made.inputs.numel():
        raise ConfigError(
            f"{path}: no column can be used to predict {column}: {', '.join(made.left_out)} have one value, or too "
            "many different texts"
        )
    without = f"; without {', '.join(made.left_out)}: one value, or too many different texts" if made.left_out else ""
    print(f"{column} is predicted as a {kind} from {len(columns) - 1 - len(made.left_out)} column(s){without}")
    task = {"target": f"{module}:Table", "path": path, "column": column, "kind": kind}
    held_out = len(answers) // 5
    return _config(task, len(answers) - held_out, held_out, lr=0.003), "table"


def _for_images(module: str, path: str) -> tuple[dict[str, Any], str]:
    from PIL import Image

    from distrib.starters.images import pictures_in

    if not Path(path).is_dir():
        raise ConfigError(f"{path}: no such folder; give {_USAGE['images']}")
    found = {folder.name: pictures_in(folder) for folder in sorted(Path(path).iterdir())}
    classes = {name: pictures for name, pictures in found.items() if pictures}
    if len(classes) < 2:
        raise ConfigError(f"{path}: pictures of {len(classes)} class(es); give {_USAGE['images']}, two or more")
    files = [file for pictures in classes.values() for file in pictures]
    for file in files:
        try:
            Image.open(file).close()
        except OSError as error:
            raise ConfigError(f"{file}: cannot be read as a picture: {error}; remove it") from None
    count = len(files)
    _require_enough(path, count, "pictures")
    return _config(
        {"target": f"{module}:Images", "path": path, "size": 64}, count - count // 5, count // 5, 0.001
    ), "images"


def _for_text(module: str, path: str) -> tuple[dict[str, Any], str]:
    from distrib.starters.text import files_in

    try:
        files = files_in(Path(path))
        size = sum(file.stat().st_size for file in files)
    except OSError as error:
        raise ConfigError(f"{error.filename}: cannot be read: {error.strerror}") from None
    if not files:
        raise ConfigError(f"{path}: no .txt or .md file in it; give {_USAGE['text']}")
    length = 128
    pieces = max(0, size - 1) // length
    _require_enough(path, pieces, f"pieces of {length} bytes")
    task = {"target": f"{module}:Texts", "path": path, "context_length": length, "layers": 4, "heads": 4, "width": 128}
    return _config(task, pieces - pieces // 10, pieces // 10, lr=0.003), "text"


def _for_module(model: str, train: str, evaluate: str | None = None) -> dict[str, Any]:
    import torch
    from torch import nn
    from torch.utils.data import Dataset, IterableDataset

    from distrib.targets import call, find

    def made(target: str, kind: type[Any]) -> Any:
        return call(find(target, "--from module", kind, factories=True), {}, "--from module")

    def sized(target: str) -> Any:
        dataset = made(target, Dataset)
        if isinstance(dataset, IterableDataset) or not isinstance(dataset, Sized) or not len(dataset):
            raise ConfigError(f"{target}: is a stream, has no __len__, or no samples; give a dataset with some")
        return dataset

    made(model, nn.Module)
    dataset = sized(train)
    try:
        sample = dataset[0]
        _, answer = sample
        target = torch.as_tensor(answer)
    except Exception as error:
        raise ConfigError(
            f"{train}: give a dataset of samples (input, target), with a target of numbers; the first sample: "
            f"{first_line(error)}"
        ) from error
    loss = "MSELoss" if target.is_floating_point() else "CrossEntropyLoss"
    task: dict[str, Any] = {"target": "distrib.tasks.supervised:Supervised", "model": {"target": model}}
    task |= {"train_dataset": {"target": train}, "loss": loss}
    held_out = 0
    if evaluate is not None:
        held_out = len(sized(evaluate))
        task["eval_dataset"] = {"target": evaluate}
    return _config(task, len(dataset), held_out, lr=0.001)


def _config(task: dict[str, Any], samples: int, held_out: int, lr: float) -> dict[str, Any]:
    """Return a config for so many samples to train and to evaluate on: batches that four processes can share, and an
    evaluation each epoch or each 20 steps, whichever is longer."""
    batch = 4
    while batch < 64 and batch * 16 <= samples:
        batch *= 2
    steps = max(1, samples // batch)
    config: dict[str, Any] = {
        "task": task,
        "data": {"global_batch_size": batch, "micro_batch_size": batch // 4},
        "optim": {"name": "adamw", "lr": lr, "weight_decay": 0.01, "warmup_steps": min(20, steps)},
        "train": {"epochs": 100, "max_grad_norm": 1.0},
    }
    if held_out:
        every = steps if steps >= 20 else 20
        config["train"]["stop"] = _STOP
        config["eval"] = {"every_steps": every}
        config["checkpoint"] = {"every_steps": every, "best": _BEST}
    return config


def _as_yaml(config: dict[str, Any]) -> str:
    """Return the config as YAML, a line for each section. distrib reads numbers in more forms than the library writes,
    so a text that it would read as something else is quoted."""
    lines = ["# From distrib init. Every key: docs/config.md; what they come to: distrib explain."]
    for key, value in config.items():
        for style in (None, '"'):
            written = yaml.safe_dump(
                value, default_flow_style=True, sort_keys=False, allow_unicode=True, width=10**6, default_style=style
            )
            line = f"{key}: {written.removesuffix('...' + chr(10)).strip()}"
            if config_yaml.parse(line, key) == {key: value}:
                break
        lines.append(line)
    return "\n".join(lines) + "\n"


def _are_numbers(values: list[str]) -> bool:
    """Return whether a column is to be predicted as a number: all are, and not just a few whole ones."""
    from distrib.starters.table import as_number

    numbers = [as_number(value) for value in values]
    if any(number is None for number in numbers):
        return False
    return len(set(numbers)) > _MOST_CLASSES or any(number != int(number) for number in numbers if number is not None)


def _require_enough(path: str, found: int, what: str) -> None:
    if found < _FEWEST:
        raise ConfigError(f"{path}: {found} {what}; give {_FEWEST} or more")


def _name_of(kind: str | None, given: Sequence[str]) -> str:
    if kind is None:
        return "first"
    last = given[0].partition(":")[0] if kind == "module" else Path(given[0]).resolve().stem
    name = re.sub(r"\W", "_", last, flags=re.ASCII).strip("_").lower()[:_LONGEST_NAME] or "first"
    return f"run_{name}" if name[0].isdigit() else name


def _checked_name(name: str) -> str:
    if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name) or len(name) > _LONGEST_NAME:
        raise ConfigError(
            f"--name: {name!r}; give up to {_LONGEST_NAME} letters, digits and '_', no digit first: a module is named "
            "after it"
        )
    return name
