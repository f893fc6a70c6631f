"""Detection is a predicate over the environment; tests/distributed/test_launchers.py has the real launchers."""

import pytest

from distrib import World
from distrib.errors import LaunchError

JOINED = {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}


def test_alone() -> None:
    world = World.detect({})
    assert (world.rank, world.world_size, world.launcher, world.is_rank_0) == (0, 1, "plain", True)


@pytest.mark.parametrize(
    ("more", "launcher"),
    [
        ({}, "torchrun"),
        ({"ACCELERATE_MIXED_PRECISION": "no"}, "accelerate"),
        ({"DISTRIB_LAUNCHER": "distrib"}, "distrib"),
    ],
)
def test_a_member(more: dict[str, str], launcher: str) -> None:
    world = World.detect({**JOINED, **more})
    assert (world.rank, world.local_rank, world.world_size, world.launcher) == (1, 1, 2, launcher)
    assert not world.is_rank_0


@pytest.mark.parametrize(
    ("told", "asked"),
    [
        ({"ACCELERATE_MIXED_PRECISION": "no"}, {}),
        (
            {"ACCELERATE_MIXED_PRECISION": "bf16", "ACCELERATE_USE_DEEPSPEED": "true"},
            {"train.mixed_precision": "bf16", "strategy.name": "zero2"},
        ),
        ({"ACCELERATE_USE_MEGATRON_LM": "true"}, {"strategy.name": "megatron_lm"}),
        ({"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "1"}, {"strategy.name": "fsdp1"}),
        ({"FSDP_VERSION": "2", "FSDP_OFFLOAD_PARAMS": "true"}, {}),  # left from elsewhere: FSDP was not asked for
    ],
)
def test_what_accelerate_was_told_is_known(told: dict[str, str], asked: dict[str, str]) -> None:
    assert World.detect({**JOINED, **told}).asked == asked


@pytest.mark.parametrize(
    ("environ", "parts"),
    [
        ({"ACCELERATE_MIXED_PRECISION": "no", "MASTER_PORT": "29500"}, ["accelerate launch", "started one"]),
        ({"OMPI_COMM_WORLD_SIZE": "3"}, ["mpirun started 3 processes"]),
        ({"WORLD_SIZE": "2"}, ["WORLD_SIZE but not RANK, LOCAL_RANK"]),
        ({**JOINED, "RANK": "2"}, ["RANK=2", "0..1"]),
        ({**JOINED, "RANK": "x"}, ["RANK='x' is not a number"]),
        ({key: value for key, value in JOINED.items() if key != "MASTER_PORT"}, ["but not MASTER_PORT"]),
    ],
)
def test_processes_that_would_train_alone_are_refused(environ: dict[str, str], parts: list[str]) -> None:
    with pytest.raises(LaunchError) as error:
        World.detect(environ)
    assert [part for part in parts if part not in str(error.value)] == []


def test_one_srun_task_is_no_world() -> None:
    assert World.detect({"SLURM_STEP_NUM_TASKS": "1"}).world_size == 1
