"""What SLURM tells a process that srun started, and how its job is put back into the queue.

SLURM's variables count only inside an srun step: a batch script, an interactive shell and what mpirun starts there see
them too, and are no members of anything. Field by field: https://slurm.schedmd.com/srun.html
"""

import re
import subprocess
from collections.abc import Mapping

from distrib.errors import LaunchError
from distrib.processes.variables import whole_number

SECONDS_TO_REQUEUE = 60.0  # in which no other task may end, or srun would end rank 0 in the middle of it
_OF_A_STEP = (
    "SLURM_JOB_ID",
    "SLURM_STEP_ID",
    "SLURM_NODEID",
    "SLURM_LOCALID",
    "SLURM_STEP_TASKS_PER_NODE",
    "SLURM_STEP_NODELIST",
)
_FIRST_PORT, _PORTS = 12_000, 18_000  # below those that systems hand out by themselves


def as_member(environ: Mapping[str, str]) -> dict[str, str]:
    """RANK, WORLD_SIZE and the rest, as torchrun would have set them; empty outside an srun step of several tasks."""
    if whole_number(environ, "SLURM_STEP_NUM_TASKS", 1) <= 1 or "SLURM_PROCID" not in environ:
        return {}
    if missing := [name for name in _OF_A_STEP if name not in environ]:
        raise LaunchError(f"srun set SLURM_PROCID but not {', '.join(missing)}; start with srun, or unset it")
    job, step, node = (whole_number(environ, name) for name in ("SLURM_JOB_ID", "SLURM_STEP_ID", "SLURM_NODEID"))
    described = environ["SLURM_STEP_TASKS_PER_NODE"]
    try:
        local_world_size = tasks_per_node(described)[node]
    except (ValueError, IndexError):
        raise LaunchError(f"SLURM_STEP_TASKS_PER_NODE={described!r} does not describe node {node}") from None
    # Unlike for other steps and jobs that share the node; the same for all tasks of this one.
    own = job * 31 + step
    sees_one_gpu = environ.get("SLURM_GPUS_PER_TASK", "").rpartition(":")[2] == "1"
    return {
        "DISTRIB_LAUNCHER": "slurm",
        "RANK": environ["SLURM_PROCID"],
        "LOCAL_RANK": "0" if sees_one_gpu else environ["SLURM_LOCALID"],  # which of the devices that it sees
        "WORLD_SIZE": environ["SLURM_STEP_NUM_TASKS"],
        "LOCAL_WORLD_SIZE": str(local_world_size),
        "MASTER_ADDR": environ.get("MASTER_ADDR", first_host(environ["SLURM_STEP_NODELIST"])),
        "MASTER_PORT": environ.get("MASTER_PORT", str(_FIRST_PORT + own % _PORTS)),
    }


def in_job(environ: Mapping[str, str]) -> str | None:
    """The job whose srun step this is, also of a step with one task, by the name that SLURM's commands take.

    A task of an array is ARRAY_TASK: the last one to start has the number of the whole array as its SLURM_JOB_ID. Of a
    heterogeneous job it is the first component, which stands for all.
    """
    if "SLURM_STEP_ID" not in environ or "SLURM_PROCID" not in environ:
        return None
    if "SLURM_ARRAY_JOB_ID" in environ and "SLURM_ARRAY_TASK_ID" in environ:
        return f"{environ['SLURM_ARRAY_JOB_ID']}_{environ['SLURM_ARRAY_TASK_ID']}"
    return environ.get("SLURM_JOB_ID_HET_GROUP_0") or environ.get("SLURM_JOB_ID")


def first_host(nodelist: str) -> str:
    """Of a list such as `gpu[003-007,9]-a,login1`, here gpu003-a: where SLURM starts task 0."""
    first = re.match(r"(?:[^,\[]|\[[^\]]*\])+", nodelist)
    return re.sub(r"\[(\w+)[^\]]*\]", r"\1", first.group()) if first else nodelist


def tasks_per_node(described: str) -> list[int]:
    """Of a description such as `4(x2),3`: 4, 4, 3."""
    tasks: list[int] = []
    for part in described.split(","):
        number, _, times = part.partition("(x")
        tasks += [int(number)] * int(times.rstrip(")") or 1)
    return tasks


def requeue(job: str) -> str:
    """Have SLURM start the job again, which ends this one; returns what to tell the user."""
    try:
        result = subprocess.run(
            ["scontrol", "requeue", job], capture_output=True, text=True, timeout=SECONDS_TO_REQUEUE
        )
        problem = "" if result.returncode == 0 else result.stderr.strip() or f"exit code {result.returncode}"
    except (OSError, subprocess.TimeoutExpired) as error:
        problem = str(error)
    return f"job {job} cannot be requeued ({problem}), submit it again" if problem else f"job {job} is requeued"
