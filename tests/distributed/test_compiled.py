"""train.compile on several processes: the same losses under every strategy, and a request to stop while compiling."""

import json
import shutil
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from conftest import check, events, losses, no_process_left, processes_of, start, starter, tensors, until

pytestmark = [pytest.mark.timeout(900), pytest.mark.xdist_group("compiled")]

STEPS = 6
ROUNDING = 1e-5  # see test_parity
BLOCKS, MODEL = {"compile": "blocks"}, {"compile": "model"}
CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "ddp": (BLOCKS, {"name": "ddp"}),
    "ddp-model": (MODEL, {"name": "ddp"}),
    "ddp-static": (BLOCKS, {"name": "ddp", "static_graph": True}),
    "ddp-checkpointing": (BLOCKS, {"name": "ddp", "activation_checkpointing": True}),
    "zero2": (BLOCKS, {"name": "zero2"}),
    "zero3": (BLOCKS, {"name": "zero3"}),
    "zero3-checkpointing": (BLOCKS, {"name": "zero3", "activation_checkpointing": True}),
    "fsdp2": (BLOCKS, {"name": "fsdp2"}),
    "fsdp2-checkpointing": (BLOCKS, {"name": "fsdp2", "activation_checkpointing": True}),
}
# Autocast rounds to 8 bits after each operation, compiled code only when writing to memory: measured 2e-5 of the loss.
BF16 = 3e-4
SCRIPT = """
import json, os
from pathlib import Path
from torch._dynamo.utils import counters
from distrib import Config, Trainer
from distrib.task import load_task

for name, (train, strategy) in {cases}.items():
    counters.clear()
    given = {values}
    config = Config.from_dict({{**given, "train": {{**given["train"], **train}}, "strategy": strategy}})
    Trainer(load_task(config.task), config, name).fit()
    Path(name + ".json-" + os.environ["RANK"]).write_text(json.dumps(counters))
"""


def counted(run: Path, rank: int) -> tuple[int, int, int]:
    """Return torch's counts for this start: graphs compiled, and cache hits and misses for forwards and backwards."""
    found = json.loads(run.with_name(f"{run.name}.json-{rank}").read_text())
    cache = found["inductor"]
    return found["stats"]["unique_graphs"], cache.get("fxgraph_cache_hit", 0), cache.get("fxgraph_cache_miss", 0)


def values() -> dict[str, Any]:
    return {
        "seed": 3,
        "task": {"target": "tasks:Stacked", "dropout": 0.2},
        "data": {"global_batch_size": 32, "micro_batch_size": 4},
        "optim": {"name": "adamw", "lr": 0.01},
        "train": {"steps": STEPS, "max_grad_norm": 1.0},
    }


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a run on two processes that is asked to stop while it compiles, and the same run, uninterrupted, on one
    process and uncompiled. Return their folder."""
    folder = tmp_path_factory.mktemp("compiled")
    (folder / "config.yaml").write_text(yaml.safe_dump(values()))
    with no_process_left() as mark:
        check(starter(mark, folder)("distrib", "train", "config.yaml", "--run-dir", "plain"))
        launch = ("launch", "--processes", 2, "--grace", 300)  # the machine may be busy
        with start(mark, folder, *launch, "config.yaml", "train.compile=blocks", "--run-dir", "stopped") as process:
            until(lambda: any("cc1plus" in other.info["name"] for other in processes_of(mark)), "nothing was compiled")
            process.send_signal(signal.SIGTERM)
            said, errors = process.communicate(timeout=300)
        assert process.returncode == 75, said + errors
    assert events(folder / "stopped")[-2:] == ["checkpoint", "preempted"]
    return folder


def test_every_strategy_resumes_a_compiled_run(stopped: Path, mark: str, tmp_path: Path) -> None:
    for name in CASES:
        shutil.copytree(stopped / "stopped", tmp_path / name)
    (tmp_path / "train.py").write_text(SCRIPT.format(cases=CASES, values=values()))
    run = starter(mark, tmp_path)
    extensions = str(tmp_path / "extensions")
    check(run("distrib", "launch", "--processes", 2, "train.py", timeout=400, TORCH_EXTENSIONS_DIR=extensions))
    expected = losses(stopped / "plain")
    for name in CASES:
        np.testing.assert_allclose(losses(tmp_path / name), expected, rtol=ROUNDING, err_msg=name)
        for rank in range(2):  # equal blocks are one graph, and strategies share its code
            assert counted(tmp_path / name, rank) == ((1, 0, 2) if name.endswith("model") else (1, 2, 0)), name
        assert tensors(tmp_path / name).keys() == tensors(stopped / "plain").keys()


def test_four_processes_resume_a_compiled_run(stopped: Path, mark: str, tmp_path: Path) -> None:
    shutil.copytree(stopped / "stopped", tmp_path / "run")
    run = starter(mark, tmp_path)
    check(run("distrib", "launch", "--processes", 4, "run/config.yaml", "--run-dir", "run"))
    np.testing.assert_allclose(losses(tmp_path / "run"), losses(stopped / "plain"), rtol=ROUNDING)


def test_compiled_mixed_precision(mark: str, tmp_path: Path) -> None:
    train = {"mixed_precision": "bf16"}
    (tmp_path / "train.py").write_text(
        SCRIPT.format(cases={"plain": (train, {}), "compiled": ({**train, **MODEL}, {})}, values=values())
    )
    check(starter(mark, tmp_path)("distrib", "launch", "--processes", 1, "train.py", timeout=400))
    np.testing.assert_allclose(losses(tmp_path / "compiled"), losses(tmp_path / "plain"), rtol=BF16)
    assert counted(tmp_path / "compiled", 0) == (1, 0, 2)
