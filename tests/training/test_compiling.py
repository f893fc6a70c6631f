"""train.compile in one process: the same losses, code in the run folder, and no silent fallback."""

import shutil
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from conftest import Run, check, check_same, events, losses, no_process_left, refused, starter, tensors
from tasks import Masked, Stacked

from distrib import Config, Trainer
from distrib.errors import ConfigError

pytestmark = [pytest.mark.timeout(900), pytest.mark.xdist_group("compiling"), pytest.mark.slow]

STEPS, SAVED = 12, 5
# Sums of a few dozen terms in another order, 12 steps of feedback: as between strategies, see test_parity.
ROUNDING = 1e-5


def values(task: str = "Stacked", **train: Any) -> dict[str, Any]:
    return {
        "seed": 3,
        "task": {"target": f"tasks:{task}", "dropout": 0.2},
        "data": {"global_batch_size": 16, "micro_batch_size": 4},
        "optim": {"name": "adamw", "lr": 0.01},
        "train": {"steps": STEPS, "max_grad_norm": 1.0, **train},
        "checkpoint": {"every_steps": SAVED, "keep": 9},
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Make two runs, one of them compiled."""
    folder = tmp_path_factory.mktemp("compiling")
    (folder / "config.yaml").write_text(yaml.safe_dump(values()))
    with no_process_left() as mark:
        run = starter(mark, folder)
        check(run("distrib", "train", "config.yaml", "--run-dir", "plain"))
        compiled = ("train.compile=blocks", "--run-dir", "compiled")
        said = check(run("distrib", "train", "config.yaml", *compiled, timeout=400))
        assert "compiling (blocks)" in said
        yield folder


def test_a_compiled_run_has_the_same_losses(folder: Path) -> None:
    """With dropout, accumulation and clipping. The evaluation, whose last batch is smaller, is not compiled."""
    compiled, plain = folder / "compiled", folder / "plain"
    np.testing.assert_allclose(losses(compiled), losses(plain), rtol=ROUNDING)
    found, other = tensors(compiled), tensors(plain)
    assert found.keys() == other.keys()
    assert any((found[key] != other[key]).any() for key in found)  # it was compiled, so rounding differs
    assert events(compiled)[:2] == ["started", "compiling"]
    assert "compiling" not in events(plain)


def test_compiled_code_is_in_the_run_folder(folder: Path) -> None:
    code = folder / "compiled" / "compiled"
    assert len(list(code.rglob("*.so"))) > 1
    assert stat.S_IMODE(code.stat().st_mode) == 0o700
    assert not (folder / "plain" / "compiled").exists()


def test_a_resumed_run_compiles_nothing_again(folder: Path, run: Run, tmp_path: Path) -> None:
    """It finds its code, and has the same bits."""
    again = tmp_path / "again"
    shutil.copytree(folder / "compiled", again)
    before = {path: path.stat().st_mtime_ns for path in again.rglob("*.so")}
    checkpoint = again / f"checkpoints/step-{SAVED:08}"
    check(run("distrib", "train", again / "config.yaml", "--run-dir", again, "--resume", checkpoint))
    assert {path: path.stat().st_mtime_ns for path in again.rglob("*.so")} == before
    check_same(again, folder / "compiled")


def test_a_run_may_resume_with_another_train_compile(folder: Path, run: Run, tmp_path: Path) -> None:
    """train.compile does not belong to what is computed, so a run may resume from a checkpoint of the other kind."""
    shutil.copytree(folder / "plain", tmp_path / "plain")
    shutil.copytree(folder / "compiled", tmp_path / "compiled")
    shutil.copytree(folder / "compiled/compiled", tmp_path / "plain/compiled")  # to save the time
    for name, compile in (("plain", "blocks"), ("compiled", "false")):
        checkpoint = tmp_path / name / f"checkpoints/step-{SAVED:08}"
        config = tmp_path / name / "config.yaml"
        check(run("distrib", "train", config, f"train.compile={compile}", "--run-dir", name, "--resume", checkpoint))
        np.testing.assert_allclose(losses(tmp_path / name), losses(folder / name), rtol=ROUNDING)
        found, other = tensors(tmp_path / name), tensors(folder / name)
        assert any((found[key] != other[key]).any() for key in found)  # one of them was compiled, so rounding differs


@pytest.mark.parametrize(
    ("task", "compile", "why"),
    [("Asking", "model", "return x * 2 if x.sum().item() > 0 else x"), ("Counting", "blocks", "recompile_limit")],
    ids=["graph break", "recompilation"],
)
def test_a_forward_that_cannot_be_compiled_ends_the_run(
    run: Run, tmp_path: Path, task: str, compile: str, why: str
) -> None:
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(values(task, compile=compile)))
    result = run("distrib", "train", "config.yaml")
    check(result, code=1)
    assert why in result.stderr
    assert events(tmp_path / "runs/config")[-1] == "failed"


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"train": {"determinism": "bitwise"}}, "train.compile: blocks is not for train.determinism: bitwise"),
        ({"train": {"compile": True}}, "train.compile: True: input should be False, 'blocks' or 'model'"),
        ({"train": {"compile": "model"}, "strategy": {"name": "fsdp2"}}, "model, but fsdp2 gathers"),
        ({"train": {"compile": "model"}, "strategy": {"name": "zero3"}}, "model, but zero3 gathers"),
        ({"train": {"compile": "model"}, "strategy": {"activation_checkpointing": True}}, "or take blocks"),
    ],
)
def test_combinations_that_are_refused(tmp_path: Path, more: dict[str, Any], said: str) -> None:
    given = values(compile="blocks")
    given = {**given, **more, "train": {**given["train"], **more["train"]}}
    with pytest.raises(ConfigError) as error:
        Trainer(Stacked(), Config.from_dict(given), tmp_path / "run")
    assert said in str(error.value)
    assert "\n" not in str(error.value)


def test_a_model_without_blocks_is_refused(tmp_path: Path) -> None:
    class NoBlocks(Masked):
        def blocks(self, model: Any) -> list[Any]:
            return []

    with pytest.raises(ConfigError, match=r"train.compile: Sequential has no repeated blocks that distrib finds"):
        Trainer(NoBlocks(), Config.from_dict(values(compile="blocks")), tmp_path / "run")


@pytest.mark.parametrize(
    ("variable", "value", "said"),
    [("CXX", "no-compiler", "there is no no-compiler; install it"), ("TORCHDYNAMO_DISABLE", "1", "compile nothing")],
)
def test_a_machine_that_cannot_compile_is_refused(
    run: Run, tmp_path: Path, variable: str, value: str, said: str
) -> None:
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(values(compile="model")))
    assert said in refused(run("distrib", "train", "config.yaml", **{variable: value}))
    assert not (tmp_path / "runs").exists()
