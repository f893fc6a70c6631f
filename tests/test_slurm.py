"""How a rank reads SLURM's variables; tests/slurm/ uses a real cluster."""

from hypothesis import given
from hypothesis import strategies as st

from distrib import World
from distrib.processes.schedulers.slurm import Slurm, first_host, tasks_per_node

STEP = {
    "SLURM_JOB_ID": "17",
    "SLURM_STEP_ID": "0",
    "SLURM_PROCID": "5",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "1",
    "SLURM_STEP_NUM_TASKS": "7",
    "SLURM_STEP_TASKS_PER_NODE": "4,3",
    "SLURM_STEP_NODELIST": "n[1-2]",
    "SLURMD_NODENAME": "n2",
}


def test_a_task_of_an_srun_step_is_a_rank() -> None:
    world = World.detect(STEP)
    assert (world.rank, world.local_rank, world.world_size, world.local_world_size) == (5, 1, 7, 3)
    assert (world.launcher, world.host, world.job) == ("slurm", "n2", "17")


def test_a_launcher_started_by_srun_takes_precedence() -> None:
    """For example torchrun or distrib launch, started by srun on each node."""
    torchrun = {"RANK": "1", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "n1", "MASTER_PORT": "29500"}
    world = World.detect({**STEP, **torchrun})
    assert (world.rank, world.world_size, world.launcher) == (1, 2, "torchrun")


def test_a_number_of_processes_without_a_rank_is_no_launcher() -> None:
    """WORLD_SIZE may be left from elsewhere; RANK alone says that another launcher started the process."""
    world = World.detect({**STEP, "WORLD_SIZE": "9"})
    assert (world.rank, world.world_size, world.launcher) == (5, 7, "slurm")


def test_a_batch_script_or_a_single_task_is_no_rank() -> None:
    batch = {key: value for key, value in STEP.items() if "STEP" not in key}  # the batch script itself
    batch["SLURM_NTASKS"] = "7"
    assert World.detect(batch).world_size == 1
    alone = {**STEP, "SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"}  # srun --pty bash, too
    assert World.detect(alone).world_size == 1


def test_a_task_that_sees_one_gpu_takes_that() -> None:
    assert World.detect({**STEP, "SLURM_GPUS_PER_TASK": "1"}).local_rank == 0
    assert World.detect({**STEP, "SLURM_GPUS_PER_TASK": "a100:1"}).local_rank == 0


def test_job_ids_of_jobs_and_arrays() -> None:
    """Job 17 is also the id of the array, because this task was the last to start."""
    assert Slurm({**STEP, "SLURM_ARRAY_JOB_ID": "17", "SLURM_ARRAY_TASK_ID": "4"}).job == "17_4"
    assert Slurm({**STEP, "SLURM_JOB_ID": "18", "SLURM_JOB_ID_HET_GROUP_0": "17"}).job == "17"
    assert Slurm({"SLURM_JOB_ID": "17"}).job is None


def test_steps_on_one_node_use_different_ports() -> None:
    ports = {Slurm({**STEP, "SLURM_JOB_ID": str(job)}).rank_variables()["MASTER_PORT"] for job in range(1000)}
    assert len(ports) == 1000


names = st.from_regex(r"[a-z][a-z0-9-]{0,5}[a-z]", fullmatch=True)
numbers = st.tuples(st.integers(0, 99), st.integers(0, 99)).map(sorted)


@given(names, numbers, st.integers(1, 3), st.sampled_from(["", "-ib"]), st.lists(names, max_size=2))
def test_the_first_of_a_node_list(name: str, span: list[int], width: int, suffix: str, others: list[str]) -> None:
    first, last = (f"{number:0{width}d}" for number in span)
    rest = "".join(f",{other}[1-3]" for other in others)
    assert first_host(f"{name}[{first}-{last},200]{suffix}{rest}") == f"{name}{first}{suffix}"
    assert first_host(f"{name}{rest}") == name


@given(st.lists(st.tuples(st.integers(1, 9), st.integers(1, 5)), min_size=1, max_size=4))
def test_tasks_on_each_node(groups: list[tuple[int, int]]) -> None:
    described = ",".join(f"{tasks}(x{nodes})" if nodes > 1 else str(tasks) for tasks, nodes in groups)
    assert tasks_per_node(described) == [tasks for tasks, nodes in groups for _ in range(nodes)]
