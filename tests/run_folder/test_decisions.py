"""Decisions from evaluations, compared with the definition, written as plainly as possible."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from distrib.config import Config
from distrib.decision_options import BestConfig, PlateauConfig, StopConfig
from distrib.errors import ConfigError
from distrib.run_folder import decisions

VALUES = st.none() | st.just(math.nan) | st.integers(-4, 4).map(float)  # few, so that there are ties
MODES = st.sampled_from(["min", "max"])


def lines(values: list[float | None]) -> list[dict[str, Any]]:
    return [{"step": 10 * place, "metrics": {"eval/loss": value}} for place, value in enumerate(values)]


def better(value: float | None, than: float | None, mode: str, min_delta: float) -> bool:
    if value is None or math.isnan(value):
        return False
    return than is None or (value < than - min_delta if mode == "min" else value > than + min_delta)


@given(st.lists(VALUES), MODES)
def test_records(values: list[float | None], mode: Any) -> None:
    best, expected = None, []
    for place, value in enumerate(values):
        if better(value, best, mode, 0.0):
            best = value
            expected.append((10 * place, value))
    assert decisions.records(lines(values), BestConfig(mode=mode)) == expected
    if expected:
        finite = [value for value in values if value is not None and not math.isnan(value)]
        extreme = (min if mode == "min" else max)(finite)
        assert expected[-1] == (10 * values.index(extreme), extreme)  # of ties the first


@given(st.lists(VALUES), MODES, st.integers(1, 4), st.integers(0, 2), st.integers(0, 60))
def test_stopping(values: list[float | None], mode: Any, patience: int, min_delta: float, min_steps: int) -> None:
    stop = StopConfig(mode=mode, patience=patience, min_delta=float(min_delta), min_steps=min_steps)
    best, waited, expected = None, 0, None
    for place, value in enumerate(values):
        waited = 0 if better(value, best, mode, min_delta) else waited + 1
        best = value if waited == 0 else best
        if waited >= patience and 10 * place >= min_steps:
            expected = 10 * place
            break
    found = decisions.stopped(lines(values), stop)
    assert (None if found is None else found["step"]) == expected
    if found is not None:  # the evaluations before it stop nothing, those after it change nothing
        until = expected // 10 + 1 if expected is not None else 0
        assert decisions.stopped(lines(values[: until - 1]), stop) is None
        assert decisions.stopped(lines(values[:until]), stop) == found


@given(
    st.lists(st.just(math.nan) | st.integers(-4, 4).map(float)),
    MODES,
    st.integers(0, 3),
    st.integers(0, 2),
    st.integers(0, 2),
    st.sampled_from([0.0, 0.05]),
)
def test_a_plateau_is_torchs(
    values: list[float], mode: Any, patience: int, cooldown: int, min_delta: int, min_lr_ratio: float
) -> None:
    plateau = PlateauConfig(
        mode=mode, factor=0.5, patience=patience, cooldown=cooldown, min_delta=min_delta, min_lr_ratio=min_lr_ratio
    )
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=1.0)
    torchs = torch.optim.lr_scheduler.ReduceLROnPlateau(
        optimizer,
        mode,
        factor=0.5,
        patience=patience,
        threshold=float(min_delta),
        threshold_mode="abs",
        cooldown=cooldown,
        min_lr=min_lr_ratio,
        eps=0.0,
    )
    assert decisions.plateau_factor([], plateau) == 1.0
    for place, value in enumerate(values):
        torchs.step(value)
        found = decisions.plateau_factor(lines(list(values[: place + 1])), plateau)
        assert found == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-12)


def test_evaluations_of_another_set_do_not_count() -> None:
    both = [
        {"step": step, "metrics": {name: float(step)}} for step in range(5) for name in ("eval/loss", "eval/other/loss")
    ]
    found = decisions.stopped(both, StopConfig(metric="eval/other/loss", patience=3))
    assert found is not None
    assert (found["step"], found["best_step"], found["best_value"]) == (3, 0, 0.0)


def test_a_metric_that_is_never_finite() -> None:
    found = decisions.stopped(lines([None, None]), StopConfig(patience=2))
    assert found is not None
    assert (found["best_step"], found["reason"]) == (
        None,
        "eval/loss has not improved in 2 evaluation(s); it was never finite",
    )


def test_a_missing_metric_is_refused() -> None:
    config = Config.from_dict({"train": {"steps": 1, "stop": {"metric": "eval/acuracy"}}})
    said = r"train.stop.metric: eval/acuracy is not among .*: eval/accuracy, eval/loss, did you mean eval/accuracy\?"
    with pytest.raises(ConfigError, match=said):
        decisions.require_metrics(config, ["eval/loss", "eval/accuracy"])
