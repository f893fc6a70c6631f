"""Adapters of peft's under every strategy, compared with a plain loop that uses peft and transformers directly."""

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from adapted import LORA, Adapted, base_model
from cases import ADAPTED, ADAPTED_STEPS, EVERY, adapted
from conftest import interrupted, lines, losses, results, tensors
from tasks import plain_batch
from torch import nn
from torch.nn import functional as F

from distrib import Config, Trainer
from distrib.task import load_task

pytest.importorskip("peft")
pytestmark = [pytest.mark.timeout(900), pytest.mark.xdist_group("worlds")]
BATCH, SEED, WORLD = 16, 3, 2
TOLERANCE = 1e-5  # see test_parity
OF_BF16 = 1e-2  # activations are bf16, whose rounding is 4e-3; where they are rounded differs a little


def plain_model(base_dtype: torch.dtype | None = None) -> nn.Module:
    import peft

    torch.manual_seed(SEED)
    model = peft.get_peft_model(base_model(), peft.LoraConfig(lora_alpha=8, **LORA))
    if base_dtype is not None:  # under autocast below, which casts the others
        for parameter in model.parameters():
            parameter.data = parameter.data if parameter.requires_grad else parameter.data.to(base_dtype)
    return model


@cache
def plain_losses(steps: int, base_dtype: torch.dtype | None = None) -> list[float]:
    """Train with a plain loop in one process. Only the data order is distrib's."""
    model, data = plain_model(base_dtype), Adapted().train_dataset()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    update = torch.optim.AdamW(trained, lr=0.01, weight_decay=0.1)
    found = []
    for step in range(steps):
        tokens, targets = plain_batch(data, step, BATCH, SEED)
        with torch.autocast("cpu", torch.bfloat16, enabled=base_dtype is not None):
            logits = model(input_ids=tokens).logits.float()
        loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-100)
        update.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        update.step()
        found.append(loss.item())
    return found


@pytest.mark.parametrize("strategy", ADAPTED)
def test_an_adapter_trains_as_in_a_plain_loop(world: Callable[[int], Path], strategy: str) -> None:
    run, expected = world(WORLD) / f"adapted-usual-{strategy}", plain_losses(ADAPTED_STEPS["usual"])
    assert expected[-1] < expected[0] - 0.3
    np.testing.assert_allclose(losses(run), expected, rtol=TOLERANCE)
    assert {line["strategy"] for line in lines(run)} == {"ddp" if strategy == "auto" else strategy}


@pytest.mark.parametrize("strategy", ["auto", "zero3", "fsdp2"])
def test_a_frozen_base_in_bf16(world: Callable[[int], Path], strategy: str) -> None:
    run = world(WORLD) / f"adapted-bf16-{strategy}"
    np.testing.assert_allclose(losses(run), plain_losses(ADAPTED_STEPS["bf16"], torch.bfloat16), rtol=OF_BF16)
    assert {value.dtype for value in tensors(run).values()} == {np.dtype("float32")}  # what is trained


@pytest.mark.parametrize("strategy", ADAPTED)
def test_a_checkpoint_holds_what_is_trained(world: Callable[[int], Path], strategy: str) -> None:
    run = world(WORLD) / f"adapted-usual-{strategy}"
    wanted = {f"model.{name}" for name, one in plain_model().named_parameters() if one.requires_grad}
    assert {name for name in tensors(run) if name.startswith("model.")} == wanted
    frozen = manifest(run)["frozen"]
    assert set(frozen["names"]) == {n for n, one in plain_model().named_parameters() if not one.requires_grad}
    assert frozen["sha256"] == manifest(world(WORLD) / "adapted-usual-auto")["frozen"]["sha256"]


def manifest(run: Path) -> dict[str, Any]:
    newest = max((run / "checkpoints").iterdir())
    read: dict[str, Any] = json.loads((newest / "manifest.json").read_text())
    return read


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a run with dropout in this process."""
    config, folder = Config.from_dict(adapted("dropout", "single")), tmp_path_factory.mktemp("adapted") / "alone"
    Trainer(load_task(config.task), config, folder).fit()
    return folder


@pytest.mark.parametrize("strategy", ADAPTED)
def test_dropout_is_the_same_on_any_number_of_processes(
    world: Callable[[int], Path], alone: Path, strategy: str
) -> None:
    run = world(WORLD) / f"adapted-dropout-{strategy}"
    np.testing.assert_allclose(losses(run), losses(alone), rtol=TOLERANCE)
    assert losses(run)[0] != plain_losses(ADAPTED_STEPS["usual"])[0]


@pytest.mark.parametrize("strategy", ["zero3", "fsdp2"])
def test_a_run_goes_on_under_another_strategy(
    world: Callable[[int], Path], alone: Path, tmp_path: Path, strategy: str
) -> None:
    """That of one process. tests/distributed/test_resume.py has resumes under the same one."""
    config = Config.from_dict(adapted("dropout", "single"))
    moved = interrupted(world(WORLD) / f"adapted-dropout-{strategy}", tmp_path / "moved", EVERY)
    Trainer(load_task(config.task), config, moved).fit()
    assert [line["strategy"] for line in lines(moved)] == [strategy] * EVERY + ["single"] * (len(lines(alone)) - EVERY)
    np.testing.assert_allclose(losses(moved), losses(alone), rtol=TOLERANCE)


def test_a_rank_holds_a_shard_of_the_frozen_base(world: Callable[[int], Path]) -> None:
    found = results(world(WORLD))["frozen_bytes"]
    whole = sum(one.numel() * 4 for one in plain_model().parameters() if not one.requires_grad)
    for dtype, size in (("fp32", whole), ("bf16", whole // 2)):
        assert found[f"ddp-{dtype}"] == size
        for strategy in ("zero3", "fsdp2"):
            assert size / WORLD <= found[f"{strategy}-{dtype}"] < size / WORLD * 1.01, strategy
