"""Finds the strategy that runs, from the config and from the options of accelerate launch."""

import os
from typing import Any

from pydantic import ValidationError
from torch import nn

from distrib import plugins
from distrib.config import Config, StrategyConfig
from distrib.errors import ConfigError, LaunchError
from distrib.plan import BatchPlan
from distrib.processes.world import World
from distrib.strategies.base import Strategy
from distrib.strategies.deepspeed_config import stage_of
from distrib.strategy_options import find

_WRAP = "fsdp_transformer_layer_cls_to_wrap"
_TF32 = ("NVIDIA_TF32_OVERRIDE", "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE")


def resolve(config: Config, world: World) -> Strategy:
    """Return the strategy that trains. Its `config` has the strategy's name and all options filled in.

    Raises LaunchError, which names both values, if launcher and config contradict each other. Raises ConfigError if the
    config does not fit the strategy.
    """
    strategy = create(_resolved(config, world), world)
    strategy.check()
    _check_compile(strategy)
    for variable in _TF32:
        if not world.use_cpu and os.environ.get(variable, "0") != "0":
            raise LaunchError(
                f"{variable}={os.environ[variable]}: matrix products in fp32 would be computed in TF32, of which the "
                "config says nothing; unset it, or train with train.mixed_precision bf16"
            )
    return strategy


def for_evaluation(config: Config, world: World) -> Strategy:
    """Return the strategy that evaluates a run of `config`, on any number of processes. Raises ConfigError."""
    data = config.data.model_copy(update={"global_batch_size": config.data.micro_batch_size * world.world_size})
    config = config.model_copy(update={"data": data})
    name = config.strategy.name
    evaluates_as = "auto" if name == "auto" else find(config.strategy.name).evaluates_as
    if evaluates_as != name:
        config = config.model_copy(update={"strategy": StrategyConfig(name=evaluates_as)})
    return create(_resolved(config, world), world)


def create(config: Config, world: World) -> Strategy:
    """Create the strategy that a resolved config names. Raises ConfigError if its options are wrong."""
    found: type[Strategy] = find(config.strategy.name)
    if config.train.determinism == "bitwise":
        bitwise = found.bitwise()
        if bitwise is None:
            able = [name for name in plugins.OWN[plugins.STRATEGIES] if find(name).bitwise()]
            raise ConfigError(
                f"train.determinism: bitwise is for {' and '.join(able)}, and the strategy is {config.strategy.name}, "
                "whose library sums in an order of its own; take one of those, or fast"
            )
        found = bitwise
    return found(config, world)


def check_wrapped(world: World, blocks: list[nn.Module]) -> None:
    """Raise LaunchError if accelerate launch names classes to wrap, and the task's blocks have other classes."""
    if _WRAP in world.asked:
        asked = {name.strip() for name in world.asked[_WRAP].split(",")}
        found = {type(block).__name__ for block in blocks}
        if asked != found:
            raise LaunchError(
                f"accelerate launch was told {_WRAP}: {', '.join(sorted(asked))}, but Task.blocks gives "
                f"{', '.join(sorted(found)) or 'none'}; leave it out there, or return those blocks from Task.blocks"
            )


def _resolved(config: Config, world: World) -> Config:
    """Return the config. Keys of `strategy` that it does not set get the values given to accelerate launch."""
    values = config.strategy.model_dump()
    told = []
    for key, asked in world.asked.items():
        section, _, option = key.partition(".")
        is_set = option in config.strategy.model_fields_set and values.get(option) != "auto"
        if key == _WRAP:  # `check_wrapped` compares it, when the model exists
            continue
        if section == "strategy" and not is_set:
            values[option] = asked
            told.append(key)
        elif (ours := _value(config, key, world)) != asked:
            raise LaunchError(
                f"accelerate launch was told {key}: {_text(asked)}, the config makes it {_text(ours)}; give both the "
                "same, or leave it out of one"
            )
    if values["name"] == "auto":
        values["name"] = "ddp" if world.world_size > 1 else "single"
    elif values["name"] == "deepspeed":  # accelerate launch names a JSON file, which has the stage
        values["name"] = f"zero{stage_of(values['deepspeed'])}"
    if "strategy.name" in told and values["name"] not in plugins.OWN[plugins.STRATEGIES]:
        raise LaunchError(
            f"accelerate launch was told to use {values['name']}, which distrib does not run; it runs "
            f"{', '.join(plugins.OWN[plugins.STRATEGIES])} (for FSDP: fsdp_version: 2)"
        )
    try:
        strategy = StrategyConfig.model_validate(values)
        strategy.options()
    except (ValidationError, ConfigError) as error:
        if isinstance(error, ConfigError) and not any(str(error).startswith(f"{key}: ") for key in told):
            raise
        raise LaunchError(f"accelerate launch: {error}") from None
    return config.model_copy(update={"strategy": strategy})


def _check_compile(strategy: Strategy) -> None:
    train = strategy.config.train
    if not train.compile:
        return
    if train.determinism == "bitwise":
        raise ConfigError(
            f"train.compile: {train.compile} is not for train.determinism: bitwise, as the order of sums in compiled "
            "code is the compiler's choice on each process; give false, or fast"
        )
    if train.compile == "model" and strategy.forward_is_collective:
        raise ConfigError(
            f"train.compile: model, but {strategy.name} gathers the model's parameters part by part as the forward "
            "goes on, which one graph of it cannot; take blocks"
        )
    if train.compile == "model" and strategy.config.strategy.activation_checkpointing:
        raise ConfigError(
            "train.compile: model, which itself chooses what the backward computes again; leave "
            "strategy.activation_checkpointing out, or take blocks"
        )


def _value(config: Config, key: str, world: World) -> Any:
    """Return the config's value for a key of accelerate launch."""
    if key == "grad_accum_steps":
        return BatchPlan.of(config, world.world_size).grad_accum_steps
    if key == "fsdp_auto_wrap_policy":
        return "what Task.blocks gives"
    if key.startswith("fsdp_"):  # an option that distrib does not have
        return None
    section, option = key.split(".")
    return getattr(getattr(config, section), option)


def _text(value: Any) -> str:
    """Write a value as YAML does."""
    return str(value).lower() if isinstance(value, bool) or value is None else str(value)
