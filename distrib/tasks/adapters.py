"""Adapters through `peft`: LoRA and others train few parameters beside a frozen model.

A task's `model()` calls `with_adapter`. Checkpoints of such a model hold what is trained, and know the frozen base by a
digest (run_folder/frozen.py). It needs `pip install 'distrib[huggingface]'`.
"""

import dataclasses
import functools
import re
import typing
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter, ValidationError
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from distrib.errors import ConfigError, and_more, did_you_mean
from distrib.extras import require
from distrib.run_folder.checkpoint import named_state
from distrib.run_folder.frozen import leave_out
from distrib.task import Task, method_of
from distrib.tasks.pretrained import refused

KEY = "task.adapter"
_EXAMPLE = "{type: lora, r: 16, alpha: 32, target_modules: [q_proj, v_proj]}"
_NOT_HERE = {  # types of peft that a step of training cannot serve
    "adalora": "it must be told the number of steps, and changes its ranks after each",
    "adaption_prompt": "it is for some models of one task only",
    "osf": "it changes the frozen weights",
    "poly": "it needs a task for each sample",
    "shadow": "it adds a second model",
    "xlora": "it needs adapters that are trained already",
}
_PROMPTS = "it adds tokens of its own to each text"
_FIXED = {  # fields of peft's config that follow from the run
    *("peft_type", "task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision"),
    *("inference_mode", "runtime_config"),
}
_LORA_INITS = (True, False, "gaussian", "orthogonal")  # those that leave the frozen weights as they are
_NAME = "default"  # of the adapter: a part of the names of its parameters and buffers
_ALL = "all-linear"  # a target that peft knows
_MOST_SHOWN = 8


def checked(options: dict[str, Any], task_type: str | None = None) -> dict[str, Any]:
    """Return the options. Raises ConfigError if peft is not installed, or they are not those of an adapter."""
    _parse(options, task_type)
    return options


def with_adapter(model: nn.Module, options: dict[str, Any], task_type: str | None = None) -> nn.Module:
    """Return the model with an adapter from peft's get_peft_model, which freezes the rest. The model is changed.

    `options`: `type` and fields of peft's config, for example {"type": "lora", "r": 16, "target_modules": ["fc"]}.
    `alpha` means the field `lora_alpha`, and so on. With `base_dtype: bf16`, the frozen weights are stored in bf16.
    `task_type`: peft's. Raises ConfigError.
    """
    config, base_dtype = _parse(options, task_type)
    _require_modules(model, config)
    base = {id(parameter) for parameter in model.parameters()}
    from peft import get_peft_model

    with refused(KEY), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # about calls of one library by the other
        adapted: nn.Module = get_peft_model(model, config, _NAME)
    if base_dtype is not None:
        _store(adapted, base, base_dtype)
    leave_out(parameter for parameter in adapted.parameters() if not parameter.requires_grad)
    return adapted


def exporter(model: nn.Module, task: Task, merged: bool) -> Callable[[Path], None]:
    """Return a function that writes the model into a folder, after a checkpoint was loaded into it.

    It writes peft's own files; or with `merged`, or if only a part of the model has an adapter, whole weights in the
    form of the task.
    """
    from peft import PeftModel

    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}

    def write(folder: Path) -> None:
        if merged or not isinstance(model, PeftModel):
            method_of(task, "export")(_weights(merge(model) if merged else model), folder)
            return
        for name, buffer in model.named_buffers():
            if _NAME not in name.split(".") and not torch.equal(buffer, buffers[name]):
                raise ConfigError(
                    f"{folder.parent}: training has changed the buffer {name} of the base model, which peft's files do "
                    "not hold; export with --merged"
                )
        model.save_pretrained(folder, save_embedding_layers=False)

    return write


def merge(model: nn.Module) -> nn.Module:
    """Return a model with adapters as one without: their effect is added to the weights, in fp32. Raises ConfigError.

    The model is changed.
    """
    from peft import PeftModel
    from peft.tuners.tuners_utils import BaseTunerLayer

    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(torch.promote_types(parameter.dtype, torch.float32))
    uses = Counter(id(one) for part in model.modules() for one in part.parameters(recurse=False))
    for part in model.modules():
        if isinstance(part, BaseTunerLayer):  # its weights change, and not those that are tied to them
            layer = part.get_base_layer()
            for name, parameter in list(layer.named_parameters(recurse=False)):
                if uses[id(parameter)] > 1:
                    setattr(layer, name, nn.Parameter(parameter.detach().clone()))
    with refused("--merged"):
        if isinstance(model, PeftModel):
            return model.merge_and_unload()  # type: ignore[no-any-return]
        for name, part in list(model.named_modules()):
            if isinstance(part, PeftModel):
                model.set_submodule(name, part.merge_and_unload())
    return model


def _weights(model: nn.Module) -> dict[str, Tensor]:
    """Return the state_dict. Two names of a tied parameter map to the same tensor."""
    named, tied = named_state(model)
    weights = {name: tensor.detach() for name, tensor in named.items()}
    return {**weights, **{name: weights[first] for name, first in tied.items()}}


def _parse(options: Any, task_type: str | None) -> tuple[Any, torch.dtype | None]:
    """Return peft's config, and the dtype to store the frozen weights in; None: their own. Raises ConfigError."""
    require("huggingface", f"{KEY}: an adapter", "peft")
    import peft

    if not isinstance(options, dict):
        raise ConfigError(f"{KEY}: {options!r}; give a section, for example {_EXAMPLE}")
    values = dict(options)
    kind, base_dtype = values.pop("type", None), values.pop("base_dtype", None)
    classes: dict[str, Any] = {one.value.lower(): config for one, config in peft.PEFT_TYPE_TO_CONFIG_MAPPING.items()}
    refusals = {one: _PROMPTS for one, config in classes.items() if issubclass(config, peft.PromptLearningConfig)}
    refusals.update(_NOT_HERE)
    if reason := refusals.get(kind) if isinstance(kind, str) else None:
        raise ConfigError(f"{KEY}.type: {kind}: {reason}, which distrib does not do; take another, for example lora")
    if kind not in classes:
        known = [one for one in classes if one not in refusals]
        hint = did_you_mean(str(kind), known, f"; there are {', '.join(known)}")
        what = f"{kind!r}: peft has no such adapter{hint}" if "type" in options else f"missing; for example {_EXAMPLE}"
        raise ConfigError(f"{KEY}.type: {what}")
    if base_dtype not in (None, "bf16"):
        raise ConfigError(f"{KEY}.base_dtype: {base_dtype!r}; give bf16, or leave it out for that of the model")
    given = _fields(classes[kind], kind, values)
    if kind == "lora" and given.get("init_lora_weights", True) not in _LORA_INITS:
        raise ConfigError(
            f"{KEY}.init_lora_weights: {given['init_lora_weights']!r} changes the frozen weights, so the adapter would "
            "not fit the base model; give true, gaussian or orthogonal"
        )
    with refused(KEY):
        return classes[kind](task_type=task_type, **given), None if base_dtype is None else torch.bfloat16


def _fields(config: type[Any], kind: str, values: dict[str, Any]) -> dict[str, Any]:
    """Return the fields of peft's config that these keys mean, of the types that it has. Raises ConfigError."""
    fields = [field.name for field in dataclasses.fields(config) if field.init and field.name not in _FIXED]
    types, found = typing.get_type_hints(config), {}
    for key, value in values.items():
        name = next((one for one in (key, f"{kind}_{key}") if one in fields), None)
        if name is None:
            short = [field.removeprefix(f"{kind}_") for field in fields]
            hint = did_you_mean(str(key), ["type", "base_dtype", *short, *fields], f"; {kind} has {', '.join(short)}")
            raise ConfigError(f"{KEY}.{key}: unknown key{hint}")
        try:
            found[name] = TypeAdapter(types[name]).validate_python(value, strict=True)
        except ValidationError as error:
            reasons = " or ".join(dict.fromkeys(one["msg"][0].lower() + one["msg"][1:] for one in error.errors()))
            raise ConfigError(f"{KEY}.{key}: {value!r}: {reasons}") from None
    return found


def _require_modules(model: nn.Module, config: Any) -> None:
    """Raise ConfigError if a name in `target_modules` or `modules_to_save` is that of no module."""
    names = [name for name, _ in model.named_modules() if name]
    targets, copied = getattr(config, "target_modules", None), getattr(config, "modules_to_save", None)
    for target in targets if isinstance(targets, list | set | tuple) else ():
        if not any(name == target or name.endswith(f".{target}") for name in names):
            raise _no_module("target_modules", target, model, names)
    if isinstance(targets, str) and targets != _ALL and not any(re.fullmatch(targets, name) for name in names):
        raise _no_module("target_modules", targets, model, names)
    for target in copied or ():
        if not any(name.endswith(target) for name in names):
            raise _no_module("modules_to_save", target, model, names)


def _no_module(key: str, given: str, model: nn.Module, names: list[str]) -> ConfigError:
    owners = [name for name in names if next(model.get_submodule(name).parameters(recurse=False), None) is not None]
    short = list(dict.fromkeys(name.rpartition(".")[2] for name in owners))
    hint = did_you_mean(given, [*short, *names], f"; it has {and_more(short, _MOST_SHOWN)}")
    return ConfigError(f"{KEY}.{key}: {given!r} is no module of {type(model).__name__}{hint}")


def _store(adapted: nn.Module, base: set[int], dtype: torch.dtype) -> None:
    """Store the frozen weights in another dtype, except those of a module that is also trained.

    A trained copy of a module (`modules_to_save`) computes in its own dtype, and returns this one.
    """
    from peft.utils import ModulesToSaveWrapper

    for part in adapted.modules():
        own = list(part.parameters(recurse=False))
        for parameter in own if not any(one.requires_grad for one in own) else ():
            if id(parameter) in base and parameter.is_floating_point():
                parameter.data = parameter.data.to(dtype)
        if isinstance(part, ModulesToSaveWrapper):
            for copy in part.modules_to_save.values():
                copy.register_forward_pre_hook(_to_fp32, with_kwargs=True)
                copy.register_forward_hook(functools.partial(_to, dtype))


def _to_fp32(_: nn.Module, args: Any, kwargs: Any) -> Any:
    return _cast(torch.float32, (args, kwargs))


def _to(dtype: torch.dtype, _: nn.Module, args: Any, output: Any) -> Any:
    return _cast(dtype, output)


def _cast(dtype: torch.dtype, values: Any) -> Any:
    return tree_map(lambda one: one.to(dtype) if isinstance(one, Tensor) and one.is_floating_point() else one, values)
