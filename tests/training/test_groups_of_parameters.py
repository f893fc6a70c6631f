"""`optim.groups` in one process: what is refused before training, what explain shows, and Task.decays."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import Run, check, refused
from hypothesis import given
from hypothesis import strategies as st
from tasks import Masked
from torch import nn

from distrib import Config, World
from distrib.strategies import registry
from distrib.strategies.owners import assign, with_owners
from distrib.training import build
from distrib.training.optimizers import build_optimizer

CONFIG: dict[str, Any] = {
    "task": {"target": "tasks:Masked"},
    "data": {"global_batch_size": 16, "micro_batch_size": 4},
    "optim": {"name": "adamw", "lr": 0.01, "weight_decay": 0.1, "betas": [0.8, 0.9]},
    "train": {"steps": 2},
}


def write(folder: Path, groups: Any, **optim: Any) -> None:
    config = {**CONFIG, "optim": {**CONFIG["optim"], **optim, "groups": groups}}
    (folder / "c.yaml").write_text(yaml.safe_dump(config))


@pytest.mark.parametrize(
    ("groups", "said"),
    [
        (
            [{"match": "1.0.wieght"}],
            "optim.groups.0.match: 1.0.wieght matches no parameter of the model, did you",
        ),
        (
            [{"match": "head*"}],
            "optim.groups.0.match: head* matches no parameter of the model; there are 0.",
        ),
        ([{"match": "*.bias", "ndim": 2}], "optim.groups.0.match: *.bias matches no parameter with ndim 2"),
        (
            [{"match": "*"}, {"match": "0.*"}],
            "optim.groups.1.match: 0.* matches only parameters of earlier groups (0.weight is in optim.",
        ),
        (
            [{"match": "*.bias", "name": "sdg"}],
            "optim.groups.0.name: 'sdg' is not a class of torch.optim, did you mean SGD?",
        ),
        ([{"match": "*.bias", "name": "lbfgs"}], "optim.groups.0.name: LBFGS evaluates the loss several times a step"),
        (
            [{"match": "*.bias", "name": "sgd", "betas": [0.1, 0.2]}],
            "optim.groups.0.betas: SGD has no betas; leave",
        ),
        ([{"match": "*.bias", "options": {"epsilon": 1}}], "optim.groups.0.options.epsilon: not an option of AdamW: "),
        ([{"match": "*.bias", "name": "muon"}], "optim: Muon refuses its arguments: Muon only supports 2D parameters"),
        ([{"match": "*", "freeze": True}], "task.model: Sequential has no parameter to train"),
        ([{"lr": 0.1}], "optim.groups.0.match: "),
        ([{"match": []}], "optim.groups.0.match: "),
        ([{"match": "*.bias", "rate": 0.1}], "optim.groups.0.rate: unknown key"),
        ([{"match": "*.bias", "lr": -1}], "optim.groups.0.lr: -1: input should be greater than or equal to 0"),
        ({"match": "*.bias"}, "optim.groups: "),
    ],
)
def test_bad_groups(run: Run, tmp_path: Path, groups: Any, said: str) -> None:
    write(tmp_path, groups)
    assert said in refused(run("distrib", "train", "c.yaml"))


SHAPES = st.dictionaries(st.text(max_size=4), st.lists(st.integers(1, 64), min_size=1, max_size=3).map(tuple))


@given(SHAPES, st.integers(1, 9))
def test_the_work_of_owners_is_balanced(shapes: dict[str, tuple[int, ...]], ranks: int) -> None:
    owners = assign(shapes, ranks)
    assert owners.keys() == shapes.keys()
    work = {name: math.prod(shape) * min(shape[0], math.prod(shape[1:])) for name, shape in shapes.items()}
    loads = [sum(work[name] for name in shapes if owners[name] == rank) for rank in range(ranks)]
    assert max(loads) - min(loads) <= max(work.values(), default=0)  # of a greedy assignment


class Wide(Masked):
    def model(self) -> nn.Module:
        return nn.Sequential(nn.Linear(40, 60), nn.Linear(60, 50), nn.Linear(50, 10))


@pytest.mark.parametrize("strategy", ["zero1", "zero2", "zero3", "fsdp2"])
def test_explain_counts_the_state_of_the_fullest_owner(strategy: str) -> None:
    config = Config.from_dict(
        {
            "train": {"steps": 1},
            "strategy": {"name": strategy},
            "optim": {"groups": [{"match": "*.weight", "name": "muon"}]},
            "data": CONFIG["data"],
        }
    )
    task = Wide()
    resolved = registry.resolve(config, World(world_size=2, launcher="distrib"))
    make_optimizer = build.optimizer_maker(task, config)
    memory = build.memory(build.model_on_meta(task, config, make_optimizer), task, resolved, make_optimizer)
    largest, others = 60 * 50, 40 * 60 + 50 * 10  # one rank owns the first, the other rank these
    adamw = 2 * (60 + 50 + 10) // 2 + 3  # two moments of half of the biases, and a step count for each
    if strategy != "fsdp2":
        adamw += (largest + others + 120) // 2  # the fp32 copy of half the weights
    assert memory.optimizer_state == 4 * (max(largest, others) + adamw)


def test_a_class_that_is_elementwise_updates_shards() -> None:
    class Plain(torch.optim.Optimizer):
        elementwise = True

    named = [("weight", nn.Parameter(torch.ones(2, 2)))]
    given = Plain([named[0][1]], {"lr": 0.1})
    assert with_owners(given, named) == (given, [])


def test_a_task_with_its_own_optimizer(run: Run, tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text(
        yaml.safe_dump({**CONFIG, "task": {"target": "tasks:Groups"}, "optim": {"groups": [{"match": "*.bias"}]}})
    )
    assert "does not do what the config says: groups are given" in refused(run("distrib", "train", "c.yaml"))


def test_explain_lists_them(run: Run, tmp_path: Path) -> None:
    write(
        tmp_path, [{"match": ["*.bias", "0.*"], "lr": 0.02}, {"match": "2.1.weight", "name": "sgd", "weight_decay": 0}]
    )
    said = " ".join(check(run("distrib", "explain", "c.yaml", COLUMNS="200")).split())
    assert "AdamW, lr 0.01, weight_decay 0.1 for the rest (544 parameters)" in said
    assert "lr 0.02, weight_decay 0.1 for *.bias, 0.* (251 parameters)" in said
    assert "SGD, lr 0.01 for 2.1.weight (352 parameters)" in said


def test_what_a_group_takes_from_the_section_and_decays() -> None:
    """Another class has its own defaults. Task.decays is asked where a group has no weight_decay of its own."""
    optim = {**CONFIG["optim"], "options": {"eps": 1e-4}}
    groups = [
        {"match": "0.*"},
        {"match": "1.weight", "name": "muon", "lr": 0.5},
        {"match": "1.bias", "name": "AdamW", "weight_decay": 0.3, "options": {}},
    ]
    config = Config.from_dict({**CONFIG, "optim": {**optim, "groups": groups}}).optim
    model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 2), nn.Linear(2, 2))
    made = build_optimizer(config, list(model.named_parameters()), lambda name, _: not name.endswith("bias"))
    found = {
        name: group
        for group in made.param_groups
        for name, parameter in model.named_parameters()
        if any(parameter is one for one in group["params"])
    }
    assert {name: group["weight_decay"] for name, group in found.items()} == {
        "0.weight": 0.1,
        "0.bias": 0.0,
        "1.weight": 0.1,
        "1.bias": 0.3,
        "2.weight": 0.1,
        "2.bias": 0.0,
    }
    assert (found["1.weight"]["momentum"], found["1.weight"]["lr"]) == (0.95, 0.5)  # Muon's own
    assert [found[name]["eps"] for name in ("0.weight", "1.bias")] == [1e-4, 1e-8]
    assert [found[name]["betas"] for name in ("0.weight", "1.bias")] == [(0.8, 0.9)] * 2
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    made.step()
    assert all((old != new).all() for old, new in zip(before, model.parameters(), strict=True))
    assert {"exp_avg", "momentum_buffer"} <= {key for state in made.state.values() for key in state}
