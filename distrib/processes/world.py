"""Who this process is among the others. With schedulers/ and accelerate_launch.py this alone reads launcher variables.

A launcher that starts fewer processes than it was asked for, or another strategy, is found out here: that is the
most common silent failure in this field (see docs/launchers.md).
"""

import atexit
import os
import socket
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from distrib.errors import DistribError, LaunchError
from distrib.processes import tuning, variables
from distrib.processes.accelerate_launch import what_accelerate_was_told
from distrib.processes.heartbeat import Heartbeat, enter, joined
from distrib.processes.network import LOOPBACK, interface_of, own_address
from distrib.processes.schedulers import registry
from distrib.processes.schedulers.base import Scheduler
from distrib.processes.variables import check_threads, seconds, whole_number
from distrib.processes.versions import versions

T = TypeVar("T")

# Control and background group by timeout, for all runs of a process: the threads of each wake up 100 times a second.
_groups: dict[float, tuple[dist.ProcessGroup, dist.ProcessGroup]] = {}

_REQUIRED = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_SECONDS_TO_COME = 300.0


@dataclass
class World:
    """One process among `world_size`. `detect` reads who we are; `connect` joins the others."""

    rank: int = 0
    local_rank: int = 0
    world_size: int = 1
    local_world_size: int = 1
    one_a_host: bool = False  # as no LOCAL_RANK was given
    launcher: str = "plain"  # plain | distrib | torchrun | accelerate | a scheduler's name
    host: str = field(default_factory=socket.gethostname)
    scheduler: Scheduler | None = None
    grace: float | None = None  # seconds between being asked to stop and being killed, where the launcher said so
    seconds_to_come: float = _SECONDS_TO_COME  # for all ranks to be there
    asked: dict[str, Any] = field(default_factory=dict)  # what accelerate launch was told, by our config's keys
    use_cpu: bool = True
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    control: dist.ProcessGroup | None = None  # gloo on CPU memory, whatever carries the gradients
    background: dist.ProcessGroup | None = None  # another one, for the thread that saves
    presence: Heartbeat | None = None

    @classmethod
    def detect(cls, environ: Mapping[str, str] | None = None) -> "World":
        """Read the launcher's variables, by default this process's.

        Raises LaunchError if they tell of processes that are not there.
        """
        scheduler = registry.of_this_process() if environ is None else registry.detect(environ)
        environ = variables.from_outside() if environ is None else environ
        environ = {**environ, **registry.rank_variables(scheduler, environ)}
        by_accelerate = "ACCELERATE_MIXED_PRECISION" in environ
        common: dict[str, Any] = {
            "host": (scheduler and scheduler.host) or socket.gethostname(),
            "scheduler": scheduler,
            "grace": seconds(environ, "DISTRIB_GRACE", None),
            "seconds_to_come": seconds(environ, "DISTRIB_JOIN_TIMEOUT", _SECONDS_TO_COME),
            "asked": what_accelerate_was_told(environ),
            "use_cpu": _cpu_only(environ),
        }
        check_threads(environ)
        if not {"RANK", "LOCAL_RANK", "WORLD_SIZE"} & environ.keys():
            _refuse_lone_process(environ, by_accelerate)
            return cls(launcher="accelerate" if by_accelerate else "plain", **common)
        # Some launchers start one process on each machine and set no LOCAL_RANK (Kubeflow's PyTorchJob).
        one_a_host = "LOCAL_RANK" not in environ and environ.get("LOCAL_WORLD_SIZE", "1") == "1"
        required = _REQUIRED if one_a_host else (*_REQUIRED, "LOCAL_RANK")
        if missing := [name for name in required if name not in environ]:
            given = [name for name in (*_REQUIRED, "LOCAL_RANK") if name in environ]
            raise LaunchError(
                f"the launcher set {', '.join(given)} but not {', '.join(missing)}; start with distrib launch, "
                "torchrun or accelerate launch, or set all of them"
            )
        rank, world_size = whole_number(environ, "RANK"), whole_number(environ, "WORLD_SIZE")
        if not 0 <= rank < world_size:
            raise LaunchError(f"RANK={rank} does not lie in 0..{world_size - 1} (WORLD_SIZE={world_size})")
        if not 0 < whole_number(environ, "MASTER_PORT") < 65536:
            raise LaunchError(f"MASTER_PORT={environ['MASTER_PORT']}, ports are 1 to 65535")
        world = cls(
            rank=rank,
            local_rank=whole_number(environ, "LOCAL_RANK"),
            world_size=world_size,
            local_world_size=whole_number(environ, "LOCAL_WORLD_SIZE", 1 if one_a_host else world_size),
            one_a_host=one_a_host,
            launcher=environ.get("DISTRIB_LAUNCHER")
            or ("accelerate" if by_accelerate else scheduler.name if scheduler and one_a_host else "torchrun"),
            **common,
        )
        if not world.use_cpu and world.local_rank >= torch.accelerator.device_count():
            raise LaunchError(
                f"{world.local_world_size} processes on this machine, but it has "
                f"{torch.accelerator.device_count()} accelerator(s); start one process for each"
            )
        return world

    @property
    def is_rank_0(self) -> bool:
        return self.rank == 0

    @property
    def name(self) -> str:
        return f"rank {self.rank} of {self.world_size} on {self.host}"

    @property
    def job(self) -> str | None:
        """The scheduler's job of which this process is a task."""
        return None if self.scheduler is None else self.scheduler.job

    @property
    def hosts(self) -> list[str]:
        """Of each rank, in rank order."""
        return [self.host] if self.presence is None else [one["host"] for one in self.presence.everyone]

    def connect(self, timeout: float = 1800.0) -> None:
        """Join the other processes and find our device. `timeout`: of collectives, in seconds.

        Raises LaunchError where fewer came than were asked for, or some have other versions of the libraries.
        """
        if self.control is not None:  # joined already, for Task.prepare
            return
        from accelerate import PartialState

        if "OMP_NUM_THREADS" not in os.environ:  # or accelerate sets it for the cores of one process, with a warning
            cpus = self.scheduler.cpus_per_task if self.scheduler is not None else 0
            threads = cpus or tuning.threads(self.local_world_size)
            os.environ["OMP_NUM_THREADS"] = str(threads)
            torch.set_num_threads(threads)
        if self.use_cpu:
            tuning.keep_freed_memory()
            if self.world_size > 1:
                tuning.run_as_batch()
        if self.world_size > 1:
            os.environ.update(registry.rank_variables(self.scheduler, os.environ))  # for a script of the user's
            if self.one_a_host:
                # or accelerate does not see the others
                os.environ.update(LOCAL_RANK="0", LOCAL_WORLD_SIZE="1", DISTRIB_LAUNCHER=self.launcher)
            self._join()
        state = PartialState(cpu=self.use_cpu, timeout=timedelta(seconds=timeout))
        if state.num_processes != self.world_size:
            raise LaunchError(
                f"{self.launcher} asked for {self.world_size} processes, but each would have trained in a world of "
                f"{state.num_processes}; nothing was started"
            )
        self.device = state.device
        if self.world_size > 1:
            if timeout not in _groups:
                one, other = (dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout)) for _ in range(2))
                _groups[timeout] = one, other
            self.control, self.background = _groups[timeout]
            if self.presence is not None:
                self.presence.watch()  # only now: in a script of several runs a rank may come here long after another
            atexit.register(_leave)

    def _join(self) -> None:
        self.presence = joined()
        if self.presence is None:
            host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
            one_machine = os.environ.get("LOCAL_WORLD_SIZE") == str(self.world_size)
            # By itself gloo listens on the address of our host name: others reach it where they should not, or where
            # they should they do not (127.0.1.1).
            # A pod's name may become known some time after the pod has started.
            patience = 0.0 if self.scheduler is None else self.seconds_to_come
            interface = interface_of(LOOPBACK if one_machine else own_address(host, port, patience))
            if interface is not None:
                os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
            self.presence = enter(host, port, self.rank, self.world_size, self.host, self.seconds_to_come, one_machine)
        self.presence.join(versions(), self.seconds_to_come, self.one_a_host)

    def require_group(self) -> None:
        """A process group where there is none because we are alone: DeepSpeed and FSDP2 need one."""
        if not dist.is_initialized():
            backend = dist.get_default_backend_for_device(self.device)
            dist.init_process_group(backend, rank=0, world_size=1, store=dist.HashStore())  # type: ignore[attr-defined]
            atexit.register(_leave)

    def on_rank_0(self, work: Callable[[], T], group: dist.ProcessGroup | None = None) -> T:
        """Run `work` on rank 0 alone and give its result to every rank. A DistribError is raised on all of them.

        Over the control group, unless another is given.
        """
        if self.control is None:
            return work()
        outcome: list[Any] = [None]
        if self.is_rank_0:
            try:
                outcome = [work()]
            except DistribError as error:
                outcome = [error]
        dist.broadcast_object_list(outcome, src=0, group=group or self.control)
        if isinstance(outcome[0], DistribError):
            raise outcome[0]
        return outcome[0]  # type: ignore[no-any-return]

    def all_gather_object(self, value: T) -> list[T]:
        """Every rank's value, in rank order, on every rank."""
        if self.control is None:
            return [value]
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value, group=self.control)
        return values

    def gather_rows(self, rows: dict[str, Tensor | list[Any]]) -> dict[str, list[Any]]:
        """Every rank's rows on rank 0: for each name its parts in rank order. Nothing on the other ranks.

        Rows are a CPU tensor, or a list of anything that can be pickled; a rank without samples may give {}.
        """
        if self.control is None:
            return {key: [value] for key, value in rows.items()}
        described: dict[str, Any] = {
            key: (value.dtype, tuple(value.shape)) if isinstance(value, Tensor) else value
            for key, value in rows.items()
        }
        everyone: list[Any] = [None] * self.world_size
        dist.gather_object(described, everyone if self.is_rank_0 else None, dst=0, group=self.control)
        if not self.is_rank_0:
            for value in rows.values():
                if isinstance(value, Tensor) and value.numel():
                    dist.send(_as_bytes(value), dst=0, group=self.control)
            return {}
        parts: dict[str, list[Any]] = {key: [value] for key, value in rows.items()}
        for rank in range(1, self.world_size):
            for key, value in everyone[rank].items():
                if not isinstance(value, list):
                    dtype, shape = value
                    value = torch.empty(shape, dtype=dtype)
                    if value.numel():
                        dist.recv(_as_bytes(value), src=rank, group=self.control)
                parts.setdefault(key, []).append(value)
        return parts

    def broadcast(self, tensor: Tensor) -> None:
        """Overwrite a tensor with rank 0's. A device's group may not take tensors in CPU memory: gloo sends those."""
        if self.world_size > 1:
            sent = tensor.contiguous()
            dist.broadcast(sent, src=0, group=self.control if tensor.device.type == "cpu" else None)
            if sent is not tensor:
                tensor.copy_(sent)

    def barrier(self) -> None:
        """Return when every rank has come here."""
        if self.control is not None:
            dist.barrier(group=self.control)

    def shutdown(self) -> None:
        """Wait for all for the last time; from here on no rank looks after the others."""
        self.barrier()
        if self.presence is not None:
            self.presence.stop()


def _leave() -> None:
    """At the end of the process, after `barrier`: gloo's threads must not outlive the interpreter.

    Not at the end of a run: a script may train several, and a group cannot be made anew over the same store.
    """
    if dist.is_initialized():
        dist.destroy_process_group()


def _refuse_lone_process(environ: Mapping[str, str], by_accelerate: bool) -> None:
    if by_accelerate and "MASTER_PORT" in environ:  # accelerate sets it where more than one process was asked for
        raise LaunchError(
            "accelerate launch was asked for several processes but started one (it does so with --cpu and with "
            "distributed_type MULTI_CPU or NO); use launch/ddp.yaml, or distrib launch --processes N"
        )
    for size in ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE"):
        if whole_number(environ, size, 1) > 1:
            raise LaunchError(
                f"mpirun started {environ[size]} processes ({size}), but without RANK and WORLD_SIZE each would "
                "train alone; have the scheduler start them, or mpirun one torchrun or distrib launch on each machine"
            )


def _cpu_only(environ: Mapping[str, str]) -> bool:
    return environ.get("ACCELERATE_USE_CPU", "false").lower() == "true" or not torch.accelerator.is_available()


def _as_bytes(value: Tensor) -> Tensor:
    """The same memory as uint8, which gloo sends for any dtype."""
    return value.contiguous().reshape(-1).view(torch.uint8)
