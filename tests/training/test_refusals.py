"""Strategies that contradict the launcher, options that no strategy would heed, DeepSpeed's JSON: refused at once."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tasks import Masked, WithBatchNorm

from distrib import Config, Trainer, World
from distrib.errors import ConfigError, DistribError, LaunchError
from distrib.training.deepspeed_config import compile_config
from distrib.training.strategies import resolve

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
    assert {key: getattr(resolved, key) for key in followed} == followed


def test_auto_follows_the_stage_of_a_json_file(tmp_path: Path) -> None:
    file = tmp_path / "ds.json"
    file.write_text(json.dumps({"zero_optimization": {"stage": 3, "reduce_bucket_size": 1000}}))
    world = World.detect({**JOINED, **DEEPSPEED, "ACCELERATE_DEEPSPEED_CONFIG_FILE": str(file)})
    resolved = resolve(config(), world)
    assert (resolved.name, resolved.deepspeed) == ("zero3", str(file))
    assert compile_config(config(), resolved, 2)["zero_optimization"]["reduce_bucket_size"] == 1000


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
            ["accelerate launch: strategy.offload: 'nvme'", "'none', 'optimizer' or 'all'"],
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
        ({**FSDP, "FSDP_TRANSFORMER_CLS_TO_WRAP": "Block"}, {}, ["cls_to_wrap: Block", "what Task.blocks gives"]),
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
        ({"name": "zero2", "offload": "all"}, "strategy.offload: all is for zero3, fsdp2, and the strategy is zero2"),
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
            {"name": "zero1", "deepspeed": {"zero_optimization": {"reduce_bucket_size": "auto"}}},
            'reduce_bucket_size is "auto", and no key of ours decides it',
        ),
        ({"name": "zero1", "deepspeed": {"optimizer": {"type": "Adam"}}}, "optimizer is decided by optim"),
        ({"name": "zero1", "deepspeed": {"scheduler": {}}}, "scheduler is decided by optim.schedule"),
        ({"name": "zero1", "deepspeed": "nowhere.json"}, "nowhere.json: cannot read it as JSON"),
    ],
)
def test_options_that_do_not_fit(strategy: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError) as error:
        resolve(config({"max_grad_norm": 0.5}, **strategy), two())
    assert said in str(error.value)
    assert "\n" not in str(error.value)


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


def test_a_binary_tree_wants_a_power_of_two() -> None:
    values = {"data": {"global_batch_size": 24, "micro_batch_size": 4}, "train": {"steps": 1, "determinism": "bitwise"}}
    with pytest.raises(ConfigError, match=r"a step has 6 micro-batches \(24 / 4\); make it a power of two"):
        resolve(Config.from_dict(values), two())


def test_running_statistics_are_not_bitwise(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="bitwise, but 1 of the model is a BatchNorm1d, whose running statistics"):
        Trainer(WithBatchNorm(), config({"determinism": "bitwise"}), tmp_path / "run")


def test_gradients_that_would_travel_in_another_precision_than_asked_for() -> None:
    with pytest.raises(ConfigError, match=r"communication_dtype: bf16, but .* fp16 zero2 would send gradients in fp16"):
        resolve(config({"mixed_precision": "fp16"}, name="zero2", communication_dtype="bf16"), two())


@pytest.mark.parametrize(
    ("name", "optimizer"), [("zero1", "adafactor"), ("zero3", "Muon"), ("fsdp2", "Adafactor"), ("fsdp2", "rprop")]
)
def test_optimizers_that_cannot_update_shards(name: str, optimizer: str) -> None:
    with pytest.raises(ConfigError, match=f"optim.name: {optimizer} cannot update the shards of {name}"):
        resolve(config(optim={"name": optimizer}, name=name), two())


def test_activation_checkpointing_wants_blocks(tmp_path: Path) -> None:
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
def test_ours_hold_whatever_else_is_given(given: dict[str, Any]) -> None:
    """Whatever JSON is added: either refused, or there, with nothing of ours changed."""
    ours = compile_config(config(name="zero2"), config(name="zero2").strategy, 2)
    before = json.dumps(given, sort_keys=True)
    try:
        merged = compile_config(config(), config(name="zero2", deepspeed=given).strategy, 2)
    except DistribError:
        return
    finally:
        assert json.dumps(given, sort_keys=True) == before
    assert holds(merged, ours)
    assert holds(merged, given)


def holds(merged: Any, part: Any) -> bool:
    if isinstance(part, dict):
        return isinstance(merged, dict) and all(key in merged and holds(merged[key], part[key]) for key in part)
    return part == "auto" or bool(merged == part)
