"""`train.freeze` and `train.unfreeze_at` in one process: statistics, resuming, and what is refused."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Run, check, check_same, interrupted, losses, refused, tensors
from tasks import Masked, plain_loss
from torch import nn

from distrib import Config, Trainer

STEPS, EVERY, UNFREEZE_AT = 12, 5, 7


class Normalised(Masked):
    def model(self) -> nn.Module:
        embedding, *others = super().model()
        return nn.Sequential(embedding, nn.BatchNorm1d(6), *others)


def config(**train: Any) -> Config:
    return Config.from_dict(
        {
            "seed": 3,
            "train": {"steps": STEPS, **train},
            "data": {"global_batch_size": 16, "micro_batch_size": 16},
            "optim": {"name": "sgd", "lr": 0.5},
            "eval": {"every_steps": 4},
            "checkpoint": {"every_steps": EVERY, "keep": 9},
        }
    )


def fit(folder: Path, **train: Any) -> Path:
    Trainer(Normalised(), config(**train), folder).fit()
    return folder


def test_statistics_of_a_frozen_layer_stay(tmp_path: Path) -> None:
    """Also after evaluations, which change the mode of all layers."""
    torch.manual_seed(3)
    model = Normalised().model()
    model[1].eval()
    model[1].requires_grad_(False)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    expected = []
    for step in range(STEPS):
        loss = plain_loss(model, Normalised().train_dataset(), step, 16, 3)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        expected.append(loss.item())
    run = fit(tmp_path / "run", freeze="1.*")
    np.testing.assert_allclose(losses(run), expected, rtol=1e-5)  # see test_parity
    found = tensors(run)
    np.testing.assert_array_equal(found["model.1.running_mean"], np.zeros(6))
    np.testing.assert_array_equal(found["model.1.weight"], np.ones(6))


def test_statistics_are_collected_again_once_unfrozen(tmp_path: Path) -> None:
    run = fit(tmp_path / "run", freeze=["1.*"], unfreeze_at={"step": UNFREEZE_AT})
    np.testing.assert_array_equal(tensors(run, EVERY)["model.1.running_mean"], np.zeros(6))
    assert tensors(run)["model.1.num_batches_tracked"] == STEPS - UNFREEZE_AT
    for after in (EVERY, UNFREEZE_AT, 2 * EVERY):
        copy = interrupted(run, tmp_path / str(after), after)
        check_same(fit(copy, freeze=["1.*"], unfreeze_at={"step": UNFREEZE_AT}), run)


@pytest.mark.parametrize(
    ("train", "said"),
    [
        (
            "freeze: [1.0.wieght]",
            "train.freeze.0: 1.0.wieght matches no parameter or buffer of the model, did you mean",
        ),
        ("freeze: ['*']", "train.freeze: * leaves no parameter to train"),
        ("freeze: ['*'], unfreeze_at: {step: 1}", "train.freeze: * leaves no parameter to train"),
        ("unfreeze_at: {step: 1}", "train: unfreeze_at is given, and nothing is frozen"),
        ("freeze: '0.*', unfreeze_at: {step: 2}", "train.unfreeze_at.step: 2, but the run has 2 steps; give fewer"),
        (
            "freeze: '0.*', unfreeze_at: {step: 0}",
            "train.unfreeze_at.step: 0: input should be greater than 0",
        ),
    ],
)
def test_refused(run: Run, tmp_path: Path, train: str, said: str) -> None:
    (tmp_path / "c.yaml").write_text(f"task: {{target: tasks:Masked}}\ntrain: {{steps: 2, {train}}}\n")
    for command in (("train", "c.yaml"), ("explain", "c.yaml", "--processes", 2)):
        assert said in refused(run("distrib", *command))


@pytest.mark.parametrize(
    ("schedule", "said"),
    [
        ("cosin", "optim.groups.0.schedule: 'cosin': input should be"),
        ("{name: cosine, min_lr_rato: 0.1}", "optim.groups.0.schedule: min_lr_rato: "),
        ("{name: wsd, decay_steps: 9}", "optim.groups.0.schedule.decay_steps: 9, but there are 2 updates; give fewer"),
        ("[{name: cosine, steps: 1}]", "optim.groups.0.schedule: the pieces have 1 updates in all, and the run has 2"),
    ],
)
def test_a_schedule_of_a_group_that_is_refused(run: Run, tmp_path: Path, schedule: str, said: str) -> None:
    group = f"{{match: '0.*', schedule: {schedule}}}"
    text = f"task: {{target: tasks:Masked}}\noptim: {{groups: [{group}]}}\ntrain: {{steps: 2}}\n"
    (tmp_path / "c.yaml").write_text(text)
    assert said in refused(run("distrib", "explain", "c.yaml"))


def test_explain_counts_what_is_trained(run: Run, tmp_path: Path) -> None:
    def gradients(train: str) -> int:
        (tmp_path / "c.yaml").write_text(f"task: {{target: tasks:Masked}}\ntrain: {{steps: 2{train}}}\n")
        (line,) = [one for one in check(run("distrib", "explain", "c.yaml")).splitlines() if "gradients, a rank" in one]
        return int(line.split()[-2].replace(",", ""))

    assert gradients("") - gradients(", freeze: '1.*'") == 4 * (16 * 32 + 32)
    assert gradients(", freeze: '1.*', unfreeze_at: {step: 1}") == gradients("")
