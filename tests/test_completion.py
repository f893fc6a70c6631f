"""Shell completion in a real bash, with the script that `distrib --show-completion` prints."""

import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import environment

from distrib.completion import OPTIMIZERS, overrides
from distrib.config import Config

# COMP_WORDS and COMP_CWORD are what bash sets when Tab is pressed; it takes = for a word of its own.
ASK = """
eval "$(distrib --show-completion bash)"
COMP_WORDS=("$@"); COMP_CWORD=$((${#COMP_WORDS[@]} - 1))
_distrib_completion distrib
printf '%s\\n' "${COMPREPLY[@]}"
"""


@pytest.fixture
def tab(tmp_path: Path) -> Any:
    for name in ("runs/one", "runs/two", "configs", "photos"):
        (tmp_path / name).mkdir(parents=True)
    for name in ("runs/one/config.yaml", "runs/two/config.yaml", "configs/small.yaml", "own.yaml", "own.py", "a.txt"):
        (tmp_path / name).touch()
    # Typer finds out which shell asks, unless this is set; here Python started it.
    env = environment("", _TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION="1")

    def complete(*words: str) -> list[str]:
        command = ["bash", "-c", ASK, "bash", "distrib", *words]
        result = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=60, check=True)
        return result.stdout.split()

    return complete


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["ev"], ["evaluate"]),
        (["train", "--res"], ["--resume", "--reset-optimizer"]),
        (["train", ""], ["configs/", "own.yaml", "photos/", "runs/", "configs/small.yaml"]),
        (["train", "configs/"], ["configs/small.yaml"]),
        (["train", "./o"], ["./own.yaml"]),
        (["launch", "--processes", "2", "ow"], ["own.py", "own.yaml"]),
        (["launch", "own.yaml", "checkpoint.k"], ["checkpoint.keep=", "checkpoint.keep_every="]),
        (["launch", "own.py", "checkpoint.k"], []),
        (["train", "own.yaml", "optim.lr", "=", "0.1", "train.mixed_precision", "="], ["no", "bf16", "fp16"]),
        (["train", "own.yaml", "strategy.name", "=", "zero"], ["zero0", "zero1", "zero2", "zero3"]),
        (["train", "own.yaml", "optim.name", "=", "s"], ["sgd", "sparseadam"]),
        (["explain", "own.yaml", "eval.at_start", "=", "t"], ["true"]),
        (["evaluate", ""], ["configs/", "photos/", "runs/", "runs/one", "runs/two"]),
        (["compare", "runs/one", "runs/t"], ["runs/two"]),
    ],
)
def test_tab(tab: Any, words: list[str], expected: list[str]) -> None:
    assert tab(*words) == expected


def test_every_key_and_shells_that_keep_a_word() -> None:
    """zsh and fish complete key=value as one word."""
    keys = {key.removesuffix("=") for key in overrides([], "")}
    config = Config.from_dict({"train": {"steps": 1, "stop": {"metric": "eval/loss"}}})
    assert {key for key, value in config.flat().items() if value is not None} <= keys
    assert {"train.stop.patience", "strategy.offload", "optim.schedule.min_lr_ratio"} <= keys
    assert overrides(["optim.lr=0.1"], "optim.schedule=co") == ["optim.schedule=constant", "optim.schedule=cosine"]
    assert overrides([], "optim.lr=") == []
    assert overrides([], "nothing") == []
    names = {name.lower() for name, kind in vars(torch.optim).items() if isinstance(kind, type)}
    assert {name.lower() for name in OPTIMIZERS} == names - {"optimizer", "lbfgs"}
