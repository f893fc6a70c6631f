"""A strategy of the user's own: one file, found as module:Class or by an entry point."""

import os
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from conftest import ROOT, Run, check, check_same, environment, interrupted, lines, losses, refused

from distrib import Config, DistribError

CONFIG: dict[str, Any] = {
    "seed": 3,
    "task": {"target": "tasks:Masked", "dropout": 0.1},
    "data": {"global_batch_size": 16, "micro_batch_size": 4},
    "optim": {"name": "adamw", "lr": 0.01},
    "train": {"steps": 12, "max_grad_norm": 1.0, "ema": {"decay": 0.9}},
    "eval": {"every_steps": 4},
    "checkpoint": {"every_steps": 5, "keep": 9},
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """With the strategy that docs/extending.md shows, and configs."""
    page = (ROOT / "docs" / "extending.md").read_text()
    (program,) = re.findall(r"^```python title=my_strategy.py\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    (tmp_path / "my_strategy.py").write_text(program)
    own = {"name": "my_strategy:AllReduce", "together": True}
    for name, strategy in {"ddp": {"name": "ddp"}, "own": own}.items():
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump({**CONFIG, "name": name, "strategy": strategy}))
    return tmp_path


def installed(folder: Path, package: str, target: str, name: str = "all_reduce") -> None:
    """As pip leaves it: a package that brings a strategy."""
    metadata = folder / f"{package}-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text(f"[distrib.strategies]\n{name} = {target}\n")


def with_packages(folder: Path) -> str:
    """Return a PYTHONPATH on which the packages in a folder are installed."""
    return os.pathsep.join([str(folder), environment("")["PYTHONPATH"]])


def test_it_trains_and_goes_on(run: Run, folder: Path) -> None:
    for name in ("ddp", "own"):
        check(run("distrib", "launch", "--processes", 2, f"{name}.yaml"))
    own, ddp = folder / "runs" / "own", folder / "runs" / "ddp"
    np.testing.assert_allclose(losses(own), losses(ddp), rtol=1e-5)  # see test_parity
    assert {line["strategy"] for line in lines(own)} == {"my_strategy:AllReduce"}
    # The same bits on as many processes, though it is now found by an entry point; and on from ddp's checkpoint.
    installed(folder, "all-reduce", "my_strategy:AllReduce")
    found = {"PYTHONPATH": with_packages(folder)}
    for before in (own, ddp):
        copy = interrupted(before, folder / f"{before.name}-on", after=5)
        changed = "strategy={name: all_reduce}"
        check(run("distrib", "launch", "--processes", 2, copy / "config.yaml", changed, "--run-dir", copy, **found))
        assert {line["strategy"] for line in lines(copy)[5:]} == {"all_reduce"}
        if before == own:
            check_same(copy, own)
        else:
            np.testing.assert_allclose(losses(copy), losses(ddp), rtol=1e-5)
    (folder / "my_strategy.py").write_text((folder / "my_strategy.py").read_text() + "# changed\n")
    changed_code = interrupted(own, folder / "changed", after=5)
    check(run("distrib", "launch", "--processes", 2, "own.yaml", "--run-dir", changed_code))
    warnings = [event["reason"] for event in lines(changed_code, "events.jsonl") if event["event"] == "warning"]
    assert warnings == [
        "the strategy's file: has changed since the run's last start; from now on the run uses the new code"
    ]
    metrics = check(run("distrib", "evaluate", "--json", own))
    assert '"eval/loss"' in metrics


@pytest.mark.parametrize(
    ("strategy", "said"),
    [
        (
            "{name: my_strategy:AllReduce, togeter: true}",
            "strategy.togeter: unknown key, did you mean strategy.toge",
        ),
        ("{name: my_strategy:AllReduce, together: 1}", "strategy.together: 1: input should be a valid boolean"),
        ("{name: my_strategy:AllReduce, shard_size: 2}", "strategy.shard_size: 2 is for hsdp, and the strategy is my_"),
        ("{name: my_strategy:Missing}", "strategy.name: module 'my_strategy' has no 'Missing'"),
        ("{name: nowhere:AllReduce}", "strategy.name: there is no module 'nowhere'"),
        ("{name: 'tasks:Masked'}", "strategy.name: tasks:Masked is not a Strategy but a class Masked"),
        ("{name: all_reduc}", "strategy.name: 'all_reduc': input should be 'auto', 'single', 'ddp'"),
    ],
)
def test_what_is_refused(run: Run, folder: Path, strategy: str, said: str) -> None:
    assert said in refused(run("distrib", "explain", "ddp.yaml", "--processes", 2, f"strategy={strategy}"))


@pytest.mark.parametrize(
    ("targets", "said"),
    [
        (["tasks:Masked"], "strategy.name: all_reduce of one (tasks:Masked) is no class that derives from Strategy"),
        (["nowhere:AllReduce"], "all_reduce of one (nowhere:AllReduce) cannot be loaded: ModuleNotFoundError"),
        (
            ["my_strategy:AllReduce", "other:AllReduce"],
            "one and two both bring all_reduce to distrib.strategies; un",
        ),
    ],
)
def test_packages_that_are_refused(run: Run, folder: Path, targets: list[str], said: str) -> None:
    for package, target in zip(("one", "two"), targets, strict=False):
        installed(folder, package, target)
    path = with_packages(folder)
    command = ["distrib", "explain", "ddp.yaml", "--processes", 2, "strategy={name: all_reduce}"]
    assert said in refused(run(*command, PYTHONPATH=path))


BROKEN = """
from distrib import Strategy


class Forgets(Strategy):
    \"\"\"Sums no gradients, but says that all ranks hold a copy.\"\"\"

    def wrap(self, module, blocks, make_optimizer):
        super().wrap(module, blocks, make_optimizer)
        self.broadcast_state()
        self.use_optimizer(make_optimizer)


class NoOptimizer(Strategy):
    pass


class PlainOptions(Strategy):
    class Options:
        together = True


class Common(Strategy):
    class Options(Strategy.Options):
        timeout: str = "never"
"""


@pytest.mark.parametrize(
    ("name", "code", "said"),
    [
        (
            "Forgets",
            1,
            "differs between rank 0 and rank 1, but its shard says that all ranks hold a copy; sum the",
        ),
        ("NoOptimizer", 2, "strategy.name: broken:NoOptimizer: its wrap made no optimizer; call use_optimizer"),
        ("PlainOptions", 2, "strategy.name: broken:PlainOptions: its Options must derive from Strategy.Options"),
        ("Common", 2, "strategy.name: broken:Common: its Options have timeout, which every strategy has; rename it"),
    ],
)
def test_strategies_that_are_broken(run: Run, folder: Path, name: str, code: int, said: str) -> None:
    (folder / "broken.py").write_text(BROKEN)
    result = run("distrib", "launch", "--processes", 2, "ddp.yaml", f"strategy={{name: broken:{name}}}")
    check(result, code=code)
    assert result.stderr.count(said) == 1
    assert not (folder / "runs" / "ddp" / "summary.json").exists()


def test_a_name_of_distribs_own_cannot_be_taken(run: Run, folder: Path) -> None:
    installed(folder, "one", "my_strategy:AllReduce", name="ddp")
    path = with_packages(folder)
    line = refused(run("distrib", "explain", "ddp.yaml", "--processes", 2, PYTHONPATH=path))
    assert "strategy.name: distrib and one both bring ddp to distrib.strategies; uninstall one of them" in line


def load(folder: Path, **strategy: Any) -> Config:
    path = folder / "c.yaml"
    path.write_text(yaml.safe_dump({"train": {"steps": 1}, "strategy": strategy}))
    return Config.load(path)


def test_a_config_from_before_options_belonged_to_strategies(tmp_path: Path) -> None:
    """Run folders have all keys, at their defaults, whatever the strategy."""
    all_keys: dict[str, Any] = {
        "offload": "none",
        "activation_checkpointing": False,
        "communication_dtype": "fp32",
        "timeout": 1800,
        "find_unused_parameters": False,
        "static_graph": False,
        "reshard_after_forward": True,
        "deepspeed": {},
    }
    for name in ("auto", "single", "ddp", "zero0", "zero1", "zero2", "zero3", "fsdp2"):
        load(tmp_path, name=name, **all_keys)
    with pytest.raises(DistribError, match=r"static_graph: true is for single, ddp, and the strategy is fsdp2; leave"):
        load(tmp_path, name="fsdp2", **{**all_keys, "static_graph": True})


@pytest.mark.parametrize("name", ["auto", "zero2"])
def test_an_unknown_option_names_the_nearest(tmp_path: Path, name: str) -> None:
    with pytest.raises(DistribError, match=r"strategy\.ofload: unknown key, did you mean strategy\.offload\?"):
        load(tmp_path, name=name, ofload="none")
    with pytest.raises(DistribError, match=r"strategy\.offload: 'disk': input should be"):
        load(tmp_path, name=name, offload="disk")


def test_an_option_outside_its_section(tmp_path: Path) -> None:
    with pytest.raises(DistribError, match=r"static_graph: unknown key, did you mean strategy\.static_graph\?"):
        Config.from_dict({"train": {"steps": 1}, "static_graph": True})


def test_a_run_can_be_read_where_its_strategy_is_not_installed(run: Run, folder: Path, tmp_path: Path) -> None:
    installed(folder, "all-reduce", "my_strategy:AllReduce")
    path = with_packages(folder)
    changed = "strategy={name: all_reduce, together: true}"
    check(run("distrib", "train", "own.yaml", changed, "train.steps=2", PYTHONPATH=path))
    elsewhere = (tmp_path / "elsewhere").resolve()
    elsewhere.mkdir()
    (folder / "runs" / "own").rename(elsewhere / "own")
    assert "2 steps" in check(run("distrib", "verify", "own", cwd=elsewhere))
    shutil.copytree(elsewhere / "own", elsewhere / "copy")
    check(run("distrib", "compare", "own", "copy", cwd=elsewhere))
    check(run("distrib", "export", "own", "--out", "weights", cwd=elsewhere))
    assert '"eval/loss"' in check(run("distrib", "evaluate", "--json", "own", cwd=elsewhere, PYTHONPATH=path))
