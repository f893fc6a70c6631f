"""Makes DeepSpeed's JSON from our config. If both set an option, the user's DeepSpeed JSON must have the same value."""

import copy
import json
from pathlib import Path
from typing import Any

from distrib.config import Config
from distrib.errors import ConfigError
from distrib.plan import BatchPlan

_DTYPES = {"bf16": "bfloat16", "fp16": "float16"}
_PERSISTENCE = "stage3_param_persistence_threshold"
_OTHERS_DECIDE = {"optimizer": "optim", "scheduler": "optim.schedule", "data_types": "train.mixed_precision"}


def compile_config(
    config: Config, stage: int, offload: str, options: dict[str, Any] | str, batches: BatchPlan
) -> dict[str, Any]:
    """Return the JSON for a stage of ZeRO. Options that nobody sets, such as bucket sizes, have DeepSpeed's defaults.

    `options`: the config's key strategy.deepspeed. Raises ConfigError, which names both values, if it contradicts
    another key.
    """
    given, problems = copy.deepcopy(_read(options)), []
    for key, decided_by in _OTHERS_DECIDE.items():
        if key in given:
            problems.append(f"{key} is decided by {decided_by}; leave it out")
            del given[key]
    problems += _check_precision(given, config.train.mixed_precision)
    result, keys = _ours(config, stage, offload, batches)
    _merge(result, given, keys, problems)
    if problems:
        raise ConfigError(f"strategy.deepspeed: {'; '.join(problems)}")
    return result


def _check_precision(given: dict[str, Any], mixed_precision: str) -> list[str]:
    """Return one line for each option in the sections bf16 and fp16 that does not fit train.mixed_precision.

    DeepSpeed's own bf16 and fp16 stay off, because distrib uses torch's autocast, as under every other strategy.
    """
    problems = []
    for name in ("bf16", "fp16"):
        section, wanted = given.get(name), mixed_precision == name
        if not isinstance(section, dict):
            continue
        if section.get("enabled", "auto") not in ("auto", wanted):
            makes = json.dumps(wanted)
            problems.append(
                f"{name}.enabled is {json.dumps(section['enabled'])}, but train.mixed_precision makes it {makes}; "
                'leave it out, or write "auto"'
            )
        elif wanted:
            further = [key for key, value in section.items() if key != "enabled" and value != "auto"]
            problems += [f"{name}.{key} has no effect: precision is train.mixed_precision's" for key in further]
        given[name] = {**section, "enabled": "auto"}
    return problems


def stage_of(options: dict[str, Any] | str) -> int:
    """Return the stage of a DeepSpeed JSON. DeepSpeed's default is 0. Raises ConfigError."""
    stage = _zero(options).get("stage", 0)
    if stage not in range(4):
        raise ConfigError(f"strategy.deepspeed: zero_optimization.stage is {stage!r}; give 0, 1, 2 or 3")
    return int(stage)


def offload_of(options: dict[str, Any] | str, strategy: str) -> str:
    """Return what a DeepSpeed JSON offloads to the CPU under `strategy`: none, optimizer or all. Raises ConfigError."""
    parts = {part: _zero(options).get(part) for part in ("offload_optimizer", "offload_param")}
    devices = {part: value.get("device") if isinstance(value, dict) else None for part, value in parts.items()}
    if devices["offload_param"] == "cpu" and strategy == "zero3":
        return "all"
    return "optimizer" if devices["offload_optimizer"] == "cpu" and strategy != "zero0" else "none"


def persistence_threshold(options: dict[str, Any] | str) -> int:
    """Return the most elements that a parameter may have to stay whole on every rank at stage 3. Raises ConfigError."""
    given = _zero(options).get(_PERSISTENCE, "auto")
    return 100_000 if given == "auto" else int(given)


def _read(options: dict[str, Any] | str) -> dict[str, Any]:
    """Return the options. If `options` is the path of a JSON file, read it."""
    if not isinstance(options, str):
        return options
    try:
        loaded = json.loads(Path(options).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"strategy.deepspeed: {options}: cannot read it as JSON: {error}") from None
    if not isinstance(loaded, dict):
        raise ConfigError(f"strategy.deepspeed: {options}: holds a {type(loaded).__name__}, not an object")
    return loaded


def _zero(options: dict[str, Any] | str) -> dict[str, Any]:
    """Return the section zero_optimization. Raises ConfigError if it is not one."""
    section = _read(options).get("zero_optimization", {})
    if not isinstance(section, dict):
        raise ConfigError(f"strategy.deepspeed: zero_optimization is {json.dumps(section)}; it is an object of options")
    return section


def _ours(config: Config, stage: int, offload: str, batches: BatchPlan) -> tuple[dict[str, Any], dict[str, str]]:
    """Return the options that distrib sets, and for each (with dots) the key of our config that decides it."""
    data, train, dtype = config.data, config.train, config.strategy.communication_dtype
    if stage and (dtype, train.mixed_precision) == ("bf16", "fp16"):
        raise ConfigError(
            f"strategy.communication_dtype: bf16, but with train.mixed_precision fp16 zero{stage} would send "
            "gradients in fp16; give fp32, or train in bf16"
        )
    autocast: dict[str, Any] = {"enabled": train.mixed_precision != "no"}
    if autocast["enabled"]:
        autocast["dtype"] = _DTYPES[train.mixed_precision]
        if dtype == "fp32":
            autocast["lower_precision_safe_modules"] = []  # otherwise their gradients would be sent in bf16 or fp16
    zero: dict[str, Any] = {"stage": stage}
    if stage:
        zero["offload_optimizer"] = {"device": "none" if offload == "none" else "cpu"}
    if stage == 3:
        zero["memory_efficient_linear"] = False  # it rounds differently in bf16, and replaces torch's for good
        zero["offload_param"] = {"device": "cpu" if offload == "all" else "none"}
    ours = {
        "train_batch_size": data.global_batch_size,
        "train_micro_batch_size_per_gpu": data.micro_batch_size,
        "gradient_accumulation_steps": batches.grad_accum_steps,
        "gradient_clipping": train.max_grad_norm or 0.0,
        "torch_autocast": autocast,
        "fp16": {"enabled": False},
        "bf16": {"enabled": False},
        "communication_data_type": dtype,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }
    keys = {
        "train_batch_size": "data.global_batch_size",
        "train_micro_batch_size_per_gpu": "data.micro_batch_size",
        "gradient_accumulation_steps": "grad_accum_steps",
        "gradient_clipping": "train.max_grad_norm",
        "torch_autocast": "train.mixed_precision",
        "fp16": "train.mixed_precision",
        "bf16": "train.mixed_precision",
        "communication_data_type": "strategy.communication_dtype",
        "zero_optimization.stage": "strategy.name",
        "zero_optimization.offload_optimizer": "strategy.offload",
        "zero_optimization.offload_param": "strategy.offload",
        "zero_optimization.memory_efficient_linear": "equality with other strategies",
        "zero_allow_untested_optimizer": "optim",
        "zero_force_ds_cpu_optimizer": "optim",
    }
    return ours, keys


def _merge(
    ours: dict[str, Any], given: dict[str, Any], keys: dict[str, str], problems: list[str], prefix: str = ""
) -> None:
    """Add the options of `given` to `ours`. For each option that differs, add a line to `problems`.

    "auto" means our value, or DeepSpeed's default if distrib does not set the option.
    """
    for name, value in given.items():
        path = f"{prefix}{name}"
        if value == "auto":
            continue
        if isinstance(value, dict) and isinstance(ours.setdefault(name, {}), dict):
            _merge(ours[name], value, keys, problems, f"{path}.")
        elif name not in ours:
            ours[name] = value
        elif value != ours[name]:
            decided_by = next(
                key
                for option, key in keys.items()
                if f"{path}.".startswith(f"{option}.") or option.startswith(f"{path}.")
            )
            problems.append(
                f"{path} is {json.dumps(value)}, but {decided_by} makes it {json.dumps(ours[name])}; "
                'leave it out, or write "auto"'
            )
