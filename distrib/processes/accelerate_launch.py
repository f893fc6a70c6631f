"""What `accelerate launch` was told, which it hands on in variables."""

from collections.abc import Mapping
from typing import Any

from distrib.errors import LaunchError
from distrib.processes.variables import whole_number


def what_accelerate_was_told(environ: Mapping[str, str]) -> dict[str, Any]:
    """By our config's keys. What it says by default is no wish, and left out."""
    told = {key: value.lower() for key, value in environ.items() if key.startswith(("ACCELERATE_", "FSDP_"))}
    asked: dict[str, Any] = {}
    if told.get("ACCELERATE_MIXED_PRECISION", "no") != "no":
        asked["train.mixed_precision"] = told["ACCELERATE_MIXED_PRECISION"]
    if (backend := told.get("ACCELERATE_DYNAMO_BACKEND", "no")) not in ("no", ""):
        parts = "blocks" if told.get("ACCELERATE_DYNAMO_USE_REGIONAL_COMPILATION") == "true" else "model"
        asked["train.compile"] = parts if backend == "inductor" else f"by the backend {backend}"
    for other in ("megatron_lm", "parallelism_config"):
        if told.get(f"ACCELERATE_USE_{other.upper()}") == "true":
            asked["strategy.name"] = other
    if told.get("ACCELERATE_USE_FSDP") == "true":
        asked["strategy.name"] = f"fsdp{told.get('FSDP_VERSION', '1')}"
        for option, variable, value, wish in (
            ("offload", "FSDP_OFFLOAD_PARAMS", "true", "all"),
            ("reshard_after_forward", "FSDP_RESHARD_AFTER_FORWARD", "false", False),
            ("activation_checkpointing", "FSDP_ACTIVATION_CHECKPOINTING", "true", True),
        ):
            if told.get(variable) == value:
                asked[f"strategy.{option}"] = wish
        if ignored := environ.get("FSDP_IGNORED_MODULES"):
            asked["fsdp_ignored_modules"] = ignored
        if told.get("FSDP_ACTIVATION_CHECKPOINTING_OFFLOAD") == "true":
            asked["fsdp_activation_checkpointing_offload"] = True
        if wrap := environ.get("FSDP_TRANSFORMER_CLS_TO_WRAP"):
            asked["fsdp_transformer_layer_cls_to_wrap"] = wrap
        elif told.get("FSDP_AUTO_WRAP_POLICY") == "size_based_wrap":
            asked["fsdp_auto_wrap_policy"] = "SIZE_BASED_WRAP"
    if told.get("ACCELERATE_USE_DEEPSPEED") == "true":
        if "ACCELERATE_DEEPSPEED_CONFIG_FILE" in environ:
            asked["strategy.name"] = "deepspeed"  # which stage, stands in the file
            asked["strategy.deepspeed"] = environ["ACCELERATE_DEEPSPEED_CONFIG_FILE"]
        else:
            asked["strategy.name"] = f"zero{told.get('ACCELERATE_DEEPSPEED_ZERO_STAGE', '2')}"
        if told.get("ACCELERATE_GRADIENT_CLIPPING", "none") != "none":
            try:
                asked["train.max_grad_norm"] = float(told["ACCELERATE_GRADIENT_CLIPPING"])
            except ValueError:
                clipping = told["ACCELERATE_GRADIENT_CLIPPING"]
                raise LaunchError(f"ACCELERATE_GRADIENT_CLIPPING={clipping!r} is not a number") from None
        if told.get("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "1") not in ("1", "auto"):
            asked["grad_accum_steps"] = whole_number(told, "ACCELERATE_GRADIENT_ACCUMULATION_STEPS")
        for what, wish in (("OPTIMIZER", "optimizer"), ("PARAM", "all")):
            device = told.get(f"ACCELERATE_DEEPSPEED_OFFLOAD_{what}_DEVICE", "none")
            if device != "none":
                asked["strategy.offload"] = wish if device == "cpu" else device
    return asked
