"""Who this process is among the others. The only reader of launcher variables.

A launcher that starts fewer processes than it was asked for, or another strategy, is found out here: that is the
most common silent failure in this field (see docs/launchers.md).
"""

import atexit
import os
import socket
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from distrib.errors import DistribError, LaunchError

T = TypeVar("T")

_REQUIRED = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_FAILED_KEY = "distrib/failed"


@dataclass
class World:
    """One process among `world_size`. `detect` reads who we are; `connect` joins the others."""

    rank: int = 0
    local_rank: int = 0
    world_size: int = 1
    local_world_size: int = 1
    launcher: str = "plain"  # plain | distrib | torchrun | accelerate
    asked: dict[str, Any] = field(default_factory=dict)  # what accelerate launch was told, by our config's keys
    use_cpu: bool = True
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    control: dist.ProcessGroup | None = None  # gloo on CPU memory, whatever carries the gradients
    background: dist.ProcessGroup | None = None  # another one, for the thread that saves

    @classmethod
    def detect(cls, environ: Mapping[str, str] = os.environ) -> "World":
        """Read the launcher's variables. Raises LaunchError where they tell of processes that are not there."""
        by_accelerate = "ACCELERATE_MIXED_PRECISION" in environ
        given = [name for name in _REQUIRED if name in environ]
        if "RANK" not in environ and "WORLD_SIZE" not in environ:
            _refuse_lone_process(environ, by_accelerate)
            return cls(
                launcher="accelerate" if by_accelerate else "plain",
                asked=_asked(environ),
                use_cpu=_cpu_only(environ),
            )
        if missing := [name for name in _REQUIRED if name not in environ]:
            raise LaunchError(
                f"the launcher set {', '.join(given)} but not {', '.join(missing)}; start with distrib launch, "
                "torchrun or accelerate launch, or set all of them"
            )
        numbers = {name: _integer(environ, name) for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE")}
        rank, world_size = numbers["RANK"], numbers["WORLD_SIZE"]
        if not 0 <= rank < world_size:
            raise LaunchError(f"RANK={rank} does not lie in 0..{world_size - 1} (WORLD_SIZE={world_size})")
        world = cls(
            rank=rank,
            local_rank=numbers["LOCAL_RANK"],
            world_size=world_size,
            local_world_size=_integer(environ, "LOCAL_WORLD_SIZE") if "LOCAL_WORLD_SIZE" in environ else world_size,
            launcher=environ.get("DISTRIB_LAUNCHER") or ("accelerate" if by_accelerate else "torchrun"),
            asked=_asked(environ),
            use_cpu=_cpu_only(environ),
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
        return f"rank {self.rank} of {self.world_size} on {socket.gethostname()}"

    def connect(self) -> None:
        """Join the other processes and find our device. Raises LaunchError where fewer came than were asked for."""
        from accelerate import PartialState

        if "OMP_NUM_THREADS" not in os.environ:  # or accelerate sets it for the cores of one process, with a warning
            threads = max(1, (os.cpu_count() or 1) // self.local_world_size)
            os.environ["OMP_NUM_THREADS"] = str(threads)
            torch.set_num_threads(threads)
        try:
            state = PartialState(cpu=self.use_cpu)
        except dist.DistNetworkError as error:
            where = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
            raise LaunchError(
                f"rendezvous at {where} failed: {str(error).splitlines()[0]}; if the port is taken, choose another"
            ) from None
        if state.num_processes != self.world_size:
            raise LaunchError(
                f"{self.launcher} asked for {self.world_size} processes, but each would have trained in a world of "
                f"{state.num_processes}; nothing was started"
            )
        self.device = state.device
        if self.world_size > 1:
            self.control = dist.new_group(backend="gloo")
            self.background = dist.new_group(backend="gloo")
            atexit.register(_leave)

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

    def from_all(self, value: T) -> list[T]:
        """Every rank's value, in rank order, on every rank."""
        if self.control is None:
            return [value]
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value, group=self.control)
        return values

    def gather_rows(self, rows: dict[str, Tensor]) -> dict[str, Tensor] | None:
        """Concatenate the ranks' rows, in rank order, on rank 0; None on the others.

        Tensors are CPU tensors with one entry a sample in the first dimension; a rank without samples gives {}.
        """
        if self.control is None:
            return rows
        shapes: list[Any] = [None] * self.world_size
        described = {key: (value.dtype, tuple(value.shape)) for key, value in rows.items()}
        dist.gather_object(described, shapes if self.is_rank_0 else None, dst=0, group=self.control)
        if not self.is_rank_0:
            for value in rows.values():
                if value.numel():
                    dist.send(_as_bytes(value), dst=0, group=self.control)
            return None
        parts: dict[str, list[Tensor]] = {key: [value] for key, value in rows.items()}
        for rank in range(1, self.world_size):
            for key, (dtype, shape) in shapes[rank].items():
                value = torch.empty(shape, dtype=dtype)
                if value.numel():
                    dist.recv(_as_bytes(value), src=rank, group=self.control)
                parts.setdefault(key, []).append(value)
        return {key: torch.cat(values) for key, values in parts.items()}

    def wait_for_all(self) -> None:
        """Return when every rank has come here."""
        if self.control is not None:
            dist.barrier(group=self.control)


def _leave() -> None:
    """At the end of the process, after `wait_for_all`: gloo's threads must not outlive the interpreter.

    Not at the end of a run: a script may train several, and a group cannot be made anew over the same store.
    """
    if dist.is_initialized():
        dist.destroy_process_group()


def report_failure(error: BaseException) -> tuple[str, bool]:
    """What this process should print of the exception that ended it, and whether the failure began here.

    The first rank to fail says so in the job's store before its connections close, so that those who fail only for
    want of it can tell. They say one line; the traceback that matters comes once.
    """
    rank = int(os.environ.get("RANK", 0))
    me = f"rank {rank} of {os.environ.get('WORLD_SIZE', 1)} on {socket.gethostname()}"
    if dist.is_initialized() and dist.get_world_size() > 1:
        lost_others = isinstance(error, RuntimeError) and "onnection" in str(error)  # gloo's and nccl's words
        try:
            store = dist.distributed_c10d._get_default_store()
            first = store.get(_FAILED_KEY).decode() if store.check([_FAILED_KEY]) else None
            if first is None and not lost_others:
                first = store.compare_set(_FAILED_KEY, "", me).decode()
        except RuntimeError:  # the store went away with the rank or launcher that kept it
            first = None
        if first is None and lost_others:
            return f"{me} stopped: it lost contact with another rank", False
        if first not in (None, me):
            return f"{me} stopped, because {first} had failed", False
    return f"{me} failed:\n{''.join(traceback.format_exception(error)).rstrip()}", True


def _refuse_lone_process(environ: Mapping[str, str], by_accelerate: bool) -> None:
    if by_accelerate and "MASTER_PORT" in environ:  # accelerate sets it where more than one process was asked for
        raise LaunchError(
            "accelerate launch was asked for several processes but started one (it does so with --cpu and with "
            "distributed_type MULTI_CPU or NO); use launch/ddp.yaml, or distrib launch --processes N"
        )
    for launcher, size in (
        ("srun", "SLURM_STEP_NUM_TASKS"),
        ("mpirun", "OMPI_COMM_WORLD_SIZE"),
        ("mpirun", "PMI_SIZE"),
    ):
        if int(environ.get(size, 1)) > 1:
            raise LaunchError(
                f"{launcher} started {environ[size]} processes ({size}), but without RANK and WORLD_SIZE each would "
                "train alone; have it start one torchrun or distrib launch on each machine"
            )


def _asked(environ: Mapping[str, str]) -> dict[str, Any]:
    """What accelerate launch was told, by our config's keys. What it says by default is no wish, and left out."""
    told = {key: value.lower() for key, value in environ.items() if key.startswith(("ACCELERATE_", "FSDP_"))}
    asked: dict[str, Any] = {}
    if told.get("ACCELERATE_MIXED_PRECISION", "no") != "no":
        asked["train.mixed_precision"] = told["ACCELERATE_MIXED_PRECISION"]
    for other in ("megatron_lm", "parallelism_config"):
        if told.get(f"ACCELERATE_USE_{other.upper()}") == "true":
            asked["strategy.name"] = other
    if told.get("ACCELERATE_USE_FSDP") == "true":
        asked["strategy.name"] = f"fsdp{told.get('FSDP_VERSION', '1')}"
        for option, variable, value, wish in (
            ("offload", "FSDP_OFFLOAD_PARAMS", "true", "all"),
            ("reshard_after_forward", "FSDP_RESHARD_AFTER_FORWARD", "false", False),
            ("activation_checkpointing", "FSDP_ACTIVATION_CHECKPOINTING", "true", True),
        ):
            if told.get(variable) == value:
                asked[f"strategy.{option}"] = wish
        if wrap := environ.get("FSDP_TRANSFORMER_CLS_TO_WRAP"):
            asked["fsdp_transformer_layer_cls_to_wrap"] = wrap
        elif told.get("FSDP_AUTO_WRAP_POLICY") == "size_based_wrap":
            asked["fsdp_auto_wrap_policy"] = "SIZE_BASED_WRAP"
    if told.get("ACCELERATE_USE_DEEPSPEED") == "true":
        if "ACCELERATE_DEEPSPEED_CONFIG_FILE" in environ:
            asked["strategy.name"] = "deepspeed"  # which stage, stands in the file
            asked["strategy.deepspeed"] = environ["ACCELERATE_DEEPSPEED_CONFIG_FILE"]
        else:
            asked["strategy.name"] = f"zero{told.get('ACCELERATE_DEEPSPEED_ZERO_STAGE', '2')}"
        if told.get("ACCELERATE_GRADIENT_CLIPPING", "none") != "none":
            asked["train.max_grad_norm"] = float(told["ACCELERATE_GRADIENT_CLIPPING"])
        if told.get("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "1") not in ("1", "auto"):
            asked["grad_accum_steps"] = int(told["ACCELERATE_GRADIENT_ACCUMULATION_STEPS"])
        for what, wish in (("OPTIMIZER", "optimizer"), ("PARAM", "all")):
            device = told.get(f"ACCELERATE_DEEPSPEED_OFFLOAD_{what}_DEVICE", "none")
            if device != "none":
                asked["strategy.offload"] = wish if device == "cpu" else device
    return asked


def _cpu_only(environ: Mapping[str, str]) -> bool:
    return environ.get("ACCELERATE_USE_CPU", "false").lower() == "true" or not torch.accelerator.is_available()


def _integer(environ: Mapping[str, str], name: str) -> int:
    try:
        return int(environ[name])
    except ValueError:
        raise LaunchError(f"{name}={environ[name]!r} is not a number; it is set by the launcher") from None


def _as_bytes(value: Tensor) -> Tensor:
    """The same memory as uint8, which gloo sends for any dtype."""
    return value.contiguous().reshape(-1).view(torch.uint8)
