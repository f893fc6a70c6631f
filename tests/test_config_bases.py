"""Configs that name bases: which file wins, what is refused, where a value came from, and what a run keeps of it."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import Run, check, refused
from hypothesis import given
from hypothesis import strategies as st

from distrib import Config
from distrib.config_bases import Layer, Sources, merged, read
from distrib.errors import ConfigError

Write = Callable[..., Path]
Flat = dict[tuple[str, ...], Any]


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Write:
    """Write a YAML file into the working directory."""
    monkeypatch.chdir(tmp_path)

    def write(name: str, text: str) -> Path:
        path = Path(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        return path

    return write


def message(path: Path, *overrides: str) -> str:
    with pytest.raises(ConfigError) as error:
        Config.load(path, overrides)
    assert "\n" not in str(error.value)
    return str(error.value)


KEYS = st.sampled_from("abc")
LEAVES = st.one_of(st.none(), st.integers(0, 9), st.lists(st.integers(0, 9), max_size=2))
TREES = st.dictionaries(KEYS, st.recursive(LEAVES, lambda inner: st.dictionaries(KEYS, inner, max_size=3)), max_size=3)


def flat(tree: dict[str, Any], above: tuple[str, ...] = ()) -> Flat:
    """The leaves by their paths; an empty mapping is a leaf."""
    leaves: Flat = {}
    for key, value in tree.items():
        leaves |= flat(value, (*above, key)) if isinstance(value, dict) and value else {(*above, key): value}
    return leaves


def put(leaves: Flat, path: tuple[str, ...], value: Any) -> Flat:
    """The reference: a value replaces what is at its path, below it, and any value above it."""
    below = [one for one in leaves if one[: len(path)] == path and one != path]
    if value == {} and below:
        return leaves
    return {one: old for one, old in leaves.items() if one not in below and path[: len(one)] != one} | {path: value}


@given(st.lists(TREES, min_size=1, max_size=5))
def test_later_files_win_key_by_key(trees: list[dict[str, Any]]) -> None:
    result: dict[str, Any] = {}
    expected: Flat = {}
    before = yaml.safe_dump(trees)
    for tree in trees:
        result = merged(result, tree)
        for path, value in flat(tree).items():
            expected = put(expected, path, value)
    assert flat(result) == expected
    assert yaml.safe_dump(trees) == before


@given(TREES, TREES)
def test_merging_with_nothing_or_itself_changes_nothing(one: dict[str, Any], other: dict[str, Any]) -> None:
    assert merged(one, {}) == merged({}, one) == merged(one, one) == one
    assert merged(merged(one, other), other) == merged(one, other)


@given(st.lists(TREES, min_size=1, max_size=4))
def test_each_value_has_the_last_file_that_gives_it(trees: list[dict[str, Any]]) -> None:
    sources = Sources([Layer(Path(str(index)), tree) for index, tree in enumerate(trees)])
    rows = sources.rows(sources.merge(Config))
    for key, value, source in rows:
        path = tuple(key.split("."))
        assert flat(trees[int(source)]).get(path, {}) == value
        assert all(path not in flat(tree) for tree in trees[int(source) + 1 :])


@given(st.data())
def test_a_file_comes_once_and_after_its_bases(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    folder = tmp_path_factory.mktemp("graph")
    bases = {n: data.draw(st.lists(st.integers(0, n - 1), max_size=3)) if n else [] for n in range(6)}
    for number, names in bases.items():
        text = yaml.safe_dump({"base": [f"{name}.yaml" for name in names], "seed": number})
        (folder / f"{number}.yaml").write_text(text)
    order = [int(layer.path.stem) for layer in read(folder / "5.yaml").layers]
    assert len(order) == len(set(order))
    assert order[-1] == 5
    assert all(order.index(base) < order.index(number) for number in order for base in bases[number])


def test_bases_of_bases_and_lists_of_them(write: Write) -> None:
    write("shared/lowest.yaml", "train: {epochs: 3}\nseed: 1\noptim: {lr: 0.1, weight_decay: 0.5, betas: [0.5, 0.5]}")
    write("shared/low.yaml", "base: lowest.yaml\noptim: {lr: 0.2}")
    write("other.yaml", "seed: 2\ndata: {num_workers: 3}\noptim: {betas: [0.1, 0.2]}")
    path = write("mine.yaml", "base: [shared/low.yaml, other.yaml]\ndata: {micro_batch_size: 4}")
    config = Config.load(path, ["optim.weight_decay=0.25"])
    assert (config.name, config.seed, config.train.epochs) == ("mine", 2, 3)
    assert (config.optim.lr, config.optim.weight_decay, config.optim.betas) == (0.2, 0.25, (0.1, 0.2))
    assert (config.data.num_workers, config.data.micro_batch_size) == (3, 4)
    assert "base" not in yaml.safe_load(config.dump())


def test_a_base_is_relative_to_the_file_that_names_it(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    write("configs/common/small.yaml", "train: {steps: 7}")
    path = write("configs/runs/mine.yaml", "base: ../common/small.yaml").absolute()
    for directory in ("configs", "/"):
        monkeypatch.chdir(directory)
        assert Config.load(path).train.steps == 7
        assert Config.load(os.path.relpath(path)).train.steps == 7


@pytest.mark.parametrize(("base", "child"), [("epochs: 5", "steps: 3"), ("steps: 5", "epochs: 3")])
def test_a_length_replaces_the_other_of_a_base(write: Write, base: str, child: str) -> None:
    write("base.yaml", f"train: {{{base}, max_skipped: 9}}")
    train = Config.load(write("my.yaml", f"base: base.yaml\ntrain: {{{child}}}")).train
    assert getattr(train, child.split(":")[0]) == 3
    assert train.max_skipped == 9
    assert getattr(train, base.split(":")[0]) is None
    Config.load("my.yaml", [f"train.{base.replace(': ', '=')}"])


def test_a_run_folder_can_be_a_base(write: Write) -> None:
    first = Config.load(write("first.yaml", "train: {epochs: 2}\nstrategy: {name: ddp, static_graph: true}"))
    write("kept/config.yaml", first.dump())
    second = Config.load(write("second.yaml", "base: kept/config.yaml\nname: second\ntrain: {steps: 9}"))
    assert second == first.model_copy(update={"name": "second", "train": second.train})
    assert (second.train.steps, second.train.epochs) == (9, None)


@pytest.mark.parametrize(
    ("files", "overrides", "line"),
    [
        (
            {"a": "base: b.yaml", "b": "base: c.yaml", "c": "base: b.yaml"},
            [],
            "c.yaml: base: files that are bases of each other: b.yaml -> c.yaml -> b.yaml",
        ),
        ({"a": "base: [./a.yaml]"}, [], "a.yaml: base: files that are bases of each other: a.yaml -> a.yaml"),
        (
            {"a": "base: b.yaml", "b": "base: no/c.yaml"},
            [],
            "no/c.yaml: cannot read the config: No such file or directory; b.yaml names it as a base",
        ),
        ({"a": 'base: "b\\0"'}, [], "b\\x00: cannot read the config: not a UTF-8 text file; a.yaml names it as a base"),
        (
            {"a": "base: b.yaml", "b": "seed: 1\nseed: 2"},
            [],
            "b.yaml: line 2: not valid YAML: key 'seed' appears",
        ),
        ({"a": "base: b.yaml", "b": "- 1"}, [], "b.yaml: a config is a mapping of sections, this is a list"),
        ({"a": "base: 3"}, [], "a.yaml: base: 3 is not the path of a config; give base: other.yaml, or a list"),
        ({"a": "base: ['']"}, [], "a.yaml: base: '' is not the path of a config; give base: other.yaml, or a list"),
        ({"a": "base:"}, [], "a.yaml: base: None is not the path of a config; give base: other.yaml, or a list"),
        (
            {"a": "base: b.yaml", "b": "optim: {lr: fast}"},
            [],
            "b.yaml, a base of a.yaml: optim.lr: 'fast': input should be a valid number",
        ),
        ({"a": "base: b.yaml\noptim: {lr: fast}", "b": "optim: {lr: 1}"}, [], "a.yaml: optim.lr: 'fast': input"),
        ({"a": "base: b.yaml", "b": "optim: {lr: 1}"}, ["optim.lr=fast"], "a.yaml: optim.lr: 'fast': input"),
        ({"a": "base: b.yaml", "b": "optim: {betas: [0.9]}"}, [], "b.yaml, a base of a.yaml: optim.betas.1: missing"),
        ({"a": "base: b.yaml", "b": "data: {num_wokers: 2}"}, [], "b.yaml, a base of a.yaml: data.num_wokers: unknown"),
        ({"a": "base: b.yaml", "b": "seed: .nan"}, [], "b.yaml, a base of a.yaml: seed: nan is not allowed"),
        ({"a": "base: b.yaml", "b": "strategy: {name: dpp}"}, [], "b.yaml, a base of a.yaml: strategy.name: 'dpp'"),
        ({"a": "base: b.yaml", "b": "strategy: {x: 1}"}, [], "b.yaml, a base of a.yaml: strategy.x: unknown key"),
        ({"a": "base: b.yaml", "b": "train: {steps: 1, epochs: 1}"}, [], "b.yaml, a base of a.yaml: train: give the"),
        ({"a": ""}, ["base=b.yaml"], "'base=b.yaml': a base is named in a config file, not on the command line"),
    ],
)
def test_errors_are_one_line_and_name_the_file(
    write: Write, files: dict[str, str], overrides: list[str], line: str
) -> None:
    for name, text in files.items():
        given_length = "" if "train" in text or name != "a" or text == "" else "\ntrain: {steps: 1}"
        write(f"{name}.yaml", text if "train" in "".join(files.values()) else text + given_length)
    assert message(Path("a.yaml"), *overrides).startswith(line)


def test_too_many_files_are_refused(write: Write) -> None:
    for number in range(150):
        write(f"{number}.yaml", f"base: {number + 1}.yaml")
    assert message(Path("0.yaml")).startswith("99.yaml: base: the config is merged from more than 100 files")


def test_an_override_of_a_value_with_an_alias_changes_that_one_alone(write: Write) -> None:
    text = "train: {steps: 1}\ntask: {target: 'a:B', one: &same {x: 1}, other: *same}"
    task = Config.load(write("my.yaml", text), ["task.one.x=2"]).task
    assert task is not None
    assert task.arguments == {"one": {"x": 2}, "other": {"x": 1}}


BASE = """
task: {target: "tasks:Masked"}
data: {global_batch_size: 8, micro_batch_size: 4}
optim: {lr: 0.02}
train: {epochs: 3}
"""


def test_a_run_does_not_depend_on_its_bases(run: Run, tmp_path: Path) -> None:
    (tmp_path / "configs").mkdir()
    (tmp_path / "base.yaml").write_text(BASE)
    (tmp_path / "configs" / "mine.yaml").write_text("base: ../base.yaml\ntrain: {steps: 3}")
    check(run("distrib", "train", "configs/mine.yaml", "optim.lr=0.01"))
    folder = tmp_path / "runs" / "mine"
    kept = yaml.safe_load((folder / "config.yaml").read_text())
    assert "base" not in kept
    assert (kept["train"]["steps"], kept["train"]["epochs"], kept["optim"]["lr"]) == (3, None, 0.01)
    (tmp_path / "base.yaml").unlink()
    check(run("distrib", "verify", "runs/mine"))
    check(run("distrib", "train", "runs/mine/config.yaml"))
    line = refused(run("distrib", "train", "configs/mine.yaml"))
    assert "base.yaml: cannot read the config: No such file or directory; configs/mine.yaml names it as a base" in line


def test_submit_and_launch_read_bases(run: Run, tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text(BASE)
    (tmp_path / "mine.yaml").write_text("base: base.yaml\ntrain: {steps: 2}")
    check(run("distrib", "launch", "--processes", 2, "mine.yaml", timeout=300))
    assert len((tmp_path / "runs" / "mine" / "steps.jsonl").read_text().splitlines()) == 2
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "sbatch").write_text("#!/bin/sh\necho 17\n")
    (tmp_path / "bin" / "sbatch").chmod(0o755)
    check(run("distrib", "submit", "mine.yaml", "--run-dir", "queued", PATH=f"{tmp_path / 'bin'}:{os.environ['PATH']}"))
    kept = yaml.safe_load((tmp_path / "queued" / "config.yaml").read_text())
    assert (kept.get("base"), kept["train"]["steps"], kept["optim"]["lr"]) == (None, 2, 0.02)


def test_explain_prints_where_a_value_came_from(run: Run, tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text(BASE)
    (tmp_path / "mine.yaml").write_text("base: base.yaml\ntrain: {steps: 2}\noptim: {betas: [0.5, 0.5]}")
    output = check(run("distrib", "explain", "mine.yaml", "data.micro_batch_size=2"))
    rows = {line.split()[0]: line.split(maxsplit=1)[1].strip() for line in output.splitlines() if "." in line[:40]}
    assert rows["task.target"].split() == ['"tasks:Masked"', "base.yaml"]
    assert rows["optim.lr"].split() == ["0.02", "base.yaml"]
    assert rows["optim.betas"].split(maxsplit=2)[2].strip() == "mine.yaml"
    assert rows["train.steps"].split() == ["2", "mine.yaml"]
    assert rows["data.micro_batch_size"].split() == ["2", "command", "line"]
    assert "train.epochs" not in rows
    (tmp_path / "alone.yaml").write_text(BASE)
    assert "set by files" not in check(run("distrib", "explain", "alone.yaml"))
