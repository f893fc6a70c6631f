"""The runs that each world (a launch on 1 to 4 processes) makes. test_parity, test_verdicts and others check them.

Starting processes takes most of the time of these tests, so one launch makes many runs.
"""

from typing import Any

import initial

WORLDS = (1, 2, 3, 4)
SHARDED_WORLDS = (1, 2, 4)
LATE_WORLDS = (1, 2)
SHARDED = ("zero0", "zero1", "zero2", "zero3", "fsdp2")
HSDP = {"name": "hsdp", "shard_size": 2}  # on four processes
OWNED = ("muon", "adafactor", "lars")  # need whole matrices, so owners update them under CUT
CUT = ("zero1", "zero2", "zero3", "fsdp2")
GROUPED = [*((name, "classes") for name in ("auto", *SHARDED)), ("auto", "muon"), ("zero0", "muon")]
ON = [(count, name) for count in SHARDED_WORLDS for name in ("auto", *SHARDED)] + [(4, "hsdp")]
MASKED = {"target": "tasks:Masked"}

# test_parity
PARITY_STEPS, MICRO = 60, 4
WINDOWS = {"sgd": (1, 2, 3, 6), "adamw": (3,)}  # micro-batches a step, on each rank
SHARDED_WINDOWS = {"sgd": (1,), "adamw": (2,)}
OPTIMIZERS: dict[str, dict[str, Any]] = {
    "sgd": {"name": "sgd", "lr": 0.5},  # Adam would hide a wrong scale of the gradient
    "adamw": {"name": "adamw", "lr": 0.01, "weight_decay": 0.1, "schedule": "cosine", "warmup_steps": 10},
}
CLIP = {"sgd": None, "adamw": 0.5}

# test_early_stopping
STOP: dict[str, Any] = {"patience": 3, "min_delta": 0.01}
STOP_EVERY, STOP_STEPS = 3, 100

# test_ema
EMA_STEPS = 20
EMAS: dict[str, dict[str, Any]] = {
    "usual": {},
    "late": {"decay": 0.9, "every_steps": 2, "start_step": 3},
    "fast": {"decay": 0.5},  # this one and the next under auto and zero2
    "none": {"decay": 0.0},
}

# test_initial_runs: strategy and source, by the number of processes
INIT_STEPS = 30
INIT: dict[int, dict[str, str]] = {
    1: {"single": initial.FILE},
    2: {
        "ddp": initial.PICKLE,
        "bitwise": initial.FILE,
        "zero2": initial.FOLDER,
        "zero3": initial.FILE,
        "fsdp2": initial.PICKLE,
        "fsdp2-run": "init-zero3",
    },
    4: {"hsdp": initial.FOLDER},
}

# test_schedules
SCHEDULED_STEPS = 30
SCHEDULED: dict[str, dict[str, Any]] = {
    "wsd": {"warmup_steps": 4, "schedule": {"name": "wsd", "decay_steps": 10, "min_lr_ratio": 0.1}},
    "pieces": {
        "schedule": [
            {"name": "warmup", "steps": 4},
            {"name": "cosine", "steps": 10, "min_lr_ratio": 0.2},
            {"name": "step", "steps": 6, "step_size": 2, "gamma": 0.7},
            {"name": "linear", "max_lr_ratio": 0.6},
        ]
    },
}

# test_groups: the first group that fits
GROUPS: dict[str, list[dict[str, Any]]] = {
    "classes": [
        {"match": "2.0.weight", "freeze": True},
        {"match": "*.bias", "name": "sgd", "lr": 0.5, "momentum": 0.9, "weight_decay": 0.01},
        {"match": ["0.*", "nothing*"], "lr": 0.02, "weight_decay": 0.0},
    ],
    "muon": [{"match": "[12].*", "ndim": 2, "name": "muon", "lr": 0.02}],
    "adafactor": [{"match": "[12].*", "name": "adafactor", "lr": 0.1}],  # of matrices it keeps two vectors
}

# test_groups: frozen for some steps, and groups with schedules of their own
UNFREEZE_AT = 7
FROZEN = ("1.*", "2.0.*")
UNFROZEN = ("auto", "zero1", "zero3", "fsdp2")  # on two processes
OWN_SCHEDULE = {"match": "*.bias", "lr": 0.1, "schedule": [{"name": "warmup", "steps": 3}, {"name": "cosine"}]}

# test_adapted
ADAPTED = ("auto", "zero2", "zero3", "fsdp2")
ADAPTERS: dict[str, dict[str, Any]] = {"usual": {}, "dropout": {"dropout": 0.2}, "bf16": {"base_dtype": "bf16"}}
ADAPTED_STEPS = {"usual": 30, "dropout": 8, "bf16": 6}

# test_verdicts and test_strategies
STEPS = 40
FEW, EVERY = 12, 5
PRECISIONS = ("no", "bf16", "fp16")
MISHAPS = ("nan", "inf", "fp16-inf", "nan-first", "nothing")
OPTIONS: dict[str, dict[str, Any]] = {
    "zero1-offload": {"name": "zero1", "offload": "optimizer"},
    "zero3-offload": {"name": "zero3", "offload": "all"},
    "fsdp2-offload": {"name": "fsdp2", "offload": "all"},
    "fsdp2-kept": {"name": "fsdp2", "reshard_after_forward": False},
    "ddp-checkpointing": {"name": "ddp", "activation_checkpointing": True},
    "zero2-checkpointing": {"name": "zero2", "activation_checkpointing": True},
    "zero3-checkpointing": {"name": "zero3", "activation_checkpointing": True},
    "fsdp2-checkpointing": {"name": "fsdp2", "activation_checkpointing": True},
    "ddp-static": {"name": "ddp", "static_graph": True},
    "zero3-json": {
        "name": "zero3",
        "deepspeed": {
            "zero_optimization": {"reduce_bucket_size": 1000, "stage3_param_persistence_threshold": 0},
            "train_batch_size": "auto",
        },
    },
}
SCALARS = ("ddp", "zero0", "zero1", "zero2")  # the others cannot shard a scalar parameter
COMPRESSED = ("ddp", "zero0", "zero2", "zero3", "fsdp2")
EMA_OPTIONS = ("zero1-offload", "fsdp2-offload", "ddp-static")


def cases(world: int) -> dict[str, dict[str, Any]]:
    """Return name and config of each run."""
    found = _parity_cases(world)
    if world in (1, 2):
        found.update({f"precision-{name}": _config(STEPS, mixed_precision=name) for name in PRECISIONS})
    if world == 2:
        found.update(_strategy_cases())
        found.update(_adapted_cases())
    if world in SHARDED_WORLDS:
        found.update(_scheduled_cases())
        grouped = GROUPED if world == 2 else [pair for pair in GROUPED if pair[0] == "auto"]
        found.update({f"{name}-{groups}": _grouped(groups, {"name": name}) for name, groups in grouped})
        found.update(_owned_cases(world))
        for name in UNFROZEN if world == 2 else ("auto",):
            found[f"{name}-unfrozen"] = _unfrozen(name)
        found["bitwise-muon"] = _grouped("muon", {}, determinism="bitwise")
        found.update(_ema_cases(world))
        found.update({f"bitwise-{precision}": config for precision, config in BITWISE.items()})
        found.update(_buffer_cases(world))
        found.update(_initial_cases(world))
    if world == 4:
        found.update({f"{name}-no": _config(FEW, strategy={"name": name}) for name in ("ddp", *SHARDED)})
        found.update(_hsdp_cases())
    for config in found.values():
        if config.get("strategy", {}).get("name") == "zero3":
            # By default each engine keeps a bucket of 2 GB, and a process with 24 GB of them cannot fork.
            config["strategy"] = {
                "deepspeed": {"zero_optimization": {"reduce_bucket_size": 10**6}},
                **config["strategy"],
            }
    return found


def resumed(world: int) -> list[str]:
    """Return the names of the runs that are also interrupted and resumed."""
    if world == 2:
        return [
            *(f"{name}-pieces" for name in ("auto", *SHARDED)),
            *(f"{name}-{precision}" for name in ("ddp", *SHARDED) for precision in PRECISIONS),
            *(f"ema-late-{name}" for name in ("auto", *SHARDED)),
            *(f"{name}-classes" for name in ("auto", *SHARDED)),
            *(f"{name}-muon" for name in CUT),
            *("zero2-adafactor", "fsdp2-lars"),
            *(f"{name}-unfrozen" for name in UNFROZEN),
            *(f"adapted-dropout-{name}" for name in ADAPTED),
            *("ddp-static", "stream-0", "stream-2", "buffers-ddp", "buffers-zero1", "buffers-fsdp2"),
            *("bitwise-formats", "zero2-formats", "fsdp2-formats"),
            *(f"init-{name}" for name in ("ddp", "zero2", "zero3", "fsdp2")),
        ]
    if world == 4:
        return [*(f"{name}-no" for name in ("ddp", *SHARDED)), "hsdp-no", "hsdp-fp16", "ema-late-hsdp"]
    return []


def moved(world: int) -> list[tuple[str, str]]:
    """The runs that are interrupted and gone on with under another strategy."""
    return [pair for name in ("ddp", *SHARDED) for pair in ((name, "hsdp"), ("hsdp", name))] if world == 4 else []


def _parity_cases(world: int) -> dict[str, dict[str, Any]]:
    strategies = ("auto", *SHARDED) if world in SHARDED_WORLDS else ("auto",)
    found = {
        f"{strategy}-{optimizer}-{window}": parity_config(optimizer, world * window * MICRO, strategy)
        for strategy in strategies
        for optimizer in OPTIMIZERS
        for window in (WINDOWS if strategy == "auto" else SHARDED_WINDOWS)[optimizer]
    }
    if world in SHARDED_WORLDS:
        found.update({f"stops-{strategy}": stop_config(strategy) for strategy in strategies})
        found["dropout"] = parity_config("sgd", 16, dropout=0.3)
    return found


def parity_config(optimizer: str, batch: int, strategy: str = "auto", **task: float) -> dict[str, Any]:
    return {
        "seed": 7,
        "task": {**MASKED, **task},
        "data": {"global_batch_size": batch, "micro_batch_size": MICRO},
        "optim": OPTIMIZERS[optimizer],
        "train": {"steps": PARITY_STEPS, "max_grad_norm": CLIP[optimizer]},
        "strategy": {"name": strategy},
    }


def stop_config(strategy: str) -> dict[str, Any]:
    """A run that stops early, keeps its best checkpoint, and reduces its rate on a plateau."""
    return {
        **parity_config("adamw", 16, strategy, sums=True),
        "optim": {"name": "adamw", "lr": 0.01, "plateau": {"patience": 0, "factor": 0.5}},
        "train": {"steps": STOP_STEPS, "stop": STOP},
        "eval": {"every_steps": STOP_EVERY},
        "checkpoint": {"every_steps": 0, "keep": 1, "best": {"metric": "eval/right", "mode": "max"}},
    }


def emas_of(strategy: str) -> dict[str, dict[str, Any]]:
    """Return the averages that are kept under a strategy: all under the usual one, else the one that begins late."""
    wanted = EMAS if strategy == "auto" else ("usual", "late") if strategy == "hsdp" else ("late",)
    return {name: EMAS[name] for name in wanted}


def _ema_cases(world: int) -> dict[str, dict[str, Any]]:
    """Return the runs that average their weights. One has steps that are skipped, and saves each step."""
    found: dict[str, dict[str, Any]] = {}
    for name in ("auto", *SHARDED, *(["hsdp"] if world == 4 else [])):
        strategy = HSDP if name == "hsdp" else {"name": name}
        for key, ema in emas_of(name).items():
            found[f"ema-{key}-{name}"] = {
                **parity_config("sgd", 16),
                "train": {"steps": EMA_STEPS, "ema": ema},
                "strategy": strategy,
                "eval": {"every_steps": EVERY if key == "late" else 0},
                "checkpoint": {"every_steps": EVERY, "keep": 9},
            }
        if world == 2 or name == "hsdp":
            mishap = _mishap("fp16-inf", strategy)
            found[f"ema-fp16-{name}"] = {
                **mishap,
                "train": {**mishap["train"], "ema": {"decay": 0.8, "every_steps": 2, "start_step": 1}},
                "checkpoint": {"every_steps": 1, "keep": FEW},
            }
    if world == 2:
        found.update(
            {f"ema-late-{name}": {**found["ema-late-auto"], "strategy": OPTIONS[name]} for name in EMA_OPTIONS}
        )
    return found


def adapted(how: str, strategy: str) -> dict[str, Any]:
    """Return a run that trains an adapter, and no other parameters."""
    return {
        **_config(ADAPTED_STEPS[how], {"target": "adapted:Adapted", **ADAPTERS[how]}, {"name": strategy}),
        "optim": {"name": "adamw", "lr": 0.01, "weight_decay": 0.1},
        "checkpoint": {"every_steps": EVERY if how == "dropout" else 0},
    }


def _adapted_cases() -> dict[str, dict[str, Any]]:
    wanted = {"usual": ADAPTED, "dropout": ADAPTED, "bf16": ("auto", "zero3", "fsdp2")}
    return {f"adapted-{how}-{name}": adapted(how, name) for how, names in wanted.items() for name in names}


def _initial_cases(world: int) -> dict[str, dict[str, Any]]:
    """Return the runs that begin with weights from elsewhere."""
    found: dict[str, dict[str, Any]] = {}
    for name, source in INIT[world].items():
        train: dict[str, Any] = {"steps": INIT_STEPS, "ema": {"decay": 0.9}}
        init: dict[str, Any] = {"from": source, **initial.OPTIONS}
        strategy: dict[str, Any] = HSDP if name == "hsdp" else {"name": name.removesuffix("-run")}
        if name == "bitwise":
            strategy, train = {}, {**train, "determinism": "bitwise"}
        if source.startswith("init-"):
            init = {"from": source, "checkpoint": EVERY, "exclude": f"{initial.HEAD}*"}
        found[f"init-{name}"] = {
            **parity_config("sgd", 16),
            "train": train,
            "strategy": strategy,
            "init": init,
            "checkpoint": {"every_steps": EVERY, "keep": 9},
        }
    return found


def _scheduled_cases() -> dict[str, dict[str, Any]]:
    """Return the runs whose learning rate follows a schedule with options."""
    return {
        f"{strategy}-{name}": {
            **_config(SCHEDULED_STEPS, task=MASKED, strategy={"name": strategy}),
            "optim": {"name": "sgd", "lr": 0.5, **optim},
        }
        for name, optim in SCHEDULED.items()
        for strategy in ("auto", *(SHARDED if name == "pieces" else ()))
    }


def _grouped(groups: str, strategy: dict[str, Any], **train: Any) -> dict[str, Any]:
    """Return a run with `optim.groups`."""
    config = _config(FEW, task=MASKED, strategy=strategy, **train)
    return {**config, "optim": {"lr": 0.01, "weight_decay": 0.1, "betas": [0.8, 0.99], "groups": GROUPS[groups]}}


def _unfrozen(strategy: str) -> dict[str, Any]:
    frozen = {"freeze": list(FROZEN), "unfreeze_at": {"step": UNFREEZE_AT}}
    config = _config(FEW, task=MASKED, strategy={"name": strategy}, **frozen)
    return {**config, "optim": {**config["optim"], "groups": [OWN_SCHEDULE]}}


def _owned_cases(world: int) -> dict[str, dict[str, Any]]:
    """Return the runs whose optimizers need whole matrices. In the last, DeepSpeed has the state on the CPU."""
    if world == 1:
        return {"zero2-muon": _grouped("muon", {"name": "zero2"})}
    if world == 4:
        return {f"hsdp-{groups}": _grouped(groups, HSDP) for groups in ("muon", "adafactor")}
    names = {name: {"name": name} for name in ("auto", *CUT)}
    found = {f"{name}-{groups}": _grouped(groups, names[name]) for groups in OWNED[:2] for name in names}
    for name, strategy in names.items():
        lars = _config(FEW, task={"target": "tasks:WithLars"}, strategy=strategy)
        found[f"{name}-lars"] = {**lars, "optim": {**lars["optim"], "lr": 0.1}}
    return {**found, "zero1-offload-classes": _grouped("classes", OPTIONS["zero1-offload"])}


def _strategy_cases() -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {}
    for name in ("ddp", *SHARDED):
        strategy = {"name": name}
        for precision in PRECISIONS:
            found[f"{name}-{precision}"] = _config(FEW, strategy=strategy, mixed_precision=precision)
        for mishap in MISHAPS:
            found[f"{name}-{mishap}"] = _mishap(mishap, strategy)
        groups = _config(FEW, task={"target": "tasks:Groups"}, strategy=strategy)
        found[f"{name}-groups"] = {**groups, "optim": {**groups["optim"], "lr": 0.1}}
        formats = {"target": "tasks:Formats", "scalar": name in SCALARS}
        found[f"{name}-formats"] = _config(FEW, task=formats, strategy=strategy)
    found["bitwise-formats"] = _config(FEW, task={"target": "tasks:Formats"}, determinism="bitwise")
    found.update({name: _config(FEW, strategy=strategy) for name, strategy in OPTIONS.items()})
    for workers in (0, 2):
        stream = _config(FEW, task={"target": "tasks:Streamed", "dropout": 0.1})
        found[f"stream-{workers}"] = {**stream, "data": {**stream["data"], "num_workers": workers}}
    found["ddp-unused"] = _config(FEW, task={"target": "tasks:Unused"}, strategy={"find_unused_parameters": True})
    for name in COMPRESSED:
        strategy = {"name": name, "communication_dtype": "bf16"}
        found[f"{name}-compressed"] = _config(FEW, strategy=strategy)
    found["fsdp2-compressed-bf16"] = _config(FEW, strategy=strategy, mixed_precision="bf16")
    return found


def _hsdp_cases() -> dict[str, dict[str, Any]]:
    found = {f"hsdp-{precision}": _config(FEW, strategy=HSDP, mixed_precision=precision) for precision in PRECISIONS}
    found.update({f"ddp-{precision}": _config(FEW, mixed_precision=precision) for precision in ("bf16", "fp16")})
    for optimizer in OPTIMIZERS:
        for window in SHARDED_WINDOWS[optimizer]:
            parity = {**parity_config(optimizer, 4 * window * MICRO), "strategy": HSDP}
            found[f"hsdp-{optimizer}-{window}"] = parity
    found["stops-hsdp"] = {**stop_config("auto"), "strategy": HSDP}
    found["hsdp-classes"] = _grouped("classes", HSDP)
    found["hsdp-pieces"] = {**_scheduled_cases()["auto-pieces"], "strategy": HSDP}
    found["hsdp-offload"] = _config(FEW, strategy={**HSDP, "offload": "all"})
    found["hsdp-kept"] = _config(FEW, strategy={**HSDP, "reshard_after_forward": False})
    found["hsdp-compressed"] = _config(FEW, strategy={**HSDP, "communication_dtype": "bf16"})
    for size in (1, 4):  # copies only, and no copies
        found[f"hsdp-by-{size}"] = _config(FEW, strategy={"name": "hsdp", "shard_size": size})
    for name, strategy in {"ddp": {"name": "ddp"}, "hsdp": HSDP}.items():
        found[f"{name}-nan"] = _mishap("nan", strategy)
    return found


def _mishap(how: str, strategy: dict[str, Any]) -> dict[str, Any]:
    """Return a run in which something goes wrong on rank 1, in the second micro-batch of step 4 (or 0, for -first)."""
    if how == "nothing":
        return _config(3, task={"target": "tasks:Empty"}, strategy=strategy)
    task = {"target": "tasks:Misbehaving", "how": how.split("-")[1 if how.startswith("fp16") else 0], "on_rank": 1}
    precision = "fp16" if how.startswith("fp16") else "no"
    at = 2 if how.endswith("-first") else 10
    return _config(FEW, task={**task, "at": at}, strategy=strategy, mixed_precision=precision)


def _config(
    steps: int, task: dict[str, Any] | None = None, strategy: dict[str, Any] | None = None, **train: Any
) -> dict[str, Any]:
    return {
        "seed": 3,
        "task": task or {**MASKED, "dropout": 0.1, "sums": True},
        "data": {"global_batch_size": 16, "micro_batch_size": 4},
        "optim": {"name": "adamw", "lr": 0.01, "schedule": "linear", "warmup_steps": 3},
        "train": {"steps": steps, "max_grad_norm": 1.0, **train},
        "strategy": strategy or {},
        "checkpoint": {"every_steps": EVERY, "keep": 9},
    }


# test_running_statistics, by the number of processes
BUFFER_STRATEGIES = {1: ("single",), 2: ("ddp", *SHARDED), 4: ("ddp", "zero1", "fsdp2")}


def _buffer_cases(world: int) -> dict[str, dict[str, Any]]:
    config = {
        **_config(FEW, task={"target": "tasks:WithBuffers"}),
        "optim": {"name": "sgd", "lr": 0.1},
        "eval": {"every_steps": EVERY},
    }
    found = {f"buffers-{name}": {**config, "strategy": {"name": name}} for name in BUFFER_STRATEGIES[world]}
    found["buffers-bitwise"] = {**config, "train": {**config["train"], "determinism": "bitwise"}}
    if world == 2:  # the task's blocks run their forward again in the backward
        task = {"target": "tasks:WithBuffers", "centred": False}
        found["buffers-checkpointing"] = {**config, "task": task, "strategy": {"activation_checkpointing": True}}
    return found


# test_bitwise: eight micro-batches a step, by precision
BITWISE = {
    precision: {
        **_config(FEW, mixed_precision=precision, determinism="bitwise", ema={"decay": 0.9}),
        "data": {"global_batch_size": 32, "micro_batch_size": 4},
    }
    for precision in PRECISIONS
}
