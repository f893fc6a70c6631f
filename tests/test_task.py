from pathlib import Path
from typing import Any

import pytest
from torch import nn

from distrib.config import TaskConfig
from distrib.errors import ConfigError
from distrib.task import Task, load_task


def load(**task: Any) -> Task:
    return load_task(TaskConfig(**task))


def test_a_file_in_the_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_own_file.py").write_text(
        "import distrib\nclass MyTask(distrib.Task):\n    def __init__(self, width=1): self.width = width\n"
    )
    monkeypatch.chdir(tmp_path)
    assert load(target="my_own_file:MyTask", width=3).width == 3  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("task", "parts"),
    [
        ({"target": "digits"}, ["task.target: 'digits'", "module:Class"]),
        ({"target": "no_such_module:X"}, ["no module 'no_such_module'"]),
        ({"target": "distrib.tasks.digit:Digits"}, ["no module 'distrib.tasks.digit'"]),
        ({"target": "distrib.tasks.digits:Digit"}, ["has no 'Digit'", "distrib.tasks.digits:Digits?"]),
        ({"target": "distrib:__version__"}, ["cannot be called", "str"]),
        ({"target": "collections:OrderedDict"}, ["is not a distrib.Task but OrderedDict"]),
        ({"target": "distrib.tasks.digits:Digits", "hiden": 1}, ["'hiden'", "network, hidden, dropout"]),
    ],
)
def test_a_task_that_cannot_be_built(task: dict[str, Any], parts: list[str]) -> None:
    with pytest.raises(ConfigError) as error:
        load(**task)
    assert [part for part in parts if part not in str(error.value)] == [], error.value


def test_no_task_at_all() -> None:
    with pytest.raises(ConfigError, match="task: missing"):
        load_task(None)


def test_an_import_that_fails_inside_the_users_file_is_theirs_to_see(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "imports_nothing.py").write_text("import a_package_that_is_not_there")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="a_package_that_is_not_there"):
        load(target="imports_nothing:X")


class Layer(nn.Sequential):
    """A block that has blocks of its own."""

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


def test_children_that_are_not_repeated_are_no_blocks() -> None:
    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.left, self.right = nn.Sequential(nn.Linear(2, 2)), nn.Sequential(nn.Linear(2, 2))  # in no list

    assert Task().blocks(Pair()) == []
    assert Task().blocks(nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2), nn.ReLU())) == []
