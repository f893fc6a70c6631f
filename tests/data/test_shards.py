"""Sharded streams: their order, resuming, random numbers and refusals, in one process. tests/distributed has more."""

from collections import Counter
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Run, check_same, interrupted, lines, losses, refused
from data_tasks import BEGINS, Lines, Ragged, Sharded
from hypothesis import example, given
from hypothesis import strategies as st
from tasks import Masked, Streamed

from distrib import Config, Trainer
from distrib.data.order import sample_indices
from distrib.data.shards import ShardedStream, ShardOrder, index_of
from distrib.errors import ConfigError, RunDirError
from distrib.run_folder.verify import verify_run

VALUES: dict[str, Any] = {
    "name": "run",
    "data": {"global_batch_size": 16, "micro_batch_size": 4},
    "train": {"steps": 12},
    "checkpoint": {"every_steps": 5},
}


def fit(folder: Path, trained: Any, num_workers: int = 0, **more: Any) -> Path:
    values = {**VALUES, **more}
    config = Config.from_dict({**values, "data": {**values["data"], "num_workers": num_workers}})
    Trainer(trained, config, folder).fit()
    return folder


@given(
    st.lists(st.integers(0, 7), min_size=4, max_size=12),
    st.integers(1, 4),
    st.integers(1, 3),
    st.integers(0, 2**63 - 1),
)
@example([0, 0, 0, 0, 0, 0], 3, 1, 0)  # a lane's last shard in one pass and its first in the next are empty
def test_the_order_is_that_of_the_lanes(lengths: list[int], lanes: int, size: int, seed: int) -> None:
    """Any position can be computed directly. Each lane reads its shards of each pass, one after the other."""
    shards = len(lengths)

    def lane(number: int) -> Iterator[int]:
        for passes in count():
            order = sample_indices(np.arange(passes * shards, (passes + 1) * shards, dtype=np.uint64), shards, seed)
            for shard in order.tolist()[number::lanes]:
                yield from (index_of(shard, offset) for offset in range(lengths[shard]))

    if any(not length for length in lengths):
        lengths = [length + 1 for length in lengths[:-1]] + [0]  # an endless search would follow from lanes of nothing
        if shards < 2 * lanes:
            lengths[-1] = 1
    walked = [lane(number) for number in range(lanes)]
    expected = [next(walked[number]) for _ in range(20) for number in range(lanes) for _ in range(size)]
    order = ShardOrder(shards, lanes * size, size, seed, dict(enumerate(lengths)))
    positions = np.arange(len(expected), dtype=np.uint64)
    assert order.indices(positions).tolist() == expected
    for start in (7, len(expected) - 3):
        again = ShardOrder(shards, lanes * size, size, seed, dict(enumerate(lengths)))
        assert again.indices(positions[start:]).tolist() == expected[start:]


def test_each_pass_reads_each_sample_once() -> None:
    order = ShardOrder(9, 4, 1, 3, {shard: BEGINS[shard + 1] - BEGINS[shard] for shard in range(9)})
    indices = order.indices(np.arange(4 * 300, dtype=np.uint64)).reshape(-1, 4)
    passes: list[list[int]] = [[], []]
    for lane in range(4):
        own = sum(order.lengths[order.visit(lane, number)[1]] for number in range(len(range(lane, 9, 4))))
        passes[0] += indices[:own, lane].tolist()
        passes[1] += indices[own : 2 * own, lane].tolist()[:97]
    assert len(passes[0]) == len(set(passes[0])) == 97


def test_a_sharded_stream_resumes_where_it_was(tmp_path: Path) -> None:
    """12 steps of 16 samples, out of 97: each lane passes over its shards more than once."""
    whole = fit(tmp_path / "whole", Sharded())
    assert {line["epoch"] for line in lines(whole)} == {0}
    assert verify_run(whole).samples == 192
    killed = interrupted(whole, tmp_path / "run", after=5)
    found = verify_run(killed)
    assert found.steps == 12
    assert found.unknown > 0, "after the checkpoint, it is not known where shards end"
    assert found.samples + found.unknown * 16 == 192
    check_same(fit(killed, Sharded()), whole)


def test_verify_notices_other_samples(tmp_path: Path) -> None:
    run = fit(tmp_path / "run", Sharded())
    text = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(text.replace("seed: 0", "seed: 1"))
    with pytest.raises(Exception, match=r"read samples with the digest|damaged: seed"):
        verify_run(run)


class Augmented(Lines):
    def open(self, shard: str, offset: int) -> Iterator[Any]:
        for tokens, targets in super().open(shard, offset):
            yield tokens * (torch.rand(tokens.shape) > 0.3), targets


class AugmentedTask(Sharded):
    def train_dataset(self) -> Any:
        return Augmented(super().train_dataset().samples)


def test_random_numbers_do_not_depend_on_workers_or_resuming(tmp_path: Path) -> None:
    alone = fit(tmp_path / "alone", AugmentedTask())
    assert losses(fit(tmp_path / "workers", AugmentedTask(), num_workers=3)) == losses(alone)
    check_same(fit(interrupted(alone, tmp_path / "run", after=10), AugmentedTask()), alone)
    assert losses(alone) != losses(fit(tmp_path / "plain", Sharded()))


def test_the_tasks_collate_is_used(tmp_path: Path) -> None:
    class Rows(ShardedStream):
        def shards(self) -> list[str]:
            return ["a", "b", "c", "d"]

        def open(self, shard: str, offset: int) -> Iterator[Any]:
            return iter(Ragged().train_dataset()[offset:])

    class RaggedShards(Ragged):
        def train_dataset(self) -> Any:
            return Rows()

    assert len(lines(fit(tmp_path / "run", RaggedShards()))) == 12


def stream(**methods: Callable[..., Any]) -> Any:
    """Return a task whose stream is Lines with these methods."""
    changed = type("Changed", (Lines,), methods)

    class Other(Masked):
        def train_dataset(self) -> Any:
            return changed(super().train_dataset())

    return Other()


def endless(self: Any, shard: str, offset: int) -> Iterator[Any]:
    return Lines.open(self, shard, 0)


class Shrinking(Lines):
    """Has one sample in each shard from the fourth opening on; the fingerprint has opened it twice."""

    def __init__(self, samples: Any) -> None:
        super().__init__(samples)
        self.opened: Counter[str] = Counter()

    def open(self, shard: str, offset: int) -> Iterator[Any]:
        self.opened[shard] += 1
        return iter(list(super().open(shard, offset))[: None if self.opened[shard] < 4 else 1])


class ShrinkingTask(Masked):
    def train_dataset(self) -> Any:
        return Shrinking(super().train_dataset())


@pytest.mark.parametrize(
    ("trained", "said"),
    [
        (
            stream(shards=lambda self: ["a", "b", "c"]),
            "Changed has 3 shard(s), but a step has 4 micro-batches,",
        ),
        (stream(shards=lambda self: ["a", "b", "a", "c"]), "Changed.shards() has 'a' twice; give each shard its own"),
        (stream(shards=lambda self: "abcd"), "Changed.shards() returned str; return a list of names, one for each"),
        (stream(shards=lambda self: 9), "Changed.shards() returned int; return a list of names, one for each"),
        (stream(shards=lambda self: [1, 2, 3, 4]), "Changed.shards() returned [int, int, int, int]; return a list of"),
        (stream(open=lambda self, shard, offset: None), "returned None; return an iterator over the samples of the"),
        (stream(open=lambda self, shard, offset: iter([])), "the shards of micro-batch 0 have no samples; leave empty"),
        (stream(open=endless), ", 1) does not begin with the second sample of open("),
        (ShrinkingTask(), "samples, and now 1; open() must return the same samples each time"),
    ],
)
def test_unusable_streams_are_refused(tmp_path: Path, trained: Any, said: str) -> None:
    with pytest.raises(ConfigError) as error:
        fit(tmp_path / "run", trained)
    assert str(error.value).startswith("task.train_dataset: ")
    assert said in str(error.value)
    assert "\n" not in str(error.value)


def test_a_bad_stream_ends_the_command_with_exit_code_2(run: Run, tmp_path: Path) -> None:
    config = "task: {target: 'data_tasks:Sharded'}\ntrain: {steps: 2}\ndata: {micro_batch_size: 1}\n"
    (tmp_path / "run.yaml").write_text(config)
    for command in ("train", "explain"):
        line = refused(run("distrib", command, "run.yaml"))
        assert "Lines has 9 shard(s), but a step has 64 micro-batches" in line
        assert "needs" not in refused(run("distrib", command, "run.yaml", "data.micro_batch_size=many"))
    assert not (tmp_path / "runs").exists()


def test_another_stream_is_not_gone_on_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = fit(tmp_path / "run", Sharded())
    monkeypatch.setattr(Lines, "shards", lambda self: [f"lines-{number}" for number in range(8)])
    with pytest.raises(RunDirError, match=r"task.train_dataset has other shards than at the run's start"):
        fit(run, Sharded())
    monkeypatch.undo()
    origin = str(run / "checkpoints/step-00000010")
    for trained, more, said in (
        (Sharded(), {"seed": 1}, "Lines: seed is 1, but 0 in the checkpoint; a stream goes on with the same only"),
        (Streamed(), {}, "is a stream, but the checkpoint's run had a ShardedStream"),
    ):
        config = Config.from_dict({**VALUES, **more})
        with pytest.raises(ConfigError, match=said):
            Trainer(trained, config, tmp_path / "fork", resume=origin, fork=True).fit()
    other = fit(tmp_path / "other", Masked())
    origin = str(other / "checkpoints/step-00000010")
    with pytest.raises(ConfigError, match="Lines is a ShardedStream, but the checkpoint is of a run without one"):
        Trainer(Sharded(), Config.from_dict(VALUES), tmp_path / "fork-2", resume=origin, fork=True).fit()


def test_a_fork_reads_on(tmp_path: Path) -> None:
    run = fit(tmp_path / "run", Sharded())
    origin = str(run / "checkpoints/step-00000005")
    config = Config.from_dict({**VALUES, "optim": {"lr": 0.01}})
    Trainer(Sharded(), config, tmp_path / "fork", resume=origin, fork=True).fit()
    assert [line["samples"] for line in lines(tmp_path / "fork")] == [line["samples"] for line in lines(run)[5:]]
    assert verify_run(tmp_path / "fork").samples == 7 * 16
