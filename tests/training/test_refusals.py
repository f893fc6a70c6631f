"""Refused before training: strategies that contradict the launcher, options that would be ignored, wrong DeepSpeed
JSON."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tasks import Masked
from torch import nn

from distrib import Config, Trainer, World
from distrib.errors import ConfigError, DistribError, LaunchError
from distrib.strategies.compile import require_tools
from distrib.strategies.registry import resolve

JOINED = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
DEEPSPEED = {"ACCELERATE_USE_DEEPSPEED": "true"}
FSDP = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}


def config(train: dict[str, Any] | None = None, optim: dict[str, Any] | None = None, **strategy: Any) -> Config:
    return Config.from_dict(
        {
            "data": {"global_batch_size": 16, "micro_batch_size": 4},
            "train": {"steps": 1, **(train or {})},
            "optim": optim or {},
            "strategy": strategy,
        }
    )


def two() -> World:
    return World(world_size=2, launcher="distrib")


def deepspeed_json(given: Config) -> Any:
    """What `distrib explain` prints of it."""
    return json.loads(resolve(given, two()).describe().partition("\n")[2])


@pytest.mark.parametrize(
    ("told", "followed"),
    [
        ({}, {"name": "ddp"}),
        (DEEPSPEED, {"name": "zero2"}),
        ({**DEEPSPEED, "ACCELERATE_DEEPSPEED_ZERO_STAGE": "0"}, {"name": "zero0"}),
        (
            {
                **DEEPSPEED,
                "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3",
                "ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE": "cpu",
                "ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE": "cpu",
                "ACCELERATE_GRADIENT_CLIPPING": "none",
                "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "1",
            },
            {"name": "zero3", "offload": "all"},
        ),
        (FSDP, {"name": "fsdp2", "reshard_after_forward": True}),
        (
            {
                **FSDP,
                "FSDP_OFFLOAD_PARAMS": "true",
                "FSDP_RESHARD_AFTER_FORWARD": "false",
                "FSDP_ACTIVATION_CHECKPOINTING": "true",
            },
            {"name": "fsdp2", "offload": "all", "reshard_after_forward": False, "activation_checkpointing": True},
        ),
    ],
)
def test_auto_follows_the_launcher(told: dict[str, str], followed: dict[str, Any]) -> None:
    resolved = resolve(config(), World.detect({**JOINED, **told}))
    values = {**dict(resolved.config.strategy), **dict(resolved.options)}
    assert {key: values[key] for key in followed} == followed


def test_auto_follows_the_stage_of_a_json_file(tmp_path: Path) -> None:
    file = tmp_path / "ds.json"
    file.write_text(json.dumps({"zero_optimization": {"stage": 3, "reduce_bucket_size": 1000}}))
    world = World.detect({**JOINED, **DEEPSPEED, "ACCELERATE_DEEPSPEED_CONFIG_FILE": str(file)})
    resolved = resolve(config(), world)
    assert (resolved.name, resolved.options.deepspeed) == ("zero3", str(file))
    assert '"reduce_bucket_size": 1000' in resolved.describe()


@pytest.mark.parametrize(
    ("told", "strategy", "parts"),
    [
        (DEEPSPEED, {"name": "zero3"}, ["told strategy.name: zero2", "config makes it zero3"]),
        (DEEPSPEED, {"name": "ddp"}, ["told strategy.name: zero2", "config makes it ddp"]),
        (FSDP, {"name": "zero1"}, ["told strategy.name: fsdp2", "config makes it zero1"]),
        ({**FSDP, "FSDP_VERSION": "1"}, {}, ["told to use fsdp1", "fsdp_version: 2"]),
        ({"ACCELERATE_USE_MEGATRON_LM": "true"}, {}, ["told to use megatron_lm"]),
        ({"ACCELERATE_USE_PARALLELISM_CONFIG": "true"}, {}, ["told to use parallelism_config"]),
        (
            {**DEEPSPEED, "ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE": "cpu"},
            {"offload": "none"},
            ["told strategy.offload: optimizer", "config makes it none"],
        ),
        (
            {**DEEPSPEED, "ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE": "nvme"},
            {},
            ["accelerate launch: strategy.offload: 'nvme'", "'none' or 'optimizer'"],
        ),
        (
            {**DEEPSPEED, "ACCELERATE_GRADIENT_CLIPPING": "1.0"},
            {},
            ["told train.max_grad_norm: 1.0", "config makes it 0.5"],
        ),
        (
            {**DEEPSPEED, "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4"},
            {},
            ["told grad_accum_steps: 4", "config makes it 2"],
        ),
        ({"ACCELERATE_MIXED_PRECISION": "bf16"}, {}, ["told train.mixed_precision: bf16", "config makes it no"]),
        (
            {**FSDP, "FSDP_RESHARD_AFTER_FORWARD": "false"},
            {"reshard_after_forward": True},
            ["told strategy.reshard_after_forward: false", "config makes it true"],
        ),
        ({**FSDP, "FSDP_IGNORED_MODULES": "head"}, {}, ["fsdp_ignored_modules: head", "config makes it none"]),
        (
            {**FSDP, "FSDP_ACTIVATION_CHECKPOINTING_OFFLOAD": "true"},
            {},
            ["checkpointing_offload: true", "makes it none"],
        ),
        ({"ACCELERATE_DYNAMO_BACKEND": "INDUCTOR"}, {}, ["told train.compile: model", "config makes it false"]),
        ({"ACCELERATE_DYNAMO_BACKEND": "nonsense"}, {}, ["told train.compile: by the backend nonsense", "it false"]),
        ({**FSDP, "FSDP_AUTO_WRAP_POLICY": "SIZE_BASED_WRAP"}, {}, ["SIZE_BASED_WRAP", "what Task.blocks gives"]),
    ],
)
def test_a_contradiction_names_both_sides(told: dict[str, str], strategy: dict[str, Any], parts: list[str]) -> None:
    with pytest.raises(LaunchError) as error:
        resolve(config({"max_grad_norm": 0.5}, **strategy), World.detect({**JOINED, **told}))
    assert [part for part in parts if part not in str(error.value)] == [], error.value
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("strategy", "said"),
    [
        ({"name": "single"}, "strategy.name: single, but distrib started 2 processes"),
        ({"offload": "optimizer"}, "strategy.offload: optimizer is for zero1, zero2, zero3, and the strategy is ddp"),
        (
            {"name": "zero2", "offload": "all"},
            "offload: all is for zero3, fsdp2, hsdp, and the strategy is zero2",
        ),
        ({"name": "fsdp2", "static_graph": True}, "strategy.static_graph: true is for single, ddp"),
        ({"name": "zero1", "find_unused_parameters": True}, "find_unused_parameters: true is for single, ddp"),
        ({"name": "zero3", "reshard_after_forward": False}, "reshard_after_forward: false is for fsdp2"),
        ({"deepspeed": {"steps_per_print": 1}}, "strategy.deepspeed: is for zero0, zero1, zero2, zero3"),
        (
            {"name": "zero2", "deepspeed": {"gradient_clipping": 1.0}},
            "gradient_clipping is 1.0, but train.max_grad_norm makes it 0.5",
        ),
        (
            {"name": "zero2", "deepspeed": {"train_micro_batch_size_per_gpu": 8}},
            "train_micro_batch_size_per_gpu is 8, but data.micro_batch_size makes it 4",
        ),
        (
            {"name": "zero2", "deepspeed": {"zero_optimization": {"stage": 3}}},
            "zero_optimization.stage is 3, but strategy.name makes it 2",
        ),
        (
            {"name": "zero2", "deepspeed": {"bf16": {"enabled": True}}},
            "bf16.enabled is true, but train.mixed_precision makes it false",
        ),
        (
            {"name": "zero3", "deepspeed": {"zero_optimization": {"offload_param": {"device": "nvme"}}}},
            'offload_param.device is "nvme", but strategy.offload makes it "none"',
        ),
        (
            {"name": "zero1", "deepspeed": {"zero_optimization": 2}},
            "zero_optimization is 2; it is an object of options",
        ),
        ({"name": "zero1", "deepspeed": {"optimizer": {"type": "Adam"}}}, "optimizer is decided by optim"),
        ({"name": "zero1", "deepspeed": {"scheduler": {}}}, "scheduler is decided by optim.schedule"),
        ({"name": "zero1", "deepspeed": "nowhere.json"}, "nowhere.json: cannot read it as JSON"),
    ],
)
def test_options_of_another_strategy_are_refused(strategy: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError) as error:
        resolve(config({"max_grad_norm": 0.5}, **strategy), two())
    assert said in str(error.value)
    assert "\n" not in str(error.value)


def test_accelerates_wrapped_classes_must_match_the_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Blocks(Masked):
        def blocks(self, model: Any) -> list[Any]:
            return [model[1], model[2]]

    for name, value in {**FSDP, **JOINED, "FSDP_TRANSFORMER_CLS_TO_WRAP": "Sequential"}.items():
        monkeypatch.setenv(name, value)
    assert Trainer(Blocks(), config(), tmp_path / "run").strategy.name == "fsdp2"
    monkeypatch.setenv("FSDP_TRANSFORMER_CLS_TO_WRAP", "Block, Sequential")
    with pytest.raises(LaunchError, match=r"cls_to_wrap: Block, Sequential, but Task.blocks gives Sequential; leave"):
        Trainer(Blocks(), config(), tmp_path / "run")


def template(**zero: Any) -> dict[str, Any]:
    """Return a DeepSpeed JSON as in transformers' documentation, without optimizer and scheduler."""
    scaler = {
        "loss_scale": 0,
        "loss_scale_window": 1000,
        "initial_scale_power": 16,
        "hysteresis": 2,
        "min_loss_scale": 1,
    }
    offload = {"device": "cpu", "pin_memory": True}
    return {
        "fp16": {"enabled": "auto", **scaler},
        "bf16": {"enabled": "auto"},
        "zero_optimization": {
            "stage": 3,
            "offload_optimizer": offload,
            "offload_param": offload,
            "overlap_comm": True,
            "reduce_bucket_size": "auto",
            "stage3_param_persistence_threshold": "auto",
            **zero,
        },
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "steps_per_print": 2000,
        "train_batch_size": "auto",
        "train_micro_batch_size_per_gpu": "auto",
    }


def test_a_usual_deepspeed_json_is_accepted() -> None:
    """Its offload applies without being repeated, and "auto" is the config's value or DeepSpeed's default."""
    given = config(name="zero3", deepspeed=template())
    options = deepspeed_json(given)
    assert options["zero_optimization"]["offload_optimizer"] == {"device": "cpu", "pin_memory": True}
    assert options["zero_optimization"]["offload_param"] == {"device": "cpu", "pin_memory": True}
    assert "reduce_bucket_size" not in options["zero_optimization"]
    assert options["train_micro_batch_size_per_gpu"] == 4
    only_optimizer = template(stage=2)
    del only_optimizer["zero_optimization"]["offload_param"]
    options = deepspeed_json(config(name="zero2", deepspeed=only_optimizer))
    assert options["zero_optimization"]["offload_optimizer"] == {"device": "cpu", "pin_memory": True}


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_a_deepspeed_json_may_repeat_the_precision(precision: str) -> None:
    given = config({"mixed_precision": precision}, name="zero1", deepspeed={precision: {"enabled": True}})
    options = deepspeed_json(given)
    assert options[precision] == {"enabled": False}
    assert options["torch_autocast"]["enabled"]


def test_all_errors_of_a_deepspeed_json_are_named_at_once() -> None:
    values = {**template(), "optimizer": {"type": "AdamW"}, "scheduler": {"type": "WarmupLR"}, "gradient_clipping": 2.0}
    with pytest.raises(ConfigError) as error:
        resolve(config({"mixed_precision": "fp16"}, name="zero3", deepspeed=values), two())
    for part in (
        *("optimizer is decided by optim", "scheduler is decided by optim.schedule", "gradient_clipping is 2.0"),
        *("fp16.loss_scale_window has no effect", "fp16.hysteresis has no effect"),
    ):
        assert part in str(error.value)


def test_environment_variables_that_would_change_results_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NVIDIA_TF32_OVERRIDE", "1")
    resolve(config(), two())  # a CPU has no TF32
    with pytest.raises(LaunchError, match=r"NVIDIA_TF32_OVERRIDE=1: matrix products in fp32 would be computed in TF32"):
        resolve(config(), World(use_cpu=False))
    monkeypatch.setenv("TORCHDYNAMO_SUPPRESS_ERRORS", "1")
    with pytest.raises(ConfigError, match=r"train.compile: model, but TORCHDYNAMO_SUPPRESS_ERRORS is set"):
        require_tools("model", World())


@pytest.mark.parametrize(
    ("strategy", "said"),
    [
        ({"name": "zero2"}, "bitwise is for single and ddp, and the strategy is zero2"),
        ({"name": "fsdp2"}, "bitwise is for single and ddp, and the strategy is fsdp2"),
        ({"communication_dtype": "bf16"}, "communication_dtype: bf16 is not for train.determinism: bitwise"),
        ({"static_graph": True}, "static_graph: true is not for train.determinism: bitwise"),
        ({"find_unused_parameters": True}, "find_unused_parameters: true is not for train.determinism: bitwise"),
    ],
)
def test_strategies_that_are_not_bitwise(strategy: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError) as error:
        resolve(config({"determinism": "bitwise"}, **strategy), two())
    assert said in str(error.value)


def test_bitwise_needs_a_power_of_two_of_micro_batches() -> None:
    values = {"data": {"global_batch_size": 24, "micro_batch_size": 4}, "train": {"steps": 1, "determinism": "bitwise"}}
    with pytest.raises(ConfigError, match=r"a step has 6 micro-batches \(24 / 4\); make it a power of two"):
        resolve(Config.from_dict(values), two())


def test_sync_batch_norm_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Synchronised(Masked):
        def model(self) -> nn.Module:
            return nn.Sequential(super().model(), nn.SyncBatchNorm(6))

    for key, value in JOINED.items():
        monkeypatch.setenv(key, value)
    with pytest.raises(ConfigError, match="1 is a SyncBatchNorm, which normalises over as many micro-batches as"):
        Trainer(Synchronised(), config(), tmp_path / "run")


def test_a_communication_dtype_that_deepspeed_would_ignore_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"communication_dtype: bf16, but .* fp16 zero2 would send gradients in fp16"):
        resolve(config({"mixed_precision": "fp16"}, name="zero2", communication_dtype="bf16"), two())


@pytest.mark.parametrize(("name", "optimizer"), [("zero1", "Adagrad"), ("zero3", "Adagrad")])
def test_optimizers_that_cannot_update_shards_are_refused(name: str, optimizer: str, tmp_path: Path) -> None:
    class Own(getattr(torch.optim, optimizer)):  # type: ignore[misc]
        pass

    class WithOwn(Masked):
        def optimizer(self, params: Any) -> torch.optim.Optimizer:
            return Own([parameter for _, parameter in params], lr=0.001)  # type: ignore[no-any-return]

    for task, key, found in ((Masked(), "optim.name", optimizer), (WithOwn(), "task.optimizer", "Own")):
        given = config(optim={"name": optimizer.lower()} if key == "optim.name" else {}, name=name)
        with pytest.raises(ConfigError, match=f"{key}: {found} cannot update the shards of {name}; take another"):
            Trainer(task, given, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_activation_checkpointing_needs_blocks(tmp_path: Path) -> None:
    class NoBlocks(Masked):
        def blocks(self, model: Any) -> list[Any]:
            return []

    with pytest.raises(ConfigError, match=r"has no repeated blocks that distrib finds; name them in Task.blocks"):
        Trainer(NoBlocks(), config(activation_checkpointing=True), tmp_path / "run")
    assert not (tmp_path / "run").exists()


OPTIONS = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5) | st.just("auto"),
    lambda inner: st.dictionaries(
        st.sampled_from(["stage", "zero_optimization", "enabled", "bf16", "gradient_clipping", "wall_clock_breakdown"]),
        inner,
        max_size=3,
    ),
    max_leaves=6,
)


@given(OPTIONS.filter(lambda options: isinstance(options, dict)))
def test_required_deepspeed_options_are_never_overridden(given: dict[str, Any]) -> None:
    """Any added JSON is either refused, or kept without changing a required option."""
    ours = deepspeed_json(config(name="zero2"))
    before = json.dumps(given, sort_keys=True)
    try:
        merged = deepspeed_json(config(name="zero2", deepspeed=given))
    except DistribError:
        return
    finally:
        assert json.dumps(given, sort_keys=True) == before
    assert holds(merged, ours)
    assert holds(merged, given)


def holds(merged: Any, part: Any) -> bool:
    if isinstance(part, dict):
        return isinstance(merged, dict) and all(
            part[key] == "auto" or (key in merged and holds(merged[key], part[key])) for key in part
        )
    return bool(merged == part)


class Extra(nn.Linear):
    def get_extra_state(self) -> Any:
        return {"calls": 3}

    def set_extra_state(self, state: Any) -> None: ...


class Partial(nn.Linear):
    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        del destination[f"{prefix}bias"]


class Sparse(nn.Linear):
    def __init__(self, *sizes: int) -> None:
        super().__init__(*sizes)
        self.register_buffer("graph", torch.eye(2).to_sparse())


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        (Extra, r"1\._extra_state in its state_dict is a dict, no tensor, and would not be saved"),
        (Partial, r"the parameter 1\.bias is not in the model's state_dict"),
        (Sparse, r"1\.graph is a tensor of layout torch\.sparse_coo, which cannot be saved"),
    ],
)
def test_a_model_with_state_that_a_checkpoint_cannot_hold_is_refused(
    tmp_path: Path, kind: type[nn.Linear], said: str
) -> None:
    class Model(Masked):
        def model(self) -> nn.Module:
            return nn.Sequential(super().model(), kind(11, 11))

    with pytest.raises(ConfigError, match=said):
        Trainer(Model(), config(), tmp_path / "run")
    assert not (tmp_path / "run").exists()
