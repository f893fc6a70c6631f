"""SLURM: what it tells a process that srun started, how its job is requeued, and the batch script of a job.

SLURM's variables count only inside an srun step: a batch script, an interactive shell and what mpirun starts there see
them too, and are not tasks. Field by field: https://slurm.schedmd.com/srun.html
"""

import re
import subprocess
from collections.abc import Mapping

from distrib.errors import LaunchError
from distrib.processes.schedulers.base import Job, Scheduler
from distrib.processes.variables import whole_number

_OF_A_STEP = (
    "SLURM_JOB_ID",
    "SLURM_STEP_ID",
    "SLURM_NODEID",
    "SLURM_LOCALID",
    "SLURM_STEP_TASKS_PER_NODE",
    "SLURM_STEP_NODELIST",
)
_UNDISTURBED = ("sh", "-c", "trap '' TERM INT HUP USR1 USR2; exec \"$@\"", "sh")  # runs what follows, which inherits it
_FIRST_PORT, _PORTS = 12_000, 18_000  # below those that systems hand out by themselves
_SCRIPT = """\
#!/bin/bash
{options}

# From being asked to stop to being killed, in seconds; --signal says the same.
export DISTRIB_GRACE={grace}
# Who joins must know this secret of the job, which srun hands to its tasks.
export DISTRIB_RENDEZVOUS_KEY=$(od -An -N16 -tx1 /dev/urandom | tr -d ' \\n')
# One task for each device, with what is exported here. When one fails, the others are ended too.
exec srun --export=ALL --kill-on-bad-exit=1 ${{SLURM_CPUS_PER_TASK:+--cpus-per-task=$SLURM_CPUS_PER_TASK}} \\
    {program} train "$@"
"""


class Slurm(Scheduler):
    """One process of a SLURM job, or a login node from which jobs are submitted."""

    name = "slurm"
    title = "SLURM"
    seconds_to_requeue = 60.0  # in which no other task may end, or srun would end rank 0 in the middle of it
    sigterm_means_stop = False  # srun also sends it to the other tasks when one has failed
    script_name = "job.sbatch"

    @classmethod
    def detect(cls, environ: Mapping[str, str]) -> bool:
        return any(name in environ for name in ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURMD_NODENAME"))

    @property
    def job(self) -> str | None:
        """Also of a step with one task.

        A task of an array is ARRAY_TASK: the last one to start has the number of the whole array as its SLURM_JOB_ID.
        A heterogeneous job is named by its first component.
        """
        environ = self.environ
        if "SLURM_STEP_ID" not in environ or "SLURM_PROCID" not in environ:
            return None
        if "SLURM_ARRAY_JOB_ID" in environ and "SLURM_ARRAY_TASK_ID" in environ:
            return f"{environ['SLURM_ARRAY_JOB_ID']}_{environ['SLURM_ARRAY_TASK_ID']}"
        return environ.get("SLURM_JOB_ID_HET_GROUP_0") or environ.get("SLURM_JOB_ID")

    @property
    def host(self) -> str | None:
        return self.environ.get("SLURMD_NODENAME")

    @property
    def cpus_per_task(self) -> int:
        return whole_number(self.environ, "SLURM_CPUS_PER_TASK")

    def rank_variables(self) -> dict[str, str]:
        """Empty outside an srun step of several tasks."""
        environ = self.environ
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
            "RANK": environ["SLURM_PROCID"],
            "LOCAL_RANK": "0" if sees_one_gpu else environ["SLURM_LOCALID"],  # which of the devices that it sees
            "WORLD_SIZE": environ["SLURM_STEP_NUM_TASKS"],
            "LOCAL_WORLD_SIZE": str(local_world_size),
            "MASTER_ADDR": environ.get("MASTER_ADDR", first_host(environ["SLURM_STEP_NODELIST"])),
            "MASTER_PORT": environ.get("MASTER_PORT", str(_FIRST_PORT + own % _PORTS)),
        }

    def requeue(self) -> str | None:
        """End this job and have SLURM start it again.

        As soon as slurmctld accepts this, SLURM sends SIGTERM to all processes of the tasks, also to scontrol. It would
        die before it has the answer, and a requeued job would count as refused; so scontrol ignores the signals that
        stop a job.
        """
        command = [*_UNDISTURBED, "scontrol", "requeue", str(self.job)]
        try:
            result = subprocess.run(command, capture_output=True, text=True, timeout=self.seconds_to_requeue)
        except (OSError, subprocess.TimeoutExpired) as error:
            return str(error)
        return None if result.returncode == 0 else result.stderr.strip() or f"exit code {result.returncode}"

    def script(self, job: Job) -> str:
        """The script takes what `distrib train` takes."""
        _check(job)
        options = {
            "job-name": job.name,
            "nodes": job.nodes,
            "ntasks-per-node": job.tasks_per_node,
            "gpus-per-node": job.gpus_per_node or None,
            "time": job.time,
            "signal": f"USR1@{job.grace}",
            "requeue": "",
            "open-mode": "append",
            "output": _log(job),
        }
        lines = [f"{name}={value}" if value != "" else name for name, value in options.items() if value is not None]
        return _SCRIPT.format(
            options="\n".join(f"#SBATCH --{_quoted(line)}" for line in [*lines, *job.options]),
            grace=job.grace,
            program=job.program,
        )

    def submit_command(self, job: Job) -> list[str]:
        return ["sbatch", "--parsable", str(job.folder / self.script_name), *job.arguments]

    def submitted(self, job: Job, output: str) -> str:
        number = output.strip().partition(";")[0]
        return f"job {number}, its log: {_log(job).replace('%j', number)}"


def first_host(nodelist: str) -> str:
    """Return the first host of a list: of `gpu[003-007,9]-a,login1` gpu003-a, where SLURM starts task 0."""
    first = re.match(r"(?:[^,\[]|\[[^\]]*\])+", nodelist)
    return re.sub(r"\[(\w+)[^\]]*\]", r"\1", first.group()) if first else nodelist


def tasks_per_node(described: str) -> list[int]:
    """Return the number of tasks on each node: of `4(x2),3` these are 4, 4, 3."""
    tasks: list[int] = []
    for part in described.split(","):
        number, _, times = part.partition("(x")
        tasks += [int(number)] * int(times.rstrip(")") or 1)
    return tasks


def seconds_of(time: str) -> int:
    """Return the seconds of a time as SLURM reads it: MINUTES[:SECONDS], HOURS:MINUTES:SECONDS,
    DAYS-HOURS[:MINUTES[:SECONDS]]. Raises LaunchError."""
    if not re.fullmatch(r"\d+(:\d+){0,2}|\d+-\d+(:\d+){0,2}", time):
        raise LaunchError(f"--time: {time!r}, give MINUTES, HOURS:MINUTES:SECONDS or DAYS-HOURS")
    days, dash, rest = time.rpartition("-")
    parts = [int(part) for part in rest.split(":")]
    if not dash and len(parts) < 3:  # no hours
        parts = [0, *parts]
    hours, minutes, seconds = (*parts, 0, 0)[:3]
    return ((int(days or 0) * 24 + hours) * 60 + minutes) * 60 + seconds


def _check(job: Job) -> None:
    """Raises LaunchError."""
    if job.time is not None and seconds_of(job.time) <= job.grace + 60:
        raise LaunchError(
            f"--time: {job.time}, of which --grace takes {job.grace} s and SLURM's clock up to 60 s, so that the "
            "job would be stopped as soon as it begins; give more, or less grace"
        )
    for option in job.options:
        if not re.fullmatch(r"[a-z][a-z-]*(=[^\n\"']*)?", option):
            raise LaunchError(f"--slurm: {option!r}, give an option of sbatch's without its dashes: partition=long")
        if option.partition("=")[0] == "array":
            raise LaunchError(
                f"--slurm: {option!r}, but all tasks of the array would train in one run folder; submit an array "
                "of runs by sbatch --array=… slurm/sweep.sbatch"
            )
    if "\n" in _log(job) or '"' in _log(job):
        raise LaunchError(f"--run-dir: {job.folder}: SLURM cannot write a log there; choose a simpler name")


def _log(job: Job) -> str:
    return str(job.folder / "slurm-%j.log")


def _quoted(option: str) -> str:
    name, equals, value = option.partition("=")
    return f'{name}{equals}"{value}"' if re.search(r"[\s#]", value) else option
