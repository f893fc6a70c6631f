"""The files of `Task.samples` in a run folder: samples/step-NNNNNNNN/NAME.png, or step-NNNNNNNN/SET/NAME.png.

Those of the average of the weights are in step-NNNNNNNN/ema.
"""

import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from distrib.run_folder.files import writing

_OF_A_STEP = re.compile(r"step-([0-9]{8,})")
_PATH = re.compile(r"samples/step-[0-9]{8,}(/[A-Za-z0-9_-][A-Za-z0-9._-]*){1,3}")  # no other folder is read


def write_samples(folder: Path, steps_done: int, within: str, files: dict[str, bytes]) -> list[str]:
    """Write files under `folder`, and return their paths in the run folder. Raises WriteError.

    `within`: the evaluation set's folder in that of the step.

    What a killed start has left there is replaced. The line of evals.jsonl comes after them, so what it names is there.
    """
    target = folder / f"step-{steps_done:08d}" / within
    with writing(target):
        target.mkdir(parents=True, exist_ok=True)
        for file, content in files.items():
            partial = target / f".{file}.partial"
            partial.write_bytes(content)
            partial.replace(target / file)
    return [(target / file).relative_to(folder.parent).as_posix() for file in files]


def rewind_samples(folder: Path, steps: int) -> None:
    """Remove what was written after evaluations after step `steps`. Raises WriteError."""
    with writing(folder):
        for path in _steps_in(folder):
            if int(path.name.removeprefix("step-")) > steps:
                shutil.rmtree(path)


def names_of(folder: Path, evaluation: dict[str, Any]) -> dict[str, Path]:
    """Return the files of an evaluation that are there, by name: NAME, SET/NAME or ema/NAME. `folder`: of all
    samples."""
    found = {}
    for path in evaluation.get("samples", ()):
        if _PATH.fullmatch(path) and (file := folder.parent / path).is_file():
            _, _, *parts = path.split("/")
            found["/".join(parts)] = file
    return found


def stem(name: str) -> str:
    """Return the name that the task gave: without the suffix of its file."""
    return name.rpartition(".")[0]


def _steps_in(folder: Path) -> Iterator[Path]:
    if os.path.isdir(folder):
        yield from (path for path in sorted(folder.iterdir()) if _OF_A_STEP.fullmatch(path.name) and path.is_dir())
