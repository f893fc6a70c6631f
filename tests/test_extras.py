"""Without an optional library, each command and task that needs it ends with a line that names the extra; the others
work. Libraries are hidden in separate processes."""

import json
import re
import sys
from pathlib import Path

import pytest
import yaml
from conftest import ROOT, Run, check, environment, refused

import distrib
from distrib.extras import LIBRARIES

HIDING = """
import os, sys
from importlib.machinery import PathFinder

class Hiding(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        hidden = name.partition(".")[0] in os.environ["HIDDEN"].split()
        return None if hidden else super().find_spec(name, path, target)

sys.meta_path[sys.meta_path.index(PathFinder)] = Hiding
"""
OPTIONAL = sorted(library for libraries in LIBRARIES.values() for library in libraries)
DISTRIBUTIONS = {"sklearn": "scikit-learn"}  # module -> distribution, if the names differ
OWN_TASK = {
    "task": {"target": "tasks:Masked"},
    "data": {"global_batch_size": 8, "micro_batch_size": 4},
    "train": {"steps": 3},
}


def hiding(folder: Path, *libraries: str) -> dict[str, str]:
    """Return environment variables that hide these libraries from a process and its child processes."""
    (folder / "hiding").mkdir()
    (folder / "hiding" / "sitecustomize.py").write_text(HIDING)
    return {"PYTHONPATH": f"{folder / 'hiding'}:{environment('')['PYTHONPATH']}", "HIDDEN": " ".join(libraries)}


TASK, STREAM = "task.target: this task", "task.train_dataset: a stream (an IterableDataset)"


@pytest.mark.parametrize(
    ("hidden", "extra", "command", "who"),
    [
        ("sklearn", "examples", "train digits.yaml", TASK),
        ("sklearn", "examples", "launch --processes 2 digits.yaml", TASK),
        ("sklearn", "examples", "explain digits.yaml", TASK),
        ("sklearn", "examples", "train diabetes.yaml", "task.train_dataset: this dataset"),
        ("torchmetrics", "metrics", "train diabetes.yaml", "task.metrics: a metric"),
        ("transformers", "huggingface", "train llama-tiny.yaml", TASK),
        ("datasets", "huggingface", "train llama-tiny.yaml", TASK),
        ("peft", "huggingface", "train llama-tiny.yaml task.adapter.type=lora", "task.adapter: an adapter"),
        ("plotly", "compare", "compare runs/a runs/b", "distrib compare"),
        ("jinja2", "compare", "compare runs/a runs/b", "distrib compare"),
        ("torchdata", "streams", "train stream.yaml", STREAM),
        ("torchdata", "streams", "explain stream.yaml", STREAM),
    ],
)
def test_a_missing_library_is_one_line(
    run: Run, tmp_path: Path, hidden: str, extra: str, command: str, who: str
) -> None:
    for config in ("digits.yaml", "diabetes.yaml", "llama-tiny.yaml"):
        (tmp_path / config).write_text((ROOT / "configs" / config).read_text())
    (tmp_path / "stream.yaml").write_text(yaml.safe_dump({**OWN_TASK, "task": {"target": "tasks:Streamed"}}))
    variables = hiding(tmp_path, hidden)
    before = sorted(path.name for path in tmp_path.iterdir())
    said = refused(run("distrib", *command.split(), **variables))
    assert said == f"error: {who} needs {hidden}, which is not installed; pip install 'distrib[{extra}]'"
    assert sorted(path.name for path in tmp_path.iterdir()) == before, "work had started"


def test_a_users_task_that_reads_rows_needs_the_extra(run: Run, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"text": "a"}\n')
    (tmp_path / "reads.py").write_text(
        "import distrib\n"
        "from distrib.data.packing import pack\n"
        "from distrib.data.rows import find_files\n"
        "try:\n"
        "    pack(find_files('rows.jsonl', 'task.files'), None, {'text': (str,)}, len, '<u2', {})\n"
        "except distrib.DistribError as error:\n"
        "    print(error)\n"
    )
    said = check(run(sys.executable, "reads.py", **hiding(tmp_path, "datasets")))
    assert (
        said == "task.files: reading rows needs datasets, which is not installed; pip install 'distrib[huggingface]'\n"
    )


def test_only_metrics_need_torchmetrics(run: Run, tmp_path: Path) -> None:
    config = yaml.safe_load((ROOT / "configs" / "diabetes.yaml").read_text())
    del config["task"]["metrics"]
    (tmp_path / "diabetes.yaml").write_text(yaml.safe_dump(config))
    check(run("distrib", "train", "diabetes.yaml", "train.steps=2", **hiding(tmp_path, "torchmetrics")))
    assert (tmp_path / "runs/diabetes/summary.json").exists()


def test_the_base_install_runs_all_commands_but_compare(run: Run, tmp_path: Path) -> None:
    (tmp_path / "own.json").write_text(json.dumps(OWN_TASK))
    hidden = hiding(tmp_path, *OPTIONAL)
    check(run("distrib", "explain", "own.json", **hidden))
    check(run("distrib", "launch", "--processes", 2, "own.json", "strategy.name=zero1", **hidden))
    for command in ("evaluate", "verify", "watch"):
        check(run("distrib", command, "runs/own", **hidden))
    check(run("distrib", "export", "runs/own", "--out", "exported", **hidden))
    assert (tmp_path / "runs/own/curves.png").exists()
    assert (tmp_path / "exported/model.safetensors").exists()


def test_every_module_imports_without_extras(run: Run, tmp_path: Path) -> None:
    program = (
        "import importlib, pkgutil, sys, distrib\n"
        "for module in pkgutil.walk_packages(distrib.__path__, 'distrib.'):\n"
        "    if module.name != 'distrib.__main__':\n"
        "        importlib.import_module(module.name)\n"
    )
    check(run(sys.executable, "-c", program, **hiding(tmp_path, *OPTIONAL)))


def test_the_extras_install_what_they_name() -> None:
    tomllib = pytest.importorskip("tomllib")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = {
        name: {re.split("[>=<]", requirement)[0] for requirement in requirements}
        for name, requirements in project["optional-dependencies"].items()
    }
    for name, libraries in LIBRARIES.items():
        wanted = {DISTRIBUTIONS.get(library, library) for library in libraries}
        assert extras[name] == wanted - {"tokenizers"}, name  # transformers depends on it
    assert extras["all"] == {f"distrib[{','.join(name for name in extras if name in LIBRARIES)}]"}
    assert "distrib[all]" in extras["dev"]
    pinned = {line.partition("==")[0].lower() for line in (ROOT / "constraints.txt").read_text().splitlines()}
    assert {name for extra in LIBRARIES for name in extras[extra]} <= pinned


@pytest.mark.parametrize(
    "command",
    [
        ["-c", "import distrib"],
        ["-c", "import distrib; dir(distrib); distrib.__version__"],
        ["-m", "distrib", "--help"],
        ["-m", "distrib", "train", "--help"],
        ["-m", "distrib", "--version"],
    ],
    ids=lambda command: " ".join(command),
)
def test_nothing_heavy_is_imported_before_it_is_needed(run: Run, command: list[str]) -> None:
    result = run(sys.executable, "-X", "importtime", *command)
    check(result)
    modules = {line.rpartition("|")[2].strip().partition(".")[0] for line in result.stderr.splitlines()}
    assert "distrib" in modules
    assert modules & {"torch", "accelerate", "deepspeed", "numpy", "wandb", "matplotlib"} == set()


def test_dir_shows_the_public_names() -> None:
    assert set(distrib.__all__) <= set(dir(distrib))
    for name in distrib.__all__:
        assert getattr(distrib, name).__name__ == name
