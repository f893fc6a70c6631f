"""Imports DeepSpeed, and changes what does not fit distrib: what it prints, builds, broadcasts and records."""

import copy
import logging
import os
import warnings
from collections.abc import Callable
from typing import Any

from torch import nn

from distrib.processes import variables
from distrib.processes.world import World


def import_deepspeed(world: World) -> Any:
    """Import DeepSpeed for this device. On a CPU, skip its extension, which would take half a minute to compile."""
    if world.use_cpu:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    variables.provide("LOCAL_RANK", str(world.local_rank))  # DeepSpeed reads it even if no launcher has set it
    logger = logging.getLogger("DeepSpeed")
    logger.setLevel(logging.WARNING)
    logger.addFilter(lambda record: "untested optimizer" not in record.getMessage())  # tests/distributed cover ours
    warnings.filterwarnings("ignore", message=r"`torch\.distributed\.\w+` is deprecated", category=FutureWarning)
    import deepspeed
    import deepspeed.ops
    from deepspeed.runtime import torch_autocast

    torch_autocast.TORCH_AUTOCAST_INITIALIZED = False  # an earlier run in this process may have set it, with its dtypes
    deepspeed.DeepSpeedEngine._broadcast_model = lambda _: None  # it fails for scalars; broadcast_state does this
    if world.use_cpu:
        vars(deepspeed.ops)["__compatible_ops__"] = {}
    return deepspeed


def unless(condition: Callable[[], bool], step: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap an optimizer's step, which DeepSpeed calls, because DeepSpeed cannot end a window without an update."""

    def step_or_not(*args: Any, **kwargs: Any) -> Any:
        return None if condition() else step(*args, **kwargs)

    return step_or_not


def release_whole(module: nn.Module) -> None:
    """Let the next forward gather again the parameters that stage 3 keeps whole, because their shards were written."""
    parameters: list[Any] = list(module.parameters())
    if whole := [parameter for parameter in parameters if parameter.ds_persist]:
        whole[0].partition(whole)


def record_evaluation_apart(offload: Any, module: nn.Module) -> None:
    """Let DeepSpeed record the order of modules separately for evaluation and training.

    DeepSpeed records the order in which modules run, and caches after which module each parameter is released. It keeps
    the cache even if the order changes. So if an evaluation ran before the second step, each training forward would
    release parameters that the backward needs, and they would be gathered twice.
    """
    training, evaluation = offload.param_coordinator, copy.copy(offload.param_coordinator)
    evaluation._clear_trace_structures()
    offload.get_param_coordinator = lambda: training if module.training else evaluation
