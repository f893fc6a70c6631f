"""Where the time of a step goes, and how much work it is. Nothing here waits for a device."""

import copy
import resource
import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only
from torch.utils.flop_counter import FlopCounterMode

from distrib.data.source import Source
from distrib.task import Task
from distrib.tracebacks import first_line

if TYPE_CHECKING:
    from distrib.training.engine import Engine

EVERY_STEPS = 100  # how often `sampled` is looked at: what it asks costs more than a step should
_FORWARDS = 3  # a backward is twice the work of its forward
# Dense FLOP/s in bf16 and fp16, as the vendors state them, by a part of the device's name. Not run here.
_PEAKS = {
    "B200": 2250e12,
    "H200 NVL": 835e12,
    "H200": 989e12,
    "H100 NVL": 835e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "V100-PCIE": 112e12,
    "V100-SXM": 125e12,
    "MI300X": 1307e12,
}


class Clock:
    """Divides a step's time on the host: `lap` says what the time since the last one was spent on.

    On an accelerator the host runs ahead, and waits for a step when it has sent the next: what the parts say there is
    the host's own time, and where it waits for data the device may still have work.
    """

    def __init__(self) -> None:
        self.start()

    def start(self) -> None:
        """A step begins now."""
        self._began = self._last = time.perf_counter()
        self._spent = {"data": 0.0, "forward_backward": 0.0, "optimizer": 0.0}

    def lap(self, part: str) -> None:
        now = time.perf_counter()
        self._spent[part] += now - self._last
        self._last = now

    def seconds(self) -> dict[str, float]:
        """Of the step, and of its parts; the rest is forward and backward."""
        return {
            "seconds": round(time.perf_counter() - self._began, 6),
            "data_seconds": round(self._spent["data"], 6),
            "optimizer_seconds": round(self._spent["optimizer"], 6),
        }


def sampled(engine: "Engine") -> dict[str, float]:
    """Of this rank: the most memory that it had at a time, in bytes (on a CPU, of the process), and what its gradients
    waited for one another, where that is known."""
    if engine.device.type == "cpu":
        unit = 1 if sys.platform == "darwin" else 1024
        values: dict[str, float] = {"peak_memory": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit}
    else:  # not run here: see docs/not-run-here.md
        values = {"peak_memory": torch.get_device_module(engine.device).max_memory_allocated()}
    communication = engine.strategy.communication_seconds()
    return values if communication is None else {**values, "communication_seconds": round(communication, 6)}


def work(
    task: Task, module: nn.Module, source: Source, mixed_precision: str, warn: Callable[[str], None]
) -> dict[str, float]:
    """`flops_per_step`, on all ranks, and `peak_flops` a second, of all devices; nothing if one is not known, and
    `warn` is told if that is because of the task."""
    world = source.world
    if world.device.type == "cpu" or mixed_precision == "no":
        return {}
    name = torch.get_device_module(world.device).get_device_name()  # not run here: see docs/not-run-here.md
    peak = next((peak for part, peak in _PEAKS.items() if part in name), None)
    flops = None if peak is None else flops_per_step(task, module, source, warn)
    return {} if peak is None or flops is None else {"flops_per_step": flops, "peak_flops": peak * world.world_size}


def flops_per_step(task: Task, module: nn.Module, source: Source, warn: Callable[[str], None]) -> float | None:
    """Of matrix products and convolutions, forward and backward, over the whole window; None where it can't be counted.

    Counted in a forward on torch's meta device, where nothing is computed; one that looks at values cannot go there.
    """
    if (batch := source.some_batch()) is None:
        return None
    batch = tree_map_only(Tensor, lambda tensor: tensor.to("meta"), batch)
    try:
        with FlopCounterMode(display=False) as counter:
            task.forward(_on_meta(module), batch)
    except Exception as error:
        warn(f"perf/utilisation is not computed, as Task.forward fails on torch's meta device: {first_line(error)}")
        return None
    return float(_FORWARDS * counter.get_total_flops() * source.plan.num_micro_batches)


def _on_meta(module: nn.Module) -> nn.Module:
    """A copy, of which nothing lies in memory; the user's own does not notice."""
    own: list[Tensor] = [*module.parameters(), *module.buffers()]
    return copy.deepcopy(module, {id(tensor): _like(tensor) for tensor in own})


def _like(tensor: Tensor) -> Tensor:
    meta = tensor.detach().to("meta")
    return nn.Parameter(meta, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else meta
