"""Builds a torch optimizer from the config's `optim` section."""

import inspect
from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from distrib.config import OptimConfig
from distrib.errors import ConfigError, did_you_mean
from distrib.optim_groups import KEY, OF_A_CLASS, REST, VALUES, GroupConfig, group_of
from distrib.strategies.optimizer_state import members_of

_FUSED_DEVICES = ("cpu", "cuda", "mps", "xpu")
_FUSED_FOR_SHARDS = (torch.optim.Adam, torch.optim.AdamW)  # for DTensors; the others raise NotImplementedError
_OURS = ("params", "match", "place")  # keys of a group that are no arguments of its class
_HYPERPARAMETERS = ("weight_decay", "betas", "momentum")


class SeveralOptimizers(Optimizer):
    """Optimizers of several classes as one: their parameter groups and states, and one step.

    A step updates those groups that are in `param_groups` then: DeepSpeed puts one there at a time.
    """

    def __init__(self, members: list[Optimizer]) -> None:
        self.members = members
        super().__init__([group for member in members for group in member.param_groups], {})  # the same dicts
        for member in members:
            self.state.update(member.state)
            member.state = self.state

    def step(self, closure: None = None) -> None:  # type: ignore[override]
        present = {id(group) for group in self.param_groups}
        for member in self.members:
            groups = member.param_groups
            member.param_groups = [group for group in groups if id(group) in present]
            member.step()
            member.param_groups = groups


def build_optimizer(
    config: OptimConfig,
    params: list[tuple[str, nn.Parameter]],
    decays: Callable[[str, nn.Parameter], bool],
    later: Collection[str] = (),
) -> Optimizer:
    """Return an optimizer of the classes of torch.optim that the config names, fused if torch supports it. Raises
    ConfigError.

    With weight decay, the parameters for which `decays` is false are separate groups without it, unless they are in one
    of `optim.groups` that has a weight_decay of its own. `later`: names of parameters that are trained later than the
    others; they are separate groups too, because a sharded strategy keeps one count of updates for a group.
    """
    members: dict[tuple[int, bool], list[tuple[str, nn.Parameter]]] = {}
    for name, parameter in params:
        place = (group_of(config.groups, name, parameter.ndim), name in later)
        members.setdefault(place, []).append((name, parameter))
    by_class: dict[type[Optimizer], list[dict[str, Any]]] = {}
    for (number, _), own in sorted(members.items()):
        group = None if number == REST else config.groups[number]
        optimizer_class, arguments = _arguments(config, group, own, "optim" if group is None else f"{KEY}.{number}")
        if config.groups:
            arguments["match"] = "the rest" if group is None else ", ".join(group.match)
            arguments["place"] = number
        keeps = not arguments.get("weight_decay") or (group is not None and group.weight_decay is not None)
        spared = set() if keeps else {name for name, parameter in own if not decays(name, parameter)}
        decayed = [item for item in own if item[0] not in spared]
        undecayed = [item for item in own if item[0] in spared]
        for part, changed in ((decayed, {}), (undecayed, {"weight_decay": 0.0})):
            if part:  # DeepSpeed does not accept an empty group
                by_class.setdefault(optimizer_class, []).append({"params": part, **arguments, **changed})
    optimizers = [_construct(optimizer_class, groups) for optimizer_class, groups in by_class.items()]
    return optimizers[0] if len(optimizers) == 1 else SeveralOptimizers(optimizers)


def _construct(optimizer_class: type[Optimizer], groups: list[dict[str, Any]]) -> Optimizer:
    """Make an optimizer whose groups have all their values themselves: those of a constructor would be for all. Raises
    ConfigError."""
    fused = all(group.get("fused") for group in groups)
    groups = [{key: value for key, value in group.items() if key != "fused" or fused} for group in groups]
    try:
        for group in groups:  # a constructor checks its arguments, but not those of groups
            values = {key: value for key, value in group.items() if key not in _OURS}
            optimizer_class([nn.Parameter(torch.zeros(1, 1))], **values)
        common = set.intersection(*map(set, groups)) - set(_OURS)  # a default never fills a gap of a group
        return optimizer_class(groups, **{key: value for key, value in groups[0].items() if key in common})
    except (TypeError, ValueError, RuntimeError) as error:
        hint = "; give it the matrices alone, by optim.groups with ndim: 2" if "2D" in str(error) else ""
        raise ConfigError(f"optim: {optimizer_class.__name__} refuses its arguments: {error}{hint}") from None


def _arguments(
    config: OptimConfig, group: GroupConfig | None, params: list[tuple[str, nn.Parameter]], where: str
) -> tuple[type[Optimizer], dict[str, Any]]:
    """Return the class for these parameters and its arguments. `group`: None for the rest; `where`: its key. Raises
    ConfigError."""
    optimizer_class = _find(config.name if group is None or group.name is None else group.name, where)
    of_another_class = group is not None and optimizer_class is not _find(config.name, "optim")
    given = {key for key in VALUES if group is not None and getattr(group, key) is not None}
    if group is None:
        given = {key for key in VALUES if getattr(config, key) != OptimConfig.model_fields[key].default}

    def value_of(key: str) -> Any:
        return getattr(group if group is not None and key in given else config, key)

    accepted = inspect.signature(optimizer_class).parameters
    arguments: dict[str, Any] = {"lr": value_of("lr")}
    for key in _HYPERPARAMETERS:
        if key in accepted and (key in given or key not in OF_A_CLASS or not of_another_class):
            arguments[key] = value_of(key)
        elif key not in accepted and key in given:
            raise ConfigError(f"{where}.{key}: {optimizer_class.__name__} has no {key}; leave it out")
    options = value_of("options") if "options" in given or not of_another_class else {}
    sharded = any(hasattr(p, "to_local") for _, p in params)  # a DTensor; importing that class takes a second
    fusible = "fused" in accepted and (not sharded or optimizer_class in _FUSED_FOR_SHARDS)
    if fusible and all(p.is_floating_point() and p.device.type in _FUSED_DEVICES for _, p in params):
        arguments["fused"] = True
    for key in options:
        if key not in accepted or key in ("params", "lr", *_HYPERPARAMETERS):
            free = [name for name in accepted if name not in ("params", "lr", *_HYPERPARAMETERS)]
            raise ConfigError(f"{where}.options.{key}: not an option of {optimizer_class.__name__}: {', '.join(free)}")
    if {"foreach", "differentiable"} & options.keys():
        arguments.pop("fused", None)
    arguments.update(options)
    return optimizer_class, arguments


def describe_optimizer(optimizer: Optimizer) -> str:
    """Return the optimizer's class, and the learning rate and weight decay of each parameter group; with the config's
    groups also what they match, and their numbers of parameters."""
    return "; ".join(
        f"{type(member).__name__}, {'; '.join(_describe_group(group) for group in member.param_groups)}"
        for member in members_of(optimizer)
    )


def _describe_group(group: dict[str, Any]) -> str:
    decay = f", weight_decay {group['weight_decay']:g}" if group.get("weight_decay") else ""
    whose = ""
    if "match" in group:
        whose = f" for {group['match']} ({sum(parameter.numel() for parameter in group['params']):,} parameters)"
    return f"lr {group['lr']:g}{decay}{whose}"


def ignored_keys(config: OptimConfig, optimizer: Optimizer) -> str | None:
    """Return a message about `optim` keys that the task's own optimizer contradicts; None if there are none.

    Only keys whose value is not the default are compared, because a run's config.yaml has all keys.
    """
    wanted = {key: getattr(config, key) for key in ("lr", *_HYPERPARAMETERS)}
    asked = {key: value for key, value in wanted.items() if value != OptimConfig.model_fields[key].default}
    asked.update({f"options.{key}": value for key, value in config.options.items()})
    name = type(optimizer).__name__
    different = ["groups are given"] if config.groups else []
    different += [f"name is {config.name}"] if config.name.lower() not in ("adamw", name.lower()) else []
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


def _find(name: str, where: str) -> type[Optimizer]:
    classes = {
        key.lower(): value
        for key, value in vars(torch.optim).items()
        if inspect.isclass(value) and issubclass(value, Optimizer) and value is not Optimizer
    }
    if name.lower() in classes:
        if name.lower() == "lbfgs":
            raise ConfigError(f"{where}.name: LBFGS evaluates the loss several times a step; the loop does so once")
        return classes[name.lower()]
    hint = did_you_mean(name.lower(), classes, f": {', '.join(sorted(classes))}", lambda key: classes[key].__name__)
    raise ConfigError(f"{where}.name: {name!r} is not a class of torch.optim{hint}")
