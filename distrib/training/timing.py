"""Measures memory and communication, and counts the FLOPs of a step. Nothing here waits for a device."""

import copy
import resource
import sys
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

EVERY_STEPS = 100  # how often `sampled` is called, because it is too slow for every step
_FORWARDS = 3  # a backward takes twice the FLOPs of its forward
# Dense bf16 and fp16 FLOP/s from the vendors' data sheets, by a part of the device's name. Not run here.
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


def sampled(engine: "Engine") -> dict[str, float]:
    """Return this rank's `peak_memory` in bytes (on a CPU: of the process), and `communication_seconds`, the time spent
    on reducing gradients, if the strategy measures it."""
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
    """Return `flops_per_step` over all ranks and `peak_flops`, the FLOP/s of all devices; empty if one is unknown.

    `warn` is called if the task's forward is the reason.
    """
    world = source.world
    if world.device.type == "cpu" or mixed_precision == "no":
        return {}
    name = torch.get_device_module(world.device).get_device_name()  # not run here: see docs/not-run-here.md
    peak = next((peak for part, peak in _PEAKS.items() if part in name), None)
    flops = None if peak is None else flops_per_step(task, module, source, warn)
    return {} if peak is None or flops is None else {"flops_per_step": flops, "peak_flops": peak * world.world_size}


def flops_per_step(task: Task, module: nn.Module, source: Source, warn: Callable[[str], None]) -> float | None:
    """Count the FLOPs of matrix products and convolutions in a whole step, forward and backward. None if unknown.

    The count is made in a forward on torch's meta device, where nothing is computed. A forward that depends on values
    fails there; then `warn` is called.
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
    """Return a copy on the meta device, which takes no memory for tensors."""
    own: list[Tensor] = [*module.parameters(), *module.buffers()]
    return copy.deepcopy(module, {id(tensor): _like(tensor) for tensor in own})


def _like(tensor: Tensor) -> Tensor:
    meta = tensor.detach().to("meta")
    return nn.Parameter(meta, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else meta
