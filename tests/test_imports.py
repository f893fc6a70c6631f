"""Imports only go to lower layers, and heavy libraries are imported only in the listed files."""

import ast
from pathlib import Path

import pytest
from conftest import ROOT

# A module may import from its own layer or a lower one.
LAYERS = [
    {"__version__", "errors", "sha256"},
    {"tracebacks"},
    {"targets", "config_yaml"},
    {"extras", "plugins", "config_section"},
    {"schedule"},
    {
        *("alert_options", "config_bases", "decision_options", "init_options"),
        *("optim_groups", "schedule_options", "strategy_options"),
    },
    {"config"},
    {"task", "plan", "samples"},
    {"processes"},
    {"data"},
    {"run_folder"},
    {"tasks"},
    {"launching"},
    {"monitor"},
    {"strategies"},
    {"training"},
    {"starters"},
    {"init_command", "completion"},
    {"cli", "arguments"},
]
ONLY_IN = {
    "accelerate": {
        "monitor/trackers/trackers.py",
        "processes/world.py",
        "strategies/ddp.py",
        "training/engine.py",
    },
    "deepspeed": {"strategies/deepspeed_library.py"},
    "datasets": {"data/rows.py", "tasks/pretrained.py"},
    "jinja2": {"monitor/compare/page.py", "tasks/chat_template.py"},
    "peft": {"tasks/adapters.py"},
    "plotly": {"monitor/compare/page.py"},
    "sklearn": {"tasks/diabetes.py", "tasks/digits.py"},
    "torchdata": {"data/source.py"},
    "torchmetrics": {"tasks/supervised.py"},
    "transformers": {"tasks/hugging_face.py", "tasks/pretrained.py"},
    "wandb": {"monitor/trackers/samples.py", "monitor/trackers/trackers.py", "monitor/trackers/wandb_files.py"},
}
MODULES = sorted((ROOT / "distrib").rglob("*.py"))


def imported(path: Path) -> set[str]:
    """Return every module that the file imports, anywhere in it."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def layer(part: str) -> int:
    (found,) = [number for number, parts in enumerate(LAYERS) if part in parts]
    return found


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_go_down(path: Path) -> None:
    relative = path.relative_to(ROOT / "distrib")
    part = relative.parts[0].removesuffix(".py")
    for name in imported(path):
        top = name.split(".")[0]
        assert top not in ONLY_IN or relative.as_posix() in ONLY_IN[top], f"{relative} imports {top}"
        if name.startswith("distrib.") and part not in ("__init__", "__main__"):
            assert layer(name.split(".")[1]) <= layer(part), f"{relative} imports {name}"


def test_nothing_overrides_a_private_method() -> None:
    """benchmarks/ and tests/ extend the classes of distrib/ by public methods alone. Classes are matched by name."""
    private: dict[str, set[str]] = {}
    for path in MODULES:
        for name, _, methods in classes_of(path):
            private[name] = {method for method in methods if method.startswith("_") and not method.endswith("__")}
    bases_of: dict[str, set[str]] = {}
    extending = [path for folder in ("benchmarks", "tests") for path in (ROOT / folder).rglob("*.py")]
    for name, bases, _ in (one for path in extending for one in classes_of(path)):
        bases_of.setdefault(name, set()).update(bases - {name})

    def ancestors(name: str) -> set[str]:
        return bases_of.get(name, set()).union(*map(ancestors, bases_of.get(name, set())))

    for path in extending:
        for name, _, methods in classes_of(path):
            for base in ancestors(name):
                assert not methods & private.get(base, set()), f"{path.relative_to(ROOT)}: {name} overrides {base}"


def classes_of(path: Path) -> list[tuple[str, set[str], set[str]]]:
    """Name, bases and methods of each class in a file."""
    return [
        (
            node.name,
            {ast.unparse(base).split("[")[0].split(".")[-1] for base in node.bases},
            {part.name for part in node.body if isinstance(part, ast.FunctionDef)},
        )
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ClassDef)
    ]


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_stay_small(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= 300
