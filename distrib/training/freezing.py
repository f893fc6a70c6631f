"""What is not trained: `train.freeze` (until `train.unfreeze_at`), and the groups of `optim` with `freeze`."""

import sys
from fnmatch import fnmatchcase

from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from distrib.config import Config
from distrib.errors import ConfigError, did_you_mean
from distrib.optim_groups import REST, group_of, require_members

AT_THE_END = sys.maxsize  # steps done


def freeze(module: nn.Module, config: Config, steps_done: int) -> None:
    """Take the gradient from the parameters that are frozen after so many steps. Raises ConfigError if a pattern
    matches nothing, or nothing is left to train."""
    named = list(module.named_parameters())
    require_members(config.optim.groups, [(name, parameter.ndim) for name, parameter in named])
    names = [name for name, _ in [*named, *module.named_buffers()]]
    for number, glob in enumerate(config.train.freeze):
        if not any(fnmatchcase(name, glob) for name in names):
            hint = did_you_mean(glob.replace("*", ""), names, f"; there are {', '.join(names[:5])}, …")
            raise ConfigError(f"train.freeze.{number}: {glob} matches no parameter or buffer of the model{hint}")
    for name, parameter in named:
        if _in_a_frozen_group(config, name, parameter):
            parameter.requires_grad_(False)
    trained = [(name, parameter) for name, parameter in named if parameter.requires_grad]
    if trained and all(_matches(config, name) for name, _ in trained):
        raise ConfigError(f"train.freeze: {', '.join(config.train.freeze)} leaves no parameter to train")
    for name, parameter in trained:
        if _frozen_now(config, name, steps_done):
            parameter.requires_grad_(False)


def unfreezing_step(config: Config, num_steps: int) -> int | None:
    """Return after how many steps more is trained; None: never. Raises ConfigError if the run ends before."""
    until = config.train.unfreeze_at
    if until is not None and until.step >= num_steps:
        raise ConfigError(f"train.unfreeze_at.step: {until.step}, but the run has {num_steps} steps; give fewer")
    return None if until is None else until.step


def set_training_mode(module: nn.Module, config: Config, steps_done: int) -> None:
    """Put the module into training mode, except normalisation layers whose running statistics are frozen."""
    module.train()
    for name, part in module.named_modules():
        statistics = f"{name}.running_mean".lstrip(".")
        if isinstance(part, _NormBase) and _frozen_now(config, statistics, steps_done):
            part.eval()


def trained_later(config: Config, name: str) -> bool:
    """Return whether `train.unfreeze_at` is given, and this parameter is frozen until then."""
    return config.train.unfreeze_at is not None and _matches(config, name)


def _frozen_now(config: Config, name: str, steps_done: int) -> bool:
    until = config.train.unfreeze_at
    return (until is None or steps_done < until.step) and _matches(config, name)


def _matches(config: Config, name: str) -> bool:
    return any(fnmatchcase(name, glob) for glob in config.train.freeze)


def _in_a_frozen_group(config: Config, name: str, parameter: nn.Parameter) -> bool:
    place = group_of(config.optim.groups, name, parameter.ndim)
    return place != REST and config.optim.groups[place].freeze
