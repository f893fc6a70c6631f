"""DeepSpeed itself, corrected where it hinders: what it prints, builds, broadcasts and remembers."""

import copy
import logging
import os
import warnings
from typing import Any

from torch import nn

from distrib.processes import variables
from distrib.processes.world import World


def import_deepspeed(world: World) -> Any:
    """DeepSpeed on this device; on CPU without the extension that it would compile for half a minute."""
    if world.use_cpu:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    variables.provide("LOCAL_RANK", str(world.local_rank))  # DeepSpeed reads it also if no launcher set it
    logger = logging.getLogger("DeepSpeed")
    logger.setLevel(logging.WARNING)
    logger.addFilter(lambda record: "untested optimizer" not in record.getMessage())  # tests/distributed test ours
    warnings.filterwarnings("ignore", message=r"`torch\.distributed\.\w+` is deprecated", category=FutureWarning)
    import deepspeed
    import deepspeed.ops
    from deepspeed.runtime import torch_autocast

    torch_autocast.TORCH_AUTOCAST_INITIALIZED = False  # of a run before in this process, or its dtypes would be ours
    deepspeed.DeepSpeedEngine._broadcast_model = lambda _: None  # it takes no scalars; broadcast_state has done it
    if world.use_cpu:
        vars(deepspeed.ops)["__compatible_ops__"] = {}
    return deepspeed


def record_evaluation_apart(offload: Any, module: nn.Module) -> None:
    """Let DeepSpeed record the order of an evaluation's modules apart from that of training.

    It records the order in which modules run, and caches after which module each parameter is released. The cache stays
    if another order is recorded. So after an evaluation before the second step, it would release in each training
    forward what the backward needs, and gather it twice.
    """
    training, evaluation = offload.param_coordinator, copy.copy(offload.param_coordinator)
    evaluation._clear_trace_structures()
    offload.get_param_coordinator = lambda: training if module.training else evaluation
