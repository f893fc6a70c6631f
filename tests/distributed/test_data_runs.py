"""Runs whose samples are collated by the task, drawn by weights and so on: equal to a plain loop under every strategy
on 1, 2 and 4 processes."""

from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, Run, check, check_same, interrupted, lines, losses, no_process_left, starter
from data_runs import EVERY, STEPS, STRATEGIES, TASKS, WORKERS, values
from data_tasks import Ragged, padded_loss, samples_of_shards
from tasks import Masked
from torch.nn import functional as F

from distrib import Config
from distrib.data.order import Order
from distrib.run_folder.verify import verify_run
from distrib.training import build

pytestmark = [pytest.mark.timeout(900), pytest.mark.xdist_group("data-runs")]
WORLDS = (1, 2, 4)
TOLERANCE = 1e-5  # see test_parity


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[int], Path]]:
    """The folder of what data_runs.py did on so many processes, started when first asked for."""
    with no_process_left() as mark:

        @cache
        def folder_of(processes: int) -> Path:
            folder = tmp_path_factory.mktemp(f"data-{processes}-")
            program = ROOT / "tests" / "distributed" / "data_runs.py"
            command = ("distrib", "launch", "--processes", processes, program, folder)
            extensions = str(folder / "extensions")
            check(starter(mark, folder)(*command, timeout=800, fresh=True, TORCH_EXTENSIONS_DIR=extensions))
            return folder

        yield folder_of


def positions_of(step: int) -> "np.ndarray":
    return np.arange(step * 16, (step + 1) * 16, dtype=np.uint64)


def order_of(task: str) -> Order | None:
    """Return the order of the task's samples, made in this process; None for a stream."""
    config = Config.from_dict(values(task))
    return build.train_dataset(build.task(config), config)[1]


@cache
def plain_losses(task: str) -> list[float]:
    """Train with a plain PyTorch loop in one process, which takes the whole global batch at once. Only the data order
    is distrib's."""
    torch.manual_seed(7)
    model = Masked().model()
    update = torch.optim.SGD(model.parameters(), lr=0.5)
    found, order, samples = [], order_of(task), Masked().train_dataset()
    ragged = Ragged().train_dataset()
    lanes = samples_of_shards(7, 4, 9)
    for step in range(STEPS):
        if order is None:
            indices = [next(lane) for lane in lanes for _ in range(4)]
        else:
            indices = order.indices(positions_of(step)).tolist()
        if task == "ragged":
            loss = padded_loss(model, [ragged[index] for index in indices])
        else:
            tokens, targets = samples[indices]
            loss = F.cross_entropy(model(tokens).flatten(0, 1), targets.flatten(), ignore_index=-100)
        update.zero_grad()
        loss.backward()
        update.step()
        found.append(loss.item())
    return found


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("processes", WORLDS)
def test_every_step_of_every_strategy_equals_the_plain_loops(
    made: Callable[[int], Path], processes: int, task: str
) -> None:
    for strategy in STRATEGIES[task]:
        run = made(processes) / f"{task}-{strategy}"
        np.testing.assert_allclose(losses(run), plain_losses(task), rtol=TOLERANCE, err_msg=strategy)
        assert {line["verdict"] for line in lines(run)} == {"applied"}
        assert [line["samples"] for line in lines(run)] == [line["samples"] for line in lines(made(1) / f"{task}-auto")]
        assert verify_run(run, order_of(task)).samples == STEPS * 16


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("processes", WORLDS)
def test_a_resume_on_the_same_number_of_processes_has_the_same_bits(
    made: Callable[[int], Path], processes: int, task: str
) -> None:
    check_same(made(processes) / f"{task}-resumed", made(processes) / f"{task}-auto")


@pytest.mark.parametrize("task", TASKS)
def test_a_run_goes_on_with_other_numbers_of_processes(
    made: Callable[[int], Path], run: Run, tmp_path: Path, task: str
) -> None:
    undisturbed = made(4) / f"{task}-auto"
    before = undisturbed
    for processes, after in ((2, EVERY), (1, 2 * EVERY)):
        folder = interrupted(before, tmp_path / f"on-{processes}", after)
        check(run("distrib", "launch", "--processes", processes, folder / "config.yaml", "--run-dir", folder))
        np.testing.assert_allclose(losses(folder), losses(undisturbed), rtol=TOLERANCE)
        assert [line["samples"] for line in lines(folder)] == [line["samples"] for line in lines(undisturbed)]
        assert verify_run(folder).steps == STEPS
        before = folder


def test_collated_samples_are_evaluated_in_dataset_order(made: Callable[[int], Path]) -> None:
    """Ragged.metrics checks names and lengths of all rows. 97 samples in batches of 4: the last batch has one."""
    metrics = [lines(made(processes) / "ragged-auto", "evals.jsonl")[-1] for processes in WORLDS]
    assert {line["count"] for line in metrics} == {97}
    sums = [line["metrics"]["eval/sum"] for line in metrics]
    assert sums[0] == sums[1] == sums[2]


@pytest.mark.parametrize("processes", WORLDS)
def test_workers_change_nothing_of_a_sharded_stream(made: Callable[[int], Path], processes: int) -> None:
    check_same(made(processes) / WORKERS, made(processes) / "sharded-auto")
