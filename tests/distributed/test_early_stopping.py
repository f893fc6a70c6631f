"""A run stops after the same step, with the same best checkpoint, rates and own numbers, as a plain PyTorch loop."""

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from cases import ON, STOP, STOP_EVERY, STOP_STEPS
from conftest import lines, losses
from tasks import Masked, own_sums, plain_batch, plain_loss
from torch.nn import functional as F

pytestmark = [pytest.mark.timeout(900), pytest.mark.xdist_group("worlds")]
BATCH = 16


@cache
def plain() -> tuple[list[float], list[tuple[int, float, int]], list[dict[str, float]]]:
    """Train and evaluate in one process until the evaluation's loss improves no more, with half the rate after each
    evaluation that is not the best. Return the losses of the steps; step, loss and number of right tokens of each
    evaluation; and own numbers of the steps."""
    task = Masked()
    data, (others, answers) = task.train_dataset(), task.eval_dataset().tensors
    torch.manual_seed(7)
    model = task.model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.0)
    train_losses, evaluations, own = list[float](), list[tuple[int, float, int]](), list[dict[str, float]]()
    best, lowest, waited = np.inf, np.inf, 0
    for step in range(STOP_STEPS):
        loss = plain_loss(model, data, step, BATCH, 7)
        with torch.no_grad():
            tokens, targets = plain_batch(data, step, BATCH, 7)
            sums = own_sums(model(tokens), targets)
        own.append({name: float(total) / float(count) for name, (total, count) in sums.items() if count})
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        train_losses.append(loss.item())
        if (step + 1) % STOP_EVERY == 0:
            with torch.no_grad():
                output = model(others)
            found = F.cross_entropy(output.flatten(0, 1), answers.flatten(), ignore_index=-100).item()
            right = int(((output.argmax(-1) == answers) & (answers != -100)).sum())
            evaluations.append((step + 1, found, right))
            # Rounding, some 1e-7, must not decide whether this one is better.
            assert abs(best - STOP["min_delta"] - found) > 1e-5
            assert abs(lowest - found) > 1e-5
            if found >= lowest:
                optimizer.param_groups[0]["lr"] /= 2
            lowest = min(lowest, found)
            best, waited = (found, 0) if found < best - STOP["min_delta"] else (best, waited + 1)
            if waited == STOP["patience"]:
                break
    return train_losses, evaluations, own


@pytest.mark.parametrize(("processes", "strategy"), ON)
def test_it_stops_as_the_plain_loop_does(world: Callable[[int], Path], processes: int, strategy: str) -> None:
    expected, evaluations, _ = plain()
    assert STOP_EVERY < len(expected) < STOP_STEPS
    run = world(processes) / f"stops-{strategy}"
    np.testing.assert_allclose(losses(run), expected, rtol=1e-5)  # also equally many
    found = lines(run, "evals.jsonl")
    assert [line["step"] for line in found] == [step for step, _, _ in evaluations]
    np.testing.assert_allclose(
        [line["metrics"]["eval/loss"] for line in found], [loss for _, loss, _ in evaluations], rtol=1e-5
    )
    assert [line["metrics"]["eval/right"] for line in found] == [right for _, _, right in evaluations]
    best = max(evaluations, key=lambda evaluation: (evaluation[2], -evaluation[0]))
    summary = json.loads((run / "summary.json").read_text())
    assert summary["steps"] == len(expected)
    assert (summary["best"]["step"], summary["best"]["value"]) == (best[0], best[2])
    kept = sorted(int(path.name.removeprefix("step-")) for path in (run / "checkpoints").glob("step-*"))
    assert kept == sorted({best[0], len(expected)})


@pytest.mark.parametrize(("processes", "strategy"), ON)
def test_own_numbers_are_those_of_the_plain_loop(world: Callable[[int], Path], processes: int, strategy: str) -> None:
    """Of whole steps, over ranks and micro-batches. Whole numbers are summed exactly."""
    _, _, expected = plain()
    found = lines(world(processes) / f"stops-{strategy}")
    assert [line["train/right"] for line in found] == [own["right"] for own in expected]
    np.testing.assert_allclose(
        [line["train/squares"] for line in found], [own["squares"] for own in expected], rtol=1e-5
    )
    assert {line["train/none"] for line in found} == {None}
