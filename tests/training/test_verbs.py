"""`distrib explain` and `distrib export`."""

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Run, check, refused
from safetensors.torch import load_file
from tasks import Masked, NoEvaluation

from distrib import Config, Trainer
from distrib.errors import ConfigError
from distrib.task import load_task
from distrib.training.commands import evaluate_run, explain_run, export_run, verify_run

SMALL = {"task": {"target": "tasks:Masked"}, "train": {"steps": 1}}
DATA = {"global_batch_size": 8, "micro_batch_size": 4}
LARGE = {  # 21,008,899 parameters
    "task": {"target": "tasks:Large"},
    "data": {"global_batch_size": 8, "micro_batch_size": 1},
    "train": {"steps": 1},
}


Explain = Callable[..., str]


@pytest.fixture
def explain(capsys: pytest.CaptureFixture[str]) -> Explain:
    def said(processes: int, **config: Any) -> str:
        explain_run(Config.from_dict(config), processes)
        return capsys.readouterr().out

    return said


@pytest.mark.parametrize(
    ("strategy", "parameters", "gradients", "optimizer_state"),
    [  # by hand: Ψ = 21,008,899 fp32 parameters, Adam's two moments, and ZeRO's fp32 copy of its shard
        ("ddp", 1, 1, 2),
        ("zero0", 1, 1, 2),
        ("zero1", 1, 1, 3 / 4),
        ("zero2", 1, 1 / 4, 3 / 4),
        ("zero3", 1 / 4, 1 / 4, 3 / 4),
        ("fsdp2", 1 / 4, 1 / 4, 2 / 4),
    ],
)
def test_explain_prints_the_memory_of_a_rank(
    explain: Explain, strategy: str, parameters: float, gradients: float, optimizer_state: float
) -> None:
    output = explain(4, **LARGE, strategy={"name": strategy})
    assert f"on 4 process(es), {strategy}" in output
    rows = re.findall(r"^\s*(.+), a rank +([\d,]+) bytes", output, re.MULTILINE)
    held = {name: int(figure.replace(",", "")) for name, figure in rows}
    expected = {"parameters": parameters, "gradients": gradients, "optimizer state": optimizer_state}
    # Padding, and small parameters that zero3 does not shard, are less than 1 %.
    assert held == {name: pytest.approx(part * 21_008_899 * 4, rel=0.01) for name, part in expected.items()}


class Chooses(Masked):
    """Chooses parameters by their shapes, of which the flat shards of ZeRO have others."""

    def decays(self, name: str, parameter: torch.nn.Parameter) -> bool:
        return parameter.ndim > 1


class OnlyVectors(Masked):
    def optimizer(self, params: list[tuple[str, torch.nn.Parameter]]) -> torch.optim.Optimizer:
        groups = [{"params": [p for _, p in params if p.ndim == dimensions]} for dimensions in (1, 2)]
        return torch.optim.NAdam(groups, lr=0.1)


@pytest.mark.parametrize("task", ["Chooses", "OnlyVectors"])
def test_explain_prints_the_same_optimizer_under_every_strategy(explain: Explain, task: str) -> None:
    config = {**SMALL, "task": {"target": f"test_verbs:{task}"}}
    if task == "Chooses":
        config["optim"] = {"weight_decay": 0.1}
    shown = {}
    for name in ("ddp", "zero1", "zero3", "fsdp2"):
        (shown[name],) = re.findall(
            r"^\s*optimizer  +(.+?)\s*$", explain(2, **config, data=DATA, strategy={"name": name}), re.M
        )
    assert len(set(shown.values())) == 1, shown


class LooksAtWeights(Masked):
    """Has a model that cannot be built on torch's meta device."""

    def model(self) -> torch.nn.Module:
        module = super().model()
        assert next(module.parameters()).sum().item() is not None
        return module


def test_explain_prints_that_it_builds_the_model_in_memory(capsys: pytest.CaptureFixture[str]) -> None:
    explain_run(Config.from_dict({**SMALL, "task": {"target": "test_verbs:LooksAtWeights"}}), 1)
    printed = capsys.readouterr()
    assert printed.err.startswith(
        "warning: the model is built in memory, as it cannot be built on torch's meta device: RuntimeError: "
    )
    assert "parameters, a rank" in printed.out
    explain_run(Config.from_dict(SMALL), 1)
    assert capsys.readouterr().err == ""


def test_explain_shows_deepspeeds_json(explain: Explain) -> None:
    strategy = {"name": "zero2", "offload": "optimizer", "deepspeed": {"wall_clock_breakdown": True}}
    train = {"steps": 1, "max_grad_norm": 0.5, "mixed_precision": "bf16"}
    data = {"global_batch_size": 64, "micro_batch_size": 8}
    output = explain(2, task=SMALL["task"], strategy=strategy, train=train, data=data)
    shown = json.loads(output.partition("DeepSpeed's JSON:\n")[2])
    assert shown["train_batch_size"] == 64
    assert shown["train_micro_batch_size_per_gpu"] == 8
    assert shown["gradient_accumulation_steps"] == 4
    assert shown["gradient_clipping"] == 0.5
    assert shown["torch_autocast"]["dtype"] == "bfloat16"
    assert shown["zero_optimization"] == {"stage": 2, "offload_optimizer": {"device": "cpu"}}
    assert shown["wall_clock_breakdown"] is True
    assert "DeepSpeed" not in explain(2, **SMALL, strategy={"name": "ddp"})


def test_export_writes_the_newest_weights(run: Run, tmp_path: Path) -> None:
    Trainer(Masked(), Config.from_dict({"train": {"steps": 2}}), tmp_path / "run").fit()
    assert check(run("distrib", "export", "run", "--out", "out")) == "out/model.safetensors\n"
    model = Masked().model()
    model.load_state_dict(load_file(tmp_path / "out" / "model.safetensors"))


def test_export_imports_the_task_only_if_it_overrides_export(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    text = tmp_path / "text.txt"
    text.write_text("other text " * 50)
    task = {"target": "distrib.tasks.language_model:LanguageModel", "text": str(text), "layers": 1, "width": 8}
    config = Config.from_dict(
        {"task": task, "train": {"steps": 1}, "data": {"global_batch_size": 2, "micro_batch_size": 2}}
    )
    Trainer(load_task(config.task), config, tmp_path / "run").fit()
    text.unlink()
    capsys.readouterr()
    export_run(tmp_path / "run", tmp_path / "out")
    assert capsys.readouterr().out == f"{tmp_path / 'out/model.safetensors'}\n"


def test_commands_work_from_another_directory(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The task's module and its files are found from where the run was started."""
    project, elsewhere = tmp_path / "project", tmp_path / "elsewhere"
    project.mkdir()
    elsewhere.mkdir()
    (project / "task_of_a_project.py").write_text(
        "import tasks\n"
        "class Mine(tasks.Masked):\n"
        "    def __init__(self): super().__init__(samples=int(open('samples.txt').read()))\n"
        "    def export(self, weights, folder): (folder / 'mine').touch()\n"
    )
    (project / "samples.txt").write_text("40")
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.chdir(project)
    config = Config.from_dict({"task": {"target": "task_of_a_project:Mine"}, "train": {"steps": 1}, "data": DATA})
    metrics = Trainer(load_task(config.task), config, "run").fit()["metrics"]
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path != str(project)])
    monkeypatch.delitem(sys.modules, "task_of_a_project")
    monkeypatch.chdir(elsewhere)
    capsys.readouterr()
    evaluate_run("../project/run", as_json=True)
    found = json.loads(capsys.readouterr().out)
    assert (found["checkpoint"], found["step"]) == ("../project/run/checkpoints/step-00000001", 1)
    assert found["metrics"] == {key: value for key, value in metrics.items() if key.startswith("eval/")}
    export_run("../project/run", Path("out"))
    assert capsys.readouterr().out == "out/mine\n"
    assert (elsewhere / "out" / "mine").exists()
    verify_run("../project/run")
    assert capsys.readouterr().out.endswith("whole, data as at the run's start\n")
    assert Path.cwd() == elsewhere


def test_unusual_settings_are_a_warning(explain: Explain, tmp_path: Path) -> None:
    optim = {"lr": 0.0, "warmup_steps": 5}
    config = {"task": SMALL["task"], "train": {"steps": 5}, "optim": optim}
    doubts = [
        "optim.lr: 0, so that no step changes a weight",
        "optim.warmup_steps: 5, and the run has 5 steps: the learning rate never reaches optim.lr",
    ]
    assert explain(1, **config).splitlines()[-2:] == [f"warning: {doubt}" for doubt in doubts]
    Trainer(Masked(), Config.from_dict(config), tmp_path / "run").fit()
    events = [json.loads(line) for line in (tmp_path / "run" / "events.jsonl").read_text().splitlines()]
    assert [event["reason"] for event in events if event["event"] == "warning"] == doubts


def test_evaluations_without_an_evaluation_set_are_refused(tmp_path: Path) -> None:
    config = Config.from_dict({**SMALL, "task": {"target": "tasks:NoEvaluation"}, "eval": {"every_steps": 5}})
    for refused_by in (lambda: Trainer(NoEvaluation(), config, tmp_path / "run"), lambda: explain_run(config, 1)):
        with pytest.raises(ConfigError, match=r"eval.every_steps: 5, but NoEvaluation has no evaluation set"):
            refused_by()


def test_export_refuses_a_folder_that_is_not_a_run(run: Run, tmp_path: Path) -> None:
    assert "nowhere" in refused(run("distrib", "export", "nowhere", "--out", "out"))
    assert not (tmp_path / "out").exists()
