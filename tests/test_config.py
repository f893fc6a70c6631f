from pathlib import Path

import pytest
import yaml
from conftest import ROOT
from hypothesis import given
from hypothesis import strategies as st

from distrib import Config
from distrib.errors import ConfigError


def load(tmp_path: Path, text: str, *overrides: str) -> Config:
    path = tmp_path / "my.yaml"
    path.write_text(text)
    return Config.load(path, overrides)


def message(tmp_path: Path, text: str, *overrides: str) -> str:
    with pytest.raises(ConfigError) as error:
        load(tmp_path, text, *overrides)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_defaults_then_file_then_overrides(tmp_path: Path) -> None:
    config = load(tmp_path, "train: {steps: 5}\noptim: {lr: 0.5}", "optim.lr=1e-3", "data.num_workers=2")
    assert (config.name, config.seed, config.train.steps) == ("my", 0, 5)
    assert (config.optim.lr, config.data.num_workers) == (0.001, 2)


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda path: path.name)
def test_the_configs_of_the_repository_are_valid_and_can_be_dumped(path: Path, tmp_path: Path) -> None:
    config = Config.load(path)
    (tmp_path / "again.yaml").write_text(config.dump())
    assert Config.load(tmp_path / "again.yaml") == config
    assert yaml.safe_load(config.dump()) == config.model_dump(mode="json")  # other software reads the same values


@given(
    lr=st.floats(0, 10),
    precision=st.sampled_from(["no", "bf16", "fp16"]),
    argument=st.one_of(
        st.integers(-(2**63), 2**64 - 1),
        st.booleans(),
        st.text(st.characters(codec="ascii")),
        st.lists(st.integers(0, 9)),
    ),
)
def test_a_dump_reads_back_to_an_equal_config(
    tmp_path_factory: pytest.TempPathFactory, lr: float, precision: str, argument: object
) -> None:
    config = Config.from_dict(
        {
            "train": {"steps": 1, "mixed_precision": precision},
            "optim": {"lr": lr},
            "task": {"target": "a:B", "argument": argument},
        }
    )
    path = tmp_path_factory.getbasetemp() / "dumped.yaml"
    path.write_text(config.dump())
    assert Config.load(path) == config


def test_an_override_of_the_length_replaces_the_files(tmp_path: Path) -> None:
    assert load(tmp_path, "train: {epochs: 5}", "train.steps=3").train.epochs is None
    assert load(tmp_path, "train: {steps: 5}", "train.epochs=3").train.steps is None
    assert "epochs: 2 and steps: 3" in message(tmp_path, "train: {epochs: 5}", "train={epochs: 2, steps: 3}")


def test_scalars_are_read_without_surprises(tmp_path: Path) -> None:
    config = load(tmp_path, "train: {steps: 1, mixed_precision: no}\ntask: {target: a:B, x: off, y: 1e-3, z: true}")
    assert config.train.mixed_precision == "no"
    assert config.task is not None
    assert config.task.arguments == {"x": "off", "y": 0.001, "z": True}


STEPS = "train: {steps: 1}\n"


@pytest.mark.parametrize(
    ("text", "overrides", "parts"),
    [
        (STEPS + "data: {num_wokers: 2}", (), ["data.num_wokers: unknown key", "data.num_workers?"]),
        (STEPS + "sed: 1", (), ["sed: unknown key", "seed?"]),
        (STEPS + "lr: 1", (), ["lr: unknown key", "optim.lr?"]),
        (STEPS + "qqq: 1", (), ["qqq: unknown key", "allowed here", "data"]),
        (STEPS, ("optim.lr=fast",), ["optim.lr: 'fast'", "number"]),
        (STEPS, ("data.num_workers=2.5",), ["data.num_workers: 2.5", "integer"]),
        (STEPS, ("data.micro_batch_size=0",), ["data.micro_batch_size: 0", "greater than 0"]),
        (STEPS, ("seed=true",), ["seed: True", "integer"]),
        (STEPS, ("train.mixed_precision=fp8",), ["train.mixed_precision: 'fp8'", "'no', 'bf16' or 'fp16'"]),
        (STEPS, ("train.ema.decay=1",), ["train.ema.decay: 1", "less than 1"]),
        (STEPS, ("train.ema.decay=-0.1",), ["train.ema.decay: -0.1", "greater than or equal to 0"]),
        (STEPS, ("train.ema.every_steps=0",), ["train.ema.every_steps: 0", "greater than 0"]),
        (STEPS, ("train.ema.start_step=-1",), ["train.ema.start_step: -1", "greater than or equal to 0"]),
        (STEPS, ("train.ema=0.99",), ["train.ema: 0.99 is a value, and train.ema is", "train.ema.decay=0.99"]),
        (STEPS, ("train.ema.deccay=0.99",), ["train.ema.deccay: unknown key", "train.ema.decay?"]),
        (STEPS, ("eval.weights=average",), ["eval.weights: 'average'", "'both', 'model' or 'ema'"]),
        (STEPS, ("strategy.name=dpp",), ["strategy.name: 'dpp'", "'auto', 'single', 'ddp', 'zero0'"]),
        (STEPS, ("optim.betas=[0.9]",), ["optim.betas.1: missing"]),
        (STEPS, ("name=../x",), ["name: '../x'"]),
        (STEPS, ("lr",), ["'lr'", "key=value"]),
        (STEPS, ("seed.x=1",), ["seed: {'x': 1}", "integer"]),
        (STEPS + "seed: 1", ("seed.x=1",), ["seed is a value, not a section"]),
        ("seed: 1", (), ["train: missing; give the length of the run, train.epochs or train.steps"]),
        (
            STEPS,
            ("strategy=ddp",),
            ["strategy: 'ddp' is a value, and strategy is a section", "mean strategy.name=ddp?"],
        ),
        (STEPS + "strategy: ddp", ("strategy.timeout=5",), ["strategy is a value", "did you mean strategy.name=ddp?"]),
        (STEPS, ("task=my_task:Net",), ["did you mean task.target=my_task:Net?"]),
        (STEPS, ("eval=100",), ["did you mean eval.every_steps=100?"]),
        ("", ("train=5",), ["did you mean train.epochs=5 or train.steps=5?"]),
        (STEPS, ("data=5",), ["data: 5 is a value, and data is a section"]),
        ("train: {}", (), ["train:", "epochs or as steps", "given: neither"]),
        ("train: {steps: 1, epochs: 2}", (), ["epochs: 2 and steps: 1"]),
        ("train: {steps: 1", (), ["line", "not valid YAML"]),
        ("seed: 1\nseed: 2\n" + STEPS, (), ["line 2", "'seed' appears twice"]),
        ("- a\n- b", (), ["mapping", "list"]),
        ("", (), ["train: missing"]),
        (STEPS + "task: {hidden: 3}", (), ["task.target: missing"]),
        ("x: !!python/object/apply:os.system [ls]", (), ["not valid YAML"]),
    ],
)
def test_errors_are_one_line(tmp_path: Path, text: str, overrides: tuple[str, ...], parts: list[str]) -> None:
    line = message(tmp_path, text, *overrides)
    assert [part for part in parts if part not in line] == [], line


def test_a_missing_config_file() -> None:
    with pytest.raises(ConfigError, match=r"nowhere.yaml: cannot read the config: No such file"):
        Config.load("nowhere.yaml")


@pytest.mark.parametrize(
    ("file", "name"),
    [
        ("my run (2).yaml", "my-run-2-"),
        ("Übung.yml", "Ubung"),
        ("_.hidden.yaml", "hidden"),
        ("a" * 230 + ".yaml", "a" * 200),
    ],
)
def test_a_run_is_named_after_its_file(tmp_path: Path, file: str, name: str) -> None:
    (tmp_path / file).write_text(STEPS)
    assert Config.load(tmp_path / file).name == name


@pytest.mark.parametrize("file", ["обучение.yaml", "模型 2.yaml", "-.yaml"])
def test_a_file_name_that_cannot_name_a_run_is_refused(tmp_path: Path, file: str) -> None:
    (tmp_path / file).write_text(STEPS)
    with pytest.raises(ConfigError, match=rf"{file}: the run cannot be named after the file.*name=my-run"):
        Config.load(tmp_path / file)
    assert Config.load(tmp_path / file, ["name=mine"]).name == "mine"


def test_the_identity_has_no_keys_that_only_change_speed() -> None:
    base = {"train": {"steps": 1}, "task": {"target": "a:B"}}
    one = Config.from_dict(base)
    other = Config.from_dict({**base, "data": {"num_workers": 3}, "eval": {"every_steps": 9}, "name": "x"})
    assert one.identity() == other.identity()
    assert one.identity() == Config.from_dict({**base, "train": {"steps": 1, "compile": "model"}}).identity()
    assert one.identity() != Config.from_dict({**base, "seed": 1}).identity()
    assert one.identity()["optim.lr"] == 0.001
