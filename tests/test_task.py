import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from tasks import Masked
from torch import nn

from distrib import Config, Trainer
from distrib.config import TaskConfig
from distrib.errors import ConfigError
from distrib.targets import build, find
from distrib.task import Task, load_task, method_of, own_method


def load(**task: Any) -> Task:
    return load_task(TaskConfig(**task))


def test_a_file_in_the_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_own_file.py").write_text(
        "import distrib\nclass MyTask(distrib.Task):\n    def __init__(self, width=1): self.width = width\n"
    )
    monkeypatch.chdir(tmp_path)
    assert load(target="my_own_file:MyTask", width=3).width == 3  # type: ignore[attr-defined]


def test_a_frozen_dataclass() -> None:
    @dataclass(frozen=True)
    class Parity(Task):
        width: int = 1

    assert Parity(width=3).width == 3
    assert Parity(width=3)._given == ((), {"width": 3})


OPTIONAL = (
    *("prepare", "sample_weights", "collate", "predict", "metrics", "samples", "optimizer", "learning_rate", "decays"),
    *("export", "blocks"),
)


@pytest.mark.parametrize("name", OPTIONAL)
def test_a_field_is_no_method(name: str) -> None:
    of_class = type("OfClass", (Task,), {"__annotations__": {name: float}, name: 0.5})
    of_itself = Task()
    setattr(of_itself, name, 0.5)
    for task in (Task(), dataclass(of_class)(), dataclass(of_class)(2), of_itself):
        assert own_method(task, name) is None
        assert method_of(task, name) == getattr(Task, name).__get__(task)


@pytest.mark.parametrize("name", OPTIONAL)
@pytest.mark.parametrize("kind", [lambda found: found, staticmethod, classmethod])
def test_a_method_is_one(name: str, kind: Any) -> None:
    """Also if its class inherits it, or a field hides it."""
    own = type("Own", (Task,), {name: kind(lambda *given: given[-1])})
    hidden = type("Derived", (own,), {})()
    setattr(hidden, name, 0.5)
    for task in (own(), hidden):
        assert method_of(task, name)(7) == 7
    held = Task()
    setattr(held, name, lambda given: given)
    assert method_of(held, name)(7) == 7


class WithFields(Masked):
    def __init__(self) -> None:
        super().__init__()
        for name in OPTIONAL:
            setattr(self, name, self.samples)


def test_a_run_of_a_task_with_such_fields(tmp_path: Path) -> None:
    config = Config.from_dict({"data": {"global_batch_size": 4, "micro_batch_size": 4}, "train": {"steps": 2}})
    found = [
        Trainer(task, config, tmp_path / type(task).__name__).fit()["metrics"]["train/loss"]
        for task in (Masked(), WithFields())
    ]
    assert found[0] == found[1]


@pytest.mark.parametrize(
    ("task", "parts"),
    [
        ({"target": "digits"}, ["task.target: 'digits'", "module:Class"]),
        ({"target": "no_such_module:X"}, ["no module 'no_such_module'"]),
        ({"target": "distrib.tasks.digit:Digits"}, ["no module 'distrib.tasks.digit'"]),
        ({"target": "distrib.tasks.digits:Digit"}, ["has no 'Digit'", "distrib.tasks.digits:Digits?"]),
        ({"target": "distrib:__version__"}, ["distrib:__version__ is not a Task, it is a str"]),
        ({"target": "torch.nn:Linear"}, ["torch.nn:Linear is not a Task but a class Linear"]),
        ({"target": "distrib.tasks.digits:mlp"}, ["mlp is not a Task, it is a function"]),
        ({"target": "tasks.py:Base"}, ["'tasks.py:Base' is not of the form module:Class; write tasks:Base"]),
        ({"target": "./my_task:Class"}, ["write my_task:Class"]),
        ({"target": "my/own/task.py:Class"}, ["write my.own.task:Class"]),
        ({"target": ".x:Y"}, ["write x:Y"]),
        ({"target": "my_task.Class"}, ["write my_task:Class"]),
        ({"target": "my task:Class"}, ["is not of the form module:Class; for example"]),
        ({"target": "my_task:"}, ["is not of the form module:Class; for example"]),
        ({"target": "distrib.tasks.digits:Digits", "hiden": 1}, ["'hiden'", "network, hidden, dropout"]),
    ],
)
def test_a_task_that_cannot_be_built(task: dict[str, Any], parts: list[str]) -> None:
    with pytest.raises(ConfigError) as error:
        load(**task)
    assert [part for part in parts if part not in str(error.value)] == [], error.value


@pytest.mark.parametrize(
    "target",
    ["builtins:breakpoint", "os:abort", "os:system", "subprocess:run", "shutil:rmtree", "importlib:import_module"],
)
def test_targets_in_pythons_library_are_refused(target: str) -> None:
    with pytest.raises(ConfigError, match=f"{target} is a part of Python itself, not a"):
        find(target, "task", Task)
    with pytest.raises(ConfigError, match=f"{target} is a part of Python itself, not a"):
        find(target, "task.model", nn.Module, factories=True)


def test_functions_that_may_make_a_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "test.py").write_text(  # the name of a package of Python's own
        "import functools\n"
        "from os import abort\n"
        "from shutil import rmtree\n"
        "from torch import nn\n"
        "def small(width): return nn.Linear(width, 1)\n"
        "part = functools.partial(small, 3)\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "test", raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    assert build("test:small", {"width": 3}, "task.model", nn.Module, factories=True).in_features == 3
    assert find("distrib.tasks.digits:mlp", "task.model", nn.Module, factories=True)
    for name, said in {
        "test:abort": "not a Module, nor a function that makes one, it is a builtin_function",
        "test:rmtree": "test:rmtree is not annotated to return a Module; call it in a function of your own",
        "test:part": "it is a partial",
        "torch.hub:load": "torch.hub:load is not annotated to return a Module",
        "torch.utils.cpp_extension:load_inline": "is not annotated to return a Module",
        "torch.utils.data:TensorDataset": "is not a Module but a class TensorDataset",
    }.items():
        with pytest.raises(ConfigError, match=said):
            find(name, "task.model", nn.Module, factories=True)


def test_a_missing_task_is_refused() -> None:
    with pytest.raises(ConfigError, match="task: missing"):
        load_task(None)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (
            "import a_package_that_is_not_there",
            "ModuleNotFoundError: No module named 'a_package_that_is_not_there' at ",
        ),
        ("from distrib import Tusk", "ImportError: cannot import name 'Tusk' from 'distrib'"),
        ("def f(:\n  pass", "SyntaxError: invalid syntax at "),
        ("x = undefined", "NameError: name 'undefined' is not defined at "),
    ],
)
def test_a_file_that_cannot_be_imported_is_named_with_the_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, said: str
) -> None:
    name = f"mistaken_{tmp_path.name}"
    (tmp_path / f"{name}.py").write_text(f"\n{text}\n")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError) as error:
        load(target=f"{name}:X")
    assert str(error.value).startswith(f"task.target: {name} cannot be imported: {said}")
    assert str(error.value).endswith(f" at {tmp_path / name}.py:2")


class Layer(nn.Sequential):
    """A block that contains blocks."""

    def __init__(self) -> None:
        super().__init__(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2))


def test_blocks_are_the_outermost_repeated_children() -> None:
    class Encoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList([Layer() for _ in range(3)])
            self.heads = nn.ModuleDict({"a": nn.Sequential(nn.Linear(2, 1)), "b": nn.Sequential(nn.Linear(2, 1))})

    encoder = Encoder()
    model = nn.Sequential(nn.Embedding(5, 2), encoder, nn.ReLU(), nn.ReLU())
    assert Task().blocks(model) == [*encoder.layers, *encoder.heads.values()]


def test_children_that_do_not_repeat_are_not_blocks() -> None:
    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.left, self.right = nn.Sequential(nn.Linear(2, 2)), nn.Sequential(nn.Linear(2, 2))  # not in a list

    assert Task().blocks(Pair()) == []
    assert Task().blocks(nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2), nn.ReLU())) == []
