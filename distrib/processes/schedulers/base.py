"""What distrib asks of a cluster's scheduler. How to add one: docs/extending.md.

A scheduler is consulted at the start of every command, so neither this package nor a scheduler imports torch.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, NamedTuple


@dataclass(frozen=True)
class Job:
    """A job that `distrib submit` hands to a scheduler: `program train *arguments`, once for each device."""

    name: str = "distrib"
    nodes: int = 1
    gpus_per_node: int = 0
    processes_per_node: int | None = None  # one for each GPU, else 1
    time: str | None = None  # as the scheduler writes it
    grace: int = 120  # seconds between being asked to stop and being killed
    options: tuple[str, ...] = ()  # further ones of the scheduler's own, NAME=VALUE or NAME
    program: str = "distrib"  # a shell command
    arguments: tuple[str, ...] = ()  # of `distrib train`
    folder: Path = Path()  # the run folder, for the script and the log

    @property
    def tasks_per_node(self) -> int:
        return self.processes_per_node or self.gpus_per_node or 1


class Scheduler(ABC):
    """A cluster's scheduler, as the process that has the variables `environ` sees it.

    Only `name` and `detect` must be there. Override what the scheduler can do.
    """

    name: ClassVar[str]  # the name of its entry point
    title: ClassVar[str] = ""  # its name in messages, if it is written differently
    seconds_to_requeue: ClassVar[float] = 60.0  # in which `requeue` returns
    # Does SIGTERM reach a task only because the scheduler stops the job or moves the task? Then a process that has not
    # begun to train ends with exit code 75. False if SIGTERM also ends the other tasks when one of them has failed.
    sigterm_means_stop: ClassVar[bool] = False
    script_name: ClassVar[str] = "job.sh"  # in the run folder

    def __init__(self, environ: Mapping[str, str]) -> None:
        self.environ = environ

    @classmethod
    @abstractmethod
    def detect(cls, environ: Mapping[str, str]) -> bool:
        """Return whether this scheduler started the process that has these variables."""

    # A task of a job

    @property
    def job(self) -> str | None:
        """The job of which this process is a task, by the name that the scheduler's commands take; None if it is none
        (a login shell or a batch script may have the variables, too) or if the name is not known."""
        return None

    @property
    def host(self) -> str | None:
        """The scheduler's name for the machine or pod; None means the host name."""
        return None

    @property
    def cpus_per_task(self) -> int:
        """How many CPUs this task may use; 0 means that the scheduler does not say."""
        return 0

    def rank_variables(self) -> dict[str, str]:
        """Return RANK, LOCAL_RANK, WORLD_SIZE, LOCAL_WORLD_SIZE, MASTER_ADDR and MASTER_PORT of this task, as torchrun
        would set them; nothing if it trains alone. Not called if RANK is set: then a launcher inside the task set it.

        Raises LaunchError if the scheduler's own variables contradict one another."""
        return {}

    def requeue(self) -> str | None:
        """Have the scheduler start the job again. Return None if it will, else why not. Called on rank 0, when all is
        saved, if SIGUSR1 or SIGUSR2 asked the run to stop."""
        raise NotImplementedError

    @property
    def can_requeue(self) -> bool:
        return self.job is not None and type(self).requeue is not Scheduler.requeue

    # `distrib submit`

    def script(self, job: Job) -> str:
        """Return the batch script. Raises LaunchError, with the option's name, for what cannot be had."""
        raise NotImplementedError

    def submit_command(self, job: Job) -> list[str]:
        """Return the command that submits the script, which lies at `job.folder / script_name`."""
        raise NotImplementedError

    def submitted(self, job: Job, output: str) -> str:
        """Return what to tell the user: the job's number and its log. `output`: what the command printed."""
        return output.strip()

    @classmethod
    def can_submit(cls) -> bool:
        return cls.script is not Scheduler.script


class Requeue(NamedTuple):
    """Whether a job was put back into the queue, and what to tell the user."""

    done: bool
    message: str


def requeue(scheduler: Scheduler) -> Requeue:
    """Have the scheduler start this process's job again. A scheduler that raises an error costs no more than that."""
    try:
        problem = scheduler.requeue()
    except Exception as error:
        problem = f"{type(error).__name__}: {error}"
    if problem is None:
        return Requeue(True, f"job {scheduler.job} is requeued")
    return Requeue(False, f"job {scheduler.job} cannot be requeued ({problem}), submit it again")
