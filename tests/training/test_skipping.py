"""A run that only skips steps ends, and reports since when."""

from pathlib import Path
from typing import Any

import pytest
from conftest import lines
from tasks import Misbehaving
from torch import nn

from distrib import Config, Trainer
from distrib.errors import TrainingError
from distrib.training.engine import LossScale


class Diverging(Misbehaving):
    """Goes wrong from the run's `at`-th micro-batch on."""

    before = 0  # micro-batches of earlier starts

    def __init__(self, how: str, at: int) -> None:
        super().__init__(how, on_rank=0, at=at)
        self.first, self.seen = at, self.before

    def forward(self, model: nn.Module, batch: Any) -> Any:
        if model.training:
            self.at = max(self.first, self.seen + 1)
        return super().forward(model, batch)

    def eval_dataset(self) -> None:
        return None


def config(**train: Any) -> Config:
    return Config.from_dict(
        {
            "data": {"global_batch_size": 4, "micro_batch_size": 4},
            "train": {"steps": 40, "max_skipped": 7, **train},
            "checkpoint": {"every_steps": 6, "keep": 9},
        }
    )


@pytest.mark.parametrize(("how", "verdict"), [("nan", "nonfinite_loss"), ("inf", "nonfinite_gradient")])
def test_too_many_skipped_steps_in_a_row_end_a_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str, verdict: str
) -> None:
    said = f"all steps from 4 to 10 were skipped, the last one as skipped:{verdict}, which is as many in a row as"
    with pytest.raises(TrainingError, match=said):
        Trainer(Diverging(how, at=4), config(), tmp_path / "run").fit()
    run = tmp_path / "run"
    assert [line["verdict"] == "applied" for line in lines(run)] == [True] * 3 + [False] * 7
    assert lines(run, "events.jsonl")[-1]["event"] == "failed"
    monkeypatch.setattr(Diverging, "before", 6)
    # After a resume, skipped steps before the checkpoint count too.
    with pytest.raises(TrainingError, match=said):
        Trainer(Diverging(how, at=4), config(), run).fit()
    # The key does not belong to what is computed: the run resumes with a larger value.
    with pytest.raises(TrainingError, match="all steps from 4 to 15 were skipped"):
        Trainer(Diverging(how, at=4), config(max_skipped=12), run).fit()


def test_too_many_skipped_steps_of_fp16_end_a_run(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="all steps from 4 to 10 were skipped, the last one as skipped:loss_scale"):
        Trainer(Diverging("inf", at=4), config(mixed_precision="fp16"), tmp_path / "run").fit()


def test_the_loss_scale_has_a_lower_bound() -> None:
    scale = LossScale(2.0**16)
    for _ in range(1200):
        scale.update(overflowed=True)
    assert scale.value == 2.0**-24
