"""The config's strategy: which one runs, whether its options fit, and the placement that it means."""

import functools
import os
from typing import Any, get_args

from pydantic import ValidationError
from torch import nn
from torch.utils.checkpoint import checkpoint

from distrib.config import Config, StrategyConfig, StrategyName
from distrib.errors import ConfigError, LaunchError
from distrib.plan import window_size
from distrib.processes.world import World
from distrib.strategies.base import MakeOptimizer, Strategy
from distrib.strategies.bitwise_ddp import BitwiseDDP
from distrib.strategies.compile import compile_forwards
from distrib.strategies.ddp import DDP
from distrib.strategies.deepspeed_config import compile_config, offload_of, stage_of

_ZERO = ("zero0", "zero1", "zero2", "zero3")
_WRAP = "fsdp_transformer_layer_cls_to_wrap"
_TF32 = ("NVIDIA_TF32_OVERRIDE", "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE")
# Which strategies an option is for; the others would ignore it.
_FOR: tuple[tuple[str, Any, tuple[str, ...]], ...] = (
    ("offload", "optimizer", ("zero1", "zero2", "zero3")),
    ("offload", "all", ("zero3", "fsdp2")),
    ("find_unused_parameters", True, ("single", "ddp")),
    ("static_graph", True, ("single", "ddp")),
    ("reshard_after_forward", False, ("fsdp2",)),
)
# torch.optim's classes that look at whole matrices, of which shards would make another function, or do what a DTensor
# does not know.
_NOT_FOR_SHARDS = {**dict.fromkeys(_ZERO[1:], ("adafactor", "muon")), "fsdp2": ("adafactor", "muon", "rprop")}


def resolve(config: Config, world: World) -> StrategyConfig:
    """The strategy that runs, under its own name: `auto` follows the launcher.

    Raises LaunchError where launcher and config contradict each other, with both sides named, and ConfigError where
    the options of the strategy do not fit.
    """
    values = config.strategy.model_dump()
    for key, asked in world.asked.items():
        section, _, option = key.partition(".")
        is_set = option in config.strategy.model_fields_set and values.get(option) != "auto"
        if key == _WRAP:  # see `check_wrapped`: the model is not there yet
            continue
        if section == "strategy" and not is_set:
            values[option] = asked
        elif (ours := _value(config, key, world)) != asked:
            raise LaunchError(
                f"accelerate launch was told {key}: {_text(asked)}, the config makes it {_text(ours)}; give both the "
                "same, or leave it out of one"
            )
    if values["name"] == "auto":
        values["name"] = "ddp" if world.world_size > 1 else "single"
    elif values["name"] == "deepspeed":  # accelerate launch names a JSON file in which the stage stands
        values["name"] = f"zero{stage_of(values['deepspeed'])}"
    if values["name"] in _ZERO and values["offload"] == "none":
        values["offload"] = offload_of(values["deepspeed"], values["name"])
    if values["name"] not in get_args(StrategyName):
        raise LaunchError(
            f"accelerate launch was told to use {values['name']}, which distrib does not run; it runs "
            f"{', '.join(get_args(StrategyName)[1:])} (for FSDP: fsdp_version: 2)"
        )
    try:
        strategy = StrategyConfig.model_validate(values)
    except ValidationError as error:
        (first, *_) = error.errors()
        raise LaunchError(
            f"accelerate launch: strategy.{first['loc'][0]}: {first['input']!r}: {first['msg']}"
        ) from None
    _check(strategy, config, world)
    return strategy


def check_wrapped(world: World, blocks: list[nn.Module]) -> None:
    """Raise LaunchError if accelerate launch names other classes to wrap than those of the task's blocks."""
    if _WRAP in world.asked:
        asked = {name.strip() for name in world.asked[_WRAP].split(",")}
        found = {type(block).__name__ for block in blocks}
        if asked != found:
            raise LaunchError(
                f"accelerate launch was told {_WRAP}: {', '.join(sorted(asked))}, but Task.blocks gives "
                f"{', '.join(sorted(found)) or 'none'}; leave it out there, or return those blocks from Task.blocks"
            )


def place(
    strategy: StrategyConfig,
    config: Config,
    world: World,
    module: nn.Module,
    blocks: list[nn.Module],
    make_optimizer: MakeOptimizer | None = None,
) -> Strategy:
    """Wrap, shard and replicate. Without `make_optimizer` only for evaluation. Collective."""
    placement = _place(strategy, config, world, module, blocks, make_optimizer)
    placement.name = strategy.name
    return placement


def _place(
    strategy: StrategyConfig,
    config: Config,
    world: World,
    module: nn.Module,
    blocks: list[nn.Module],
    make_optimizer: MakeOptimizer | None,
) -> Strategy:
    compiled = []
    if config.train.compile and make_optimizer is not None:
        compiled = blocks if config.train.compile == "blocks" else [module]
        compile_forwards(compiled)
    if strategy.activation_checkpointing and make_optimizer is not None:
        for block in blocks:
            block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)
    if strategy.name == "fsdp2":
        from distrib.strategies.fsdp2 import FSDP2  # torch's FSDP takes its time to import, as DeepSpeed does

        return FSDP2(world, module, make_optimizer, strategy, blocks, config.train.mixed_precision)
    if strategy.name in _ZERO:
        from distrib.strategies.deepspeed import ZeRO

        options = compile_config(config, strategy, world.world_size)
        return ZeRO(world, module, make_optimizer, options, whole=compiled)
    if config.train.determinism == "bitwise":
        return BitwiseDDP(world, module, make_optimizer)
    return DDP(world, module, make_optimizer, strategy)


def _check(strategy: StrategyConfig, config: Config, world: World) -> None:
    name = strategy.name
    if name == "single" and world.world_size > 1:
        raise ConfigError(
            f"strategy.name: single, but {world.launcher} started {world.world_size} processes; use ddp or auto, "
            "or start one process"
        )
    for option, value, strategies in _FOR:
        if getattr(strategy, option) == value and name not in strategies:
            raise ConfigError(
                f"strategy.{option}: {_text(value)} is for {', '.join(strategies)}, and the strategy is {name}; "
                "leave it out, or take one of those"
            )
    if strategy.deepspeed and name not in _ZERO:
        raise ConfigError(f"strategy.deepspeed: is for {', '.join(_ZERO)}, and the strategy is {name}; leave it out")
    if config.optim.name.lower() in _NOT_FOR_SHARDS.get(name, ()):
        raise ConfigError(f"optim.name: {config.optim.name} cannot update the shards of {name}; take another, or ddp")
    if config.train.determinism == "bitwise":
        _check_bitwise(strategy, config)
    if config.train.compile:
        _check_compile(strategy, config)
    if name in _ZERO:
        compile_config(config, strategy, world.world_size)
    for variable in _TF32:
        if not world.use_cpu and os.environ.get(variable, "0") != "0":
            raise LaunchError(
                f"{variable}={os.environ[variable]}: matrix products in fp32 would be computed in TF32, of which the "
                "config says nothing; unset it, or train with train.mixed_precision bf16"
            )


def _check_bitwise(strategy: StrategyConfig, config: Config) -> None:
    if strategy.name not in ("single", "ddp"):
        raise ConfigError(
            f"train.determinism: bitwise is for single and ddp, and the strategy is {strategy.name}, whose library "
            "sums in an order of its own; take one of those, or fast"
        )
    for option in ("communication_dtype", "find_unused_parameters", "static_graph"):
        if getattr(strategy, option) != StrategyConfig.model_fields[option].default:
            raise ConfigError(
                f"strategy.{option}: {_text(getattr(strategy, option))} is not for train.determinism: bitwise, which "
                "reduces gradients itself; leave it out"
            )
    micro_batches = window_size(config, 1)
    if micro_batches & (micro_batches - 1):
        raise ConfigError(
            f"train.determinism: bitwise sums in a binary tree, and a step has {micro_batches} micro-batches "
            f"({config.data.global_batch_size} / {config.data.micro_batch_size}); make it a power of two"
        )


def _check_compile(strategy: StrategyConfig, config: Config) -> None:
    compile, name = config.train.compile, strategy.name
    if config.train.determinism == "bitwise":
        raise ConfigError(
            f"train.compile: {compile} is not for train.determinism: bitwise, as the order of sums in compiled code is "
            "the compiler's choice on each process; give false, or fast"
        )
    if compile == "model" and name in ("zero3", "fsdp2"):
        raise ConfigError(
            f"train.compile: model, but {name} gathers the model's parameters part by part as the forward goes on, "
            "which one graph of it cannot; take blocks"
        )
    if compile == "model" and strategy.activation_checkpointing:
        raise ConfigError(
            "train.compile: model, which itself chooses what the backward computes again; leave "
            "strategy.activation_checkpointing out, or take blocks"
        )


def _value(config: Config, key: str, world: World) -> Any:
    """What the config makes of a key that a launcher speaks of."""
    if key == "grad_accum_steps":
        return window_size(config, world.world_size)
    if key == "fsdp_auto_wrap_policy":
        return "what Task.blocks gives"
    if key.startswith("fsdp_"):  # an option that distrib does not have
        return None
    section, option = key.split(".")
    return getattr(getattr(config, section), option)


def _text(value: Any) -> str:
    """As in YAML."""
    return str(value).lower() if isinstance(value, bool) or value is None else str(value)
