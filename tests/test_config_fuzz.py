"""Any content of a config is either read, and dumped to an equal config, or refused in one line."""

import math
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeVar

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from distrib import Config, RunPlan
from distrib.config_yaml import MAX_DEPTH, MAX_VALUES
from distrib.errors import ConfigError
from distrib.schedule import PIECES, option_names
from distrib.schedule_options import Place

T = TypeVar("T")

WORDS = [
    *("train", "steps", "epochs", "data", "global_batch_size", "micro_batch_size", "optim", "lr", "task", "target"),
    *("strategy", "deepspeed", "tags", "tracking", "name", "seed", "x", "1", "1e3", "true", "null", "no", ".inf"),
    *("2026-01-01", "2026-99-99", "0b", "0b_", "0x10", "017", "1:30", "1_000", "-", "<<", "=", "~", "1e999", ".nan"),
    *("9" * 5000, "!!int", "!!timestamp", "!!map", "!!set", "!!binary", "!!python/object/apply:os.system", "!"),
    *("&a", "*a", "%YAML", "{", "}", "[", "]", ": ", ", ", "\n", "\n  ", "- ", "? ", "# ", "'", '"', "|", ">", "---"),
    *("\t", '"\\0"', '"\\ud800"'),
]
TEXTS = st.lists(st.sampled_from(WORDS), max_size=25).map("".join)
LEAVES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(max_size=5),
    st.sampled_from(WORDS),
    st.binary(max_size=2),
)
KEYS = st.sampled_from(WORDS) | st.integers() | st.text(max_size=3)
TREES = st.recursive(
    LEAVES,
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(WORDS) | st.integers(), inner, max_size=3)
    ),
    max_leaves=8,
)
NUMBERS = st.one_of(st.integers(1, 100), st.integers(1, 2**53), st.integers(1, 10**400))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fuzz")


def same_or_one_line(folder: Path, make: Callable[[], Config]) -> None:
    """Check that the config equals what is read back from its dump, or that one line refuses it."""
    config = made(make)
    if isinstance(config, Config):
        (folder / "dumped.yaml").write_text(config.dump(), encoding="utf-8")
        assert Config.load(folder / "dumped.yaml") == config
    else:
        assert config.isprintable()
        assert len(config) < 6000


def made(make: Callable[[], T]) -> T | str:
    """Return what `make` returns, or the line that refuses it."""
    try:
        return make()
    except ConfigError as error:
        return str(error)


@given(TEXTS | st.text(max_size=40), st.lists(TEXTS | st.text(max_size=20), max_size=2))
def test_any_text_and_any_overrides(folder: Path, text: str, overrides: list[str]) -> None:
    (folder / "my.yaml").write_text(text, encoding="utf-8", errors="surrogatepass")
    same_or_one_line(folder, lambda: Config.load(folder / "my.yaml", overrides))


@given(st.binary(max_size=40))
def test_any_bytes(folder: Path, content: bytes) -> None:
    (folder / "my.yaml").write_bytes(content)
    same_or_one_line(folder, lambda: Config.load(folder / "my.yaml", ["train.steps=1"]))


@given(st.dictionaries(st.sampled_from(WORDS), TREES, max_size=4))
def test_any_tree(folder: Path, tree: dict[str, Any]) -> None:
    same_or_one_line(folder, lambda: Config.from_dict(tree))


@given(TREES)
def test_any_argument_of_a_task(folder: Path, tree: Any) -> None:
    values = {"train": {"steps": 1}, "task": {"target": "a:B", "argument": tree}, "optim": {"options": {"x": tree}}}
    same_or_one_line(folder, lambda: Config.from_dict(values))


OPTIONS = st.dictionaries(
    st.sampled_from([*option_names(PIECES), *Place.model_fields, "x"]),
    st.integers(-1, 12) | st.floats(0, 1) | st.lists(st.integers(0, 12), max_size=3) | LEAVES,
    max_size=3,
)
SCHEDULE = st.sampled_from(list(PIECES)) | st.builds(
    lambda name, options: {"name": name, **options}, st.sampled_from([*PIECES, "x", 1]), OPTIONS
)


@given(TREES | SCHEDULE | st.lists(SCHEDULE, max_size=3), st.integers(0, 12))
def test_any_schedule(folder: Path, schedule: Any, warmup: int) -> None:
    values = {"train": {"epochs": 1}, "optim": {"schedule": schedule, "warmup_steps": warmup}}
    same_or_one_line(folder, lambda: Config.from_dict(values))
    config = made(lambda: Config.from_dict(values))
    curve = config if isinstance(config, str) else made(lambda: config.optim.curve(10))
    if isinstance(curve, str):
        assert curve.isprintable()
        assert curve.startswith(("config: ", "optim."))
    else:
        assert all(0 <= curve.factor(update) <= 1 for update in range(10))


@given(NUMBERS, NUMBERS, NUMBERS, st.integers(1, 10**6), st.integers(1, 2**53), st.sampled_from(["steps", "epochs"]))
@example(2**53 - 111, 2**26, 1, 1, 2**53, "steps")  # a prime, so no micro-batch size divides it
@example(2**53, 1, 2**53, 1, 2**53, "epochs")
def test_a_plan_of_any_numbers(batch: int, micro: int, length: int, world: int, samples: int, by: str) -> None:
    values = {"data": {"global_batch_size": batch, "micro_batch_size": micro}, "train": {by: length}}
    config = made(lambda: Config.from_dict(values))
    plan = config if isinstance(config, str) else made(lambda: RunPlan.create(config, world, samples))
    if isinstance(plan, str):
        assert plan.isprintable()
    else:
        assert isinstance(config, Config)
        assert plan.num_steps * batch < 2**63
        assert all(0 <= rate <= 0.001 for rate in plan.learning_rate_samples(config).values())


LAUGHS = "".join(f"{there}: &{there} [{', '.join([f'*{here}'] * 9)}]\n" for here, there in pairwise("abcdefgh"))

STEPS = "train: {steps: 1}\n"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("x: !!int abc", "line 2: not valid YAML: tag:yaml.org,2002:int: values are written without tags"),
        ("x: !!timestamp 5", "without tags"),
        ("x: !!map [1]", "without tags"),
        ("x: !a b", "without tags"),
        ("task: &a {target: a:B, x: *a}", "*a is inside the value that it refers to"),
        ("x: &a [&b [*a]]", "*a is inside the value that it refers to"),
        ("x: " + "[" * 1000 + "]" * 1000, f"more than {MAX_DEPTH} nested sections or lists"),
        ("seed: " + "9" * 5000, "does not fit into 64 bits"),
        ("seed: 18446744073709551616", "'18446744073709551616' does not fit into 64 bits"),
        ("? [a]\n: b", "line 2: not valid YAML: this key is not a string"),
        ("x: {[a]: b}", "this key is not a string"),
        ("1: b", "the key '1' is not a string; put it in quotes"),
        ("task: {target: a:B, weights: {true: 1}}", "the key 'true' is not a string"),
        ("seed: 0b", "seed: '0b': input should be a valid integer"),
        ("seed: 2026-99-99", "seed: '2026-99-99'"),
        ("seed: \x07", "not valid YAML: unacceptable character"),
        (f"a: &a [x]\n{LAUGHS}", f"more than {MAX_VALUES} values"),
        ("task: {target: a:B, x: .nan}", "task.x: nan"),
        ('task: {target: a:B, x: "\\ud800"}', "task.x: '\\ud800' is not valid Unicode text"),
        ('"a\\nb": 1', "a\\nb: unknown key"),
        ("data: {global_batch_size: 99999999999999999999999999}", "does not fit into 64 bits"),
        ("data: {global_batch_size: 9999999999999999999}", "data.global_batch_size: 9999999999999999999"),
        ("optim: {lr: 1e999}", "optim.lr: inf"),
        ("strategy: {timeout: 999999999999}", "strategy.timeout"),
        ("name: " + "n" * 1000, "name: "),
    ],
    ids=range(25),
)
def test_errors_that_the_fuzzer_found(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "my.yaml").write_text(f"{STEPS}{text}")
    with pytest.raises(ConfigError) as error:
        Config.load(tmp_path / "my.yaml")
    assert said in str(error.value)
    assert str(error.value).isprintable()


def test_values_that_yaml_cannot_hold_are_refused() -> None:
    values: dict[str, Any] = {"train": {"steps": 1}, "task": {"target": "a:B"}}
    loop: list[Any] = []
    loop.append(loop)
    for argument, said in [
        (10**5000, "does not fit into 64 bits"),
        (loop, "nested sections"),
        (len, "a builtin_function_or_method; a config holds"),
        ({1: 2}, "the key 1 is not a string"),
        ("x" * 10**6, "characters"),
        ([0] * 10**5, "more than 10000 values"),
    ]:
        with pytest.raises(ConfigError, match=said):
            Config.from_dict({**values, "task": {"target": "a:B", "x": argument}})
    given = Config.from_dict({**values, "task": {"target": "a:B", "x": (1, Path("a/b"))}})
    assert given.task is not None
    assert given.task.arguments == {"x": [1, "a/b"]}


def test_words_that_stay_strings(tmp_path: Path) -> None:
    (tmp_path / "my.yaml").write_text(
        f"{STEPS}task: {{target: a:B, date: 2026-01-01, octal: 017, hex: 0x10, time: 1:30, big: 1_000, e: 1e3, "
        "s: '1e3', on: &a [1], off: *a, far: -.inf}"
    )
    config = Config.load(tmp_path / "my.yaml")
    assert config.task is not None
    assert config.task.arguments == {
        "date": "2026-01-01",
        "octal": "017",
        "hex": "0x10",
        "time": "1:30",
        "big": 1000,
        "e": 1000.0,
        "s": "1e3",
        "on": [1],
        "off": [1],
        "far": -math.inf,
    }
    (tmp_path / "again.yaml").write_text(config.dump())
    assert Config.load(tmp_path / "again.yaml") == config
