import re

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from distrib import Config, RunPlan
from distrib.errors import ConfigError
from distrib.plan import window_size


def config(batch: int, micro: int, **train: int) -> Config:
    return Config.from_dict(
        {"data": {"global_batch_size": batch, "micro_batch_size": micro}, "train": train or {"steps": 3}}
    )


@given(st.integers(1, 64), st.integers(1, 16), st.integers(1, 9), st.integers(1, 5), st.integers(0, 500))
def test_batch_sizes_and_steps_are_consistent(micro: int, accum: int, world: int, epochs: int, extra: int) -> None:
    batch = micro * accum * world
    plan = RunPlan.create(config(batch, micro, epochs=epochs), world, batch + extra)
    assert plan.grad_accum_steps * plan.micro_batch_size * world == batch
    assert plan.num_micro_batches == accum * world
    # every sample of each epoch is read, with less than one step to spare
    assert 0 <= plan.num_steps * batch - epochs * (batch + extra) < batch
    assert plan.epoch(0) == 0
    assert plan.epoch(plan.num_steps - 1) == epochs - 1 if extra == 0 else plan.epoch(plan.num_steps - 1) <= epochs


@given(st.integers(1, 300), st.integers(1, 300), st.integers(1, 12))
def test_batch_sizes_that_do_not_divide_are_refused_with_suggestions(batch: int, micro: int, world: int) -> None:
    assume(batch % micro or (batch // micro) % world)
    with pytest.raises(ConfigError) as error:
        window_size(config(batch, micro), world)
    line = str(error.value)
    assert str(batch) in line
    assert str(micro) in line
    batches, sizes = re.search(r"that fit: global_batch_size ([\d or]+)(.*)", line).groups()  # type: ignore[union-attr]
    for suggested in map(int, re.findall(r"\d+", batches)):
        if batch % micro:
            assert suggested % micro == 0
        else:
            window_size(config(suggested, micro), world)
    for suggested in map(int, re.findall(r"\d+", sizes)):
        assert batch % suggested == 0


def test_a_dataset_smaller_than_a_batch_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"global_batch_size: 64, but the training set has only 40 samples"):
        RunPlan.create(config(64, 16), 1, 40)
