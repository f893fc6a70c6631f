"""Running statistics and other buffers depend only on the step, not on strategy or number of processes."""

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cases import BUFFER_STRATEGIES, FEW, MICRO
from conftest import check_same, lines, tensors
from tasks import WithBuffers
from torch.nn import functional as F

from distrib.data.order import sample_indices

pytestmark = [pytest.mark.timeout(900), pytest.mark.xdist_group("worlds")]

BATCH, SEED = 16, 3


@cache
def plain(centred: bool) -> tuple[list[float], dict[str, Any], float, float]:
    """Train with a plain PyTorch loop over the micro-batches in order. Return the losses, the model's final state, and
    loss and metric of the evaluation."""
    task = WithBuffers(centred)
    features, targets, _ = task.train_dataset().tensors
    torch.manual_seed(SEED)
    model = task.model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    losses = []
    for step in range(FEW):
        before = {name: buffer.clone() for name, buffer in model.named_buffers()}
        total, count, first = 0.0, 0, before["1.mean"] if centred else None
        optimizer.zero_grad()
        for number in range(BATCH // MICRO):
            if centred:  # cannot be merged: each starts with the same value, and the first one's result is kept
                model[1].mean = before["1.mean"]  # type: ignore[index, union-attr]
            positions = np.arange(step * BATCH + number * MICRO, step * BATCH + (number + 1) * MICRO, dtype=np.uint64)
            chosen = sample_indices(positions, len(targets), SEED).tolist()
            output = model(features[chosen])
            loss = F.cross_entropy(output.flatten(0, 1), targets[chosen].flatten(), ignore_index=-100, reduction="sum")
            loss.backward()
            total, count = total + loss.item(), count + int((targets[chosen] != -100).sum())
            if number == 0 and centred:
                first = model[1].mean.detach()  # type: ignore[index, union-attr]
        losses.append(total / count)
        if centred:
            model[1].mean = first  # type: ignore[index, union-attr]
        if np.isfinite(total):
            torch._foreach_div_([p.grad for p in model.parameters()], count)
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.param_groups[0]["lr"] = 0.1
            optimizer.step()
        else:
            model.load_state_dict(before, strict=False)
    model.eval()
    features, targets, _ = task.eval_dataset().tensors
    output = model(features).detach()
    loss = F.cross_entropy(output.flatten(0, 1), targets.flatten(), ignore_index=-100)
    score = output.double().square().mean((1, 2)).mean().item()
    return losses, {name: value.detach().numpy() for name, value in model.state_dict().items()}, loss.item(), score


def check_parity(run: Path, centred: bool = True) -> None:
    """Compare within test_parity's 1e-5, and exactly for integers."""
    losses, state, loss, score = plain(centred)
    skipped = [step for step, value in enumerate(losses) if not np.isfinite(value)]
    assert 0 < len(skipped) < FEW / 2
    steps = lines(run)
    assert [line["step"] for line in steps if line["verdict"] != "applied"] == skipped
    found = [np.nan if line["loss"] is None else line["loss"] for line in steps]
    np.testing.assert_allclose(found, losses, rtol=1e-5)
    saved = tensors(run)
    for name, value in state.items():
        np.testing.assert_allclose(saved[f"model.{name}"], value, rtol=1e-5, atol=1e-6, err_msg=name)
    metrics = lines(run, "evals.jsonl")[-1]["metrics"]
    np.testing.assert_allclose([metrics["eval/loss"], metrics["eval/score"]], [loss, score], rtol=1e-5)


@pytest.mark.parametrize(
    ("processes", "strategy"), [(world, name) for world, names in BUFFER_STRATEGIES.items() for name in names]
)
def test_buffers_equal_those_of_a_plain_loop(world: Callable[[int], Path], processes: int, strategy: str) -> None:
    run = world(processes) / f"buffers-{strategy}"
    check_parity(run)
    (warning,) = [event["reason"] for event in lines(run, "events.jsonl") if event["event"] == "warning"]
    assert warning.startswith(
        "forward changes the buffer 1.mean in a way that distrib cannot merge: each of a step's 4"
    )


@pytest.mark.parametrize("processes", [2, 4])
def test_buffers_of_bitwise_runs_have_the_same_bits(world: Callable[[int], Path], processes: int) -> None:
    check_parity(world(1) / "buffers-bitwise")
    check_same(world(processes) / "buffers-bitwise", world(1) / "buffers-bitwise")


def test_a_forward_that_activation_checkpointing_repeats_counts_once(world: Callable[[int], Path]) -> None:
    check_parity(world(2) / "buffers-checkpointing", centred=False)
