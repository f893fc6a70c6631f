"""Builds a torch optimizer from the config's `optim` section."""

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from distrib.config import OptimConfig
from distrib.errors import ConfigError, did_you_mean

_FUSED_DEVICES = ("cpu", "cuda", "mps", "xpu")
_FUSED_FOR_SHARDS = (torch.optim.Adam, torch.optim.AdamW)  # for DTensors; the others raise NotImplementedError
_HYPERPARAMETERS = ("weight_decay", "betas", "momentum")


def build_optimizer(
    config: OptimConfig, params: list[tuple[str, nn.Parameter]], decays: Callable[[str, nn.Parameter], bool]
) -> Optimizer:
    """Return an optimizer of the torch.optim class `config.name`, fused if torch supports it. Raises ConfigError.

    If the config has weight decay, the parameters for which `decays` is false are a separate group without it.
    """
    optimizer_class = _find(config.name)
    accepted = inspect.signature(optimizer_class).parameters
    arguments: dict[str, Any] = {"lr": config.lr}
    for key in _HYPERPARAMETERS:
        if key in accepted:
            arguments[key] = getattr(config, key)
        elif key in config.model_fields_set and getattr(config, key) != OptimConfig.model_fields[key].default:
            raise ConfigError(f"optim.{key}: {optimizer_class.__name__} has no {key}; leave it out")
    sharded = any(hasattr(p, "to_local") for _, p in params)  # a DTensor; importing that class takes a second
    fusible = "fused" in accepted and (not sharded or optimizer_class in _FUSED_FOR_SHARDS)
    if fusible and all(p.is_floating_point() and p.device.type in _FUSED_DEVICES for _, p in params):
        arguments["fused"] = True
    for key in config.options:
        if key not in accepted or key in ("params", "lr", *_HYPERPARAMETERS):
            free = [name for name in accepted if name not in ("params", "lr", *_HYPERPARAMETERS)]
            raise ConfigError(f"optim.options.{key}: not an option of {optimizer_class.__name__}: {', '.join(free)}")
    if {"foreach", "differentiable"} & config.options.keys():
        arguments.pop("fused", None)
    arguments.update(config.options)
    groups: Any = params
    if arguments.get("weight_decay"):
        spared = {name for name, p in params if not decays(name, p)}
        both: list[dict[str, Any]] = [
            {"params": [item for item in params if item[0] not in spared]},
            {"params": [item for item in params if item[0] in spared], "weight_decay": 0.0},
        ]
        groups = [group for group in both if group["params"]]  # DeepSpeed does not accept an empty group
    try:
        return optimizer_class(groups, **arguments)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ConfigError(f"optim: {optimizer_class.__name__} refuses its arguments: {error}") from None


def describe_optimizer(optimizer: Optimizer) -> str:
    """Return the optimizer's class, and the learning rate and weight decay of each parameter group."""
    groups = [
        f"lr {group['lr']:g}" + (f", weight_decay {group['weight_decay']:g}" if group.get("weight_decay") else "")
        for group in optimizer.param_groups
    ]
    return f"{type(optimizer).__name__}, {'; '.join(groups)}"


def ignored_keys(config: OptimConfig, optimizer: Optimizer) -> str | None:
    """Return a message about `optim` keys that the task's own optimizer contradicts; None if there are none.

    Only keys whose value is not the default are compared, because a run's config.yaml has all keys.
    """
    wanted = {key: getattr(config, key) for key in ("lr", *_HYPERPARAMETERS)}
    asked = {key: value for key, value in wanted.items() if value != OptimConfig.model_fields[key].default}
    asked.update({f"options.{key}": value for key, value in config.options.items()})
    name = type(optimizer).__name__
    different = [f"name is {config.name}"] if config.name.lower() not in ("adamw", name.lower()) else []
    for key, value in asked.items():
        used = [group.get(key.removeprefix("options.")) for group in optimizer.param_groups]
        if all(one != value and one != _other_sequence(value) for one in used):
            different.append(f"{key} is {value}" + ("" if used[0] is None else f", there {used[0]}"))
    if not different:
        return None
    return (
        f"optim: the optimizer that task.optimizer returns ({name}) does not do what the config says: "
        f"{'; '.join(different)}; set it in task.optimizer and leave it out of the config"
    )


def _other_sequence(value: Any) -> Any:
    """Return a list as a tuple and a tuple as a list, because YAML and optimizers use different ones."""
    return list(value) if isinstance(value, tuple) else tuple(value) if isinstance(value, list) else value


def _find(name: str) -> type[Optimizer]:
    classes = {
        key.lower(): value
        for key, value in vars(torch.optim).items()
        if inspect.isclass(value) and issubclass(value, Optimizer) and value is not Optimizer
    }
    if name.lower() in classes:
        if name.lower() == "lbfgs":
            raise ConfigError("optim.name: LBFGS evaluates the loss several times a step; the loop does so once")
        return classes[name.lower()]
    hint = did_you_mean(name.lower(), classes, f": {', '.join(sorted(classes))}", lambda key: classes[key].__name__)
    raise ConfigError(f"optim.name: {name!r} is not a class of torch.optim{hint}")
