"""Detection of the launcher from environment variables; tests/distributed/test_launchers.py uses the real launchers."""

import os

import pytest

from distrib import World
from distrib.errors import LaunchError
from distrib.processes.exit import without_local_rank

JOINED = {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}


def test_without_a_launcher() -> None:
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
def test_a_rank_of_each_launcher(more: dict[str, str], launcher: str) -> None:
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
        ({"FSDP_VERSION": "2", "FSDP_OFFLOAD_PARAMS": "true"}, {}),  # ignored, because FSDP is not enabled
    ],
)
def test_the_configuration_of_accelerate_launch_is_read(told: dict[str, str], asked: dict[str, str]) -> None:
    assert World.detect({**JOINED, **told}).asked == asked


@pytest.mark.parametrize(
    ("environ", "parts"),
    [
        ({"ACCELERATE_MIXED_PRECISION": "no", "MASTER_PORT": "29500"}, ["accelerate launch", "started one"]),
        ({"OMPI_COMM_WORLD_SIZE": "3"}, ["mpirun started 3 processes"]),
        ({"WORLD_SIZE": "2"}, ["WORLD_SIZE but not RANK, MASTER_ADDR, MASTER_PORT"]),
        ({**JOINED, "RANK": "2"}, ["RANK=2", "0..1"]),
        ({**JOINED, "RANK": "x"}, ["RANK='x' is not a whole number"]),
        ({**JOINED, "RANK": "-1"}, ["RANK='-1' is not a whole number"]),
        ({**JOINED, "LOCAL_RANK": ""}, ["LOCAL_RANK='' is not a whole number"]),
        ({**JOINED, "MASTER_PORT": "70000"}, ["MASTER_PORT=70000, ports are 1 to 65535"]),
        ({"LOCAL_RANK": "0"}, ["set LOCAL_RANK but not RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT"]),
        ({"MV2_COMM_WORLD_SIZE": "2", "MV2_COMM_WORLD_RANK": "0"}, ["mpirun started 2 processes (MV2_COMM_WORLD"]),
        ({"OMPI_COMM_WORLD_SIZE": "x"}, ["OMPI_COMM_WORLD_SIZE='x' is not a whole number"]),
        ({"OMP_NUM_THREADS": "2,1"}, ["OMP_NUM_THREADS='2,1' is not a whole number"]),
        ({"OMP_NUM_THREADS": ""}, ["OMP_NUM_THREADS='' is not a whole number"]),
        ({"OMP_NUM_THREADS": "0"}, ["OMP_NUM_THREADS=0, give 1 or more"]),
        ({"DISTRIB_GRACE": "soon"}, ["DISTRIB_GRACE='soon' is not a number of seconds"]),
        ({"SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "0"}, ["srun set SLURM_PROCID but not SLURM_JOB_ID"]),
        ({"SLURM_STEP_NUM_TASKS": "two"}, ["SLURM_STEP_NUM_TASKS='two' is not a whole number"]),
        ({**JOINED, "ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_GRADIENT_CLIPPING": "x"}, ["is not a number"]),
        ({key: value for key, value in JOINED.items() if key != "MASTER_PORT"}, ["but not MASTER_PORT"]),
    ],
)
def test_processes_that_would_train_alone_are_refused(environ: dict[str, str], parts: list[str]) -> None:
    with pytest.raises(LaunchError) as error:
        World.detect(environ)
    assert [part for part in parts if part not in str(error.value)] == []


def test_without_a_local_rank_it_is_the_only_process_of_its_machine() -> None:
    """As in Kubeflow's PyTorchJob."""
    world = World.detect({key: value for key, value in JOINED.items() if key != "LOCAL_RANK"})
    assert (world.rank, world.local_rank, world.world_size, world.local_world_size) == (1, 0, 2, 1)
    with pytest.raises(LaunchError, match="but not LOCAL_RANK"):
        World.detect({**{key: value for key, value in JOINED.items() if key != "LOCAL_RANK"}, "LOCAL_WORLD_SIZE": "2"})


def test_a_local_rank_before_the_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    """As torch.distributed.launch and deepspeed pass it."""
    monkeypatch.setenv("LOCAL_RANK", "7")
    monkeypatch.delenv("LOCAL_RANK")
    assert without_local_rank(["--local_rank=1", "train", "a.yaml"]) == ["train", "a.yaml"]
    assert os.environ["LOCAL_RANK"] == "1"
    assert without_local_rank(["--local-rank=0", "train"]) == ["train"]
    assert os.environ["LOCAL_RANK"] == "1"
    assert without_local_rank(["train", "--local_rank=1"]) == ["train", "--local_rank=1"]
    assert without_local_rank([]) == []


def test_a_single_srun_task_is_one_process() -> None:
    assert World.detect({"SLURM_STEP_NUM_TASKS": "1"}).world_size == 1
