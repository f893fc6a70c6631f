"""Trainer in one process: the run folder, the optimizers, the checkpoint."""

import hashlib
import json
import signal
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from conftest import events, tensors
from tasks import Groups, Masked, NoEvaluation

from distrib import Config, Task, Trainer
from distrib.config import TaskConfig
from distrib.data.sampler import DistributedSampler
from distrib.errors import ConfigError, RunDirError
from distrib.task import load_task
from distrib.tasks.digits import Digits, mlp


def fit(folder: Path, task: Task | None = None, **config: Any) -> Path:
    values = {
        "data": {"global_batch_size": 8, "micro_batch_size": 4},
        "train": {"steps": 6},
        "eval": {"every_steps": 4},
        **config,
    }
    Trainer(task or Masked(), Config.from_dict(values), folder).fit()
    return folder


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_the_run_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = fit(tmp_path / "run")
    assert {path.name for path in run.iterdir()} == {
        *("config.yaml", "environment.json", "steps.jsonl", "evals.jsonl", "events.jsonl"),
        *("checkpoints", "summary.json", "curves.png", ".lock"),
    }
    steps = lines(run / "steps.jsonl")
    assert [step["step"] for step in steps] == list(range(6))
    assert set(steps[0]) == {
        *("step", "epoch", "loss", "lr", "grad_norm", "count", "verdict", "samples", "seconds"),
        *("data_seconds", "optimizer_seconds", "world_size", "strategy", "chain"),
    }
    assert set(steps[1]) == {*steps[0], "peak_memory"}
    for step in steps:
        assert 0 < step["data_seconds"] + step["optimizer_seconds"] < step["seconds"]
    assert 2**20 < steps[1]["peak_memory"] < psutil.virtual_memory().total
    evals = lines(run / "evals.jsonl")
    assert [(entry["step"], entry["count"]) for entry in evals] == [(4, 97), (6, 97)]
    assert set(evals[0]["metrics"]) == {"eval/loss", "eval/right"}
    assert [event["event"] for event in lines(run / "events.jsonl")] == ["started", "checkpoint", "finished"]
    summary = json.loads((run / "summary.json").read_text())
    assert summary["metrics"] == {"train/loss": steps[-1]["loss"], **evals[-1]["metrics"]}
    assert (run / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert Config.load(run / "config.yaml").data.global_batch_size == 8
    environment = json.loads((run / "environment.json").read_text())
    assert environment["versions"]["torch"] == torch.__version__
    assert environment["starts"][0]["launcher"] == "plain"
    output = capsys.readouterr().out
    assert "step 6/6  epoch 0  loss" in output
    assert "step 4/6  eval/loss" in output


def test_the_ledgers_chain_as_documented(tmp_path: Path) -> None:
    """Computed as docs/run-folder.md defines it, without distrib's code."""
    run = fit(tmp_path / "run")
    chain = ""
    for line in (run / "steps.jsonl").read_text().splitlines():
        text, _, tail = line.partition(',"chain":"')
        chain = hashlib.sha256(f"{chain}{text}}}".encode()).hexdigest()
        assert tail == f'{chain}"}}'
    manifest = json.loads((run / "checkpoints" / "step-00000006" / "manifest.json").read_text())
    assert (manifest["step"], manifest["chain"]) == (6, chain)


def test_the_checkpoint_loads_with_plain_libraries(tmp_path: Path) -> None:
    task = Masked()
    trainer = Trainer(task, Config.from_dict({"train": {"steps": 2}}), tmp_path / "run")
    trainer.fit()
    saved = tensors(tmp_path / "run")
    fresh = task.model()
    fresh.load_state_dict({key: torch.from_numpy(saved[f"model.{key}"]) for key in fresh.state_dict()})
    assert sum(name.startswith("optimizer.exp_avg.") for name in saved) == len(list(fresh.parameters()))
    for name, value in trainer.module.state_dict().items():
        assert torch.equal(fresh.state_dict()[name], value)


@pytest.mark.parametrize("name", ["adam", "AdamW", "sgd", "rmsprop", "Adagrad", "NAdam"])
def test_any_optimizer_of_torch_by_name(tmp_path: Path, name: str) -> None:
    steps = lines(fit(tmp_path / name, optim={"name": name, "lr": 0.01}, train={"steps": 30}) / "steps.jsonl")
    assert sum(step["loss"] for step in steps[-5:]) < sum(step["loss"] for step in steps[:5])


def test_optimizers_are_fused_where_torch_has_it(tmp_path: Path) -> None:
    def optimizer(**optim: Any) -> torch.optim.Optimizer:
        config = Config.from_dict({"train": {"steps": 1}, "optim": optim})
        trainer = Trainer(Masked(), config, tmp_path / "never")
        return trainer.make_optimizer(list(trainer.module.named_parameters()))

    assert optimizer().defaults["fused"]
    assert optimizer(name="sgd", momentum=0.9, options={"nesterov": True}).defaults["nesterov"]
    assert not optimizer(name="adamw", options={"foreach": True}).defaults["fused"]
    assert "fused" not in optimizer(name="rmsprop").defaults
    with pytest.raises(ConfigError, match=r"optim.name: LBFGS"):
        optimizer(name="lbfgs")
    with pytest.raises(ConfigError, match=r"optim: SGD refuses its arguments: Nesterov"):
        optimizer(name="sgd", options={"nesterov": True})


def test_groups_of_a_tasks_own_optimizer_keep_their_ratio(tmp_path: Path) -> None:
    config = Config.from_dict({"train": {"steps": 8}, "optim": {"schedule": "linear"}})
    task = Groups()
    Trainer(task, config, tmp_path / "run").fit()
    rates = [line["lr"] for line in lines(tmp_path / "run" / "steps.jsonl")]
    assert rates == pytest.approx([0.1 * (1 - step / 8) for step in range(8)])
    assert [group["lr"] for group in task.made[-1].param_groups] == pytest.approx([rates[-1], rates[-1] / 5])


def test_without_an_evaluation_set(tmp_path: Path) -> None:
    run = fit(tmp_path / "run", NoEvaluation(), eval={})
    assert not (run / "evals.jsonl").exists()
    assert (run / "curves.png").exists()


def test_a_run_that_failed_before_its_first_step_may_start_again(tmp_path: Path) -> None:
    class Mistaken(Masked):
        def forward(self, model: Any, batch: Any) -> Any:
            raise NameError("a mistake, soon to be mended")

    with pytest.raises(ConfigError, match=r"task.forward failed on its first batch; the batch is \(Tensor"):
        fit(tmp_path / "run", Mistaken())
    run = fit(tmp_path / "run", seed=5)
    assert [event["event"] for event in lines(run / "events.jsonl")][:3] == ["started", "failed", "started"]
    assert Config.load(run / "config.yaml").seed == 5


def test_items_with_weights_count_by_weight(tmp_path: Path) -> None:
    weight = [0.3, *[1.1] * 9]
    task = {
        "target": "distrib.tasks.supervised:Supervised",
        "model": {"target": "distrib.tasks.digits:mlp", "hidden": 8, "dropout": 0.0},
        "train_dataset": {"target": "test_trainer:digits"},
        "loss": {"name": "CrossEntropyLoss", "weight": weight},
    }
    steps = lines(fit(tmp_path / "run", load_task(TaskConfig.model_validate(task)), eval={}) / "steps.jsonl")
    dataset = digits()
    torch.manual_seed(0)
    model = mlp(8, 0.0)
    chosen = list(DistributedSampler(dataset, global_batch_size=8, micro_batch_size=8, stop=1))
    images, labels = (tensor[chosen] for tensor in dataset.tensors)
    expected = torch.nn.functional.cross_entropy(model(images), labels, weight=torch.tensor(weight))
    assert steps[0]["loss"] == pytest.approx(expected.item(), rel=1e-6)
    assert steps[0]["count"] == pytest.approx(torch.tensor(weight)[labels].sum().item(), rel=1e-6)


def digits() -> torch.utils.data.TensorDataset:
    return Digits().train_dataset()


def test_a_run_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(RunDirError, match="cannot write the run folder: Not a directory"):
        fit(tmp_path / "file" / "run")


def test_signal_handlers_are_restored_after_a_failed_run(tmp_path: Path) -> None:
    """For example in a notebook: SIGTERM ends the process and its child processes as before."""

    class Fails(Masked):
        def metrics(self, rows: Any) -> dict[str, float]:
            raise ZeroDivisionError

    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(ZeroDivisionError):
        fit(tmp_path / "run", Fails(), eval={"every_steps": 1})
    assert signal.getsignal(signal.SIGTERM) is before
    assert events(tmp_path / "run")[-1] == "failed"


def test_activation_checkpointing_runs_blocks_again_in_the_backward(tmp_path: Path) -> None:
    class Counted(torch.nn.Linear):
        forwards = 0

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            Counted.forwards += 1
            return super().forward(x)

    class Blocks(Masked):
        def model(self) -> torch.nn.Module:
            embedding, first, second = super().model()
            first[0], second[1] = Counted(16, 32), Counted(32, 11)
            return torch.nn.Sequential(embedding, first, second)

    def forwards(name: str, **strategy: Any) -> int:
        Counted.forwards = 0
        fit(tmp_path / name, Blocks(), strategy=strategy, eval={"every_steps": 0}, train={"steps": 3})
        return Counted.forwards

    micro_batches, evaluations = 3 * 2, 2 + -(-97 // 4)  # two in the trial
    assert forwards("kept") == 2 * (micro_batches + evaluations)
    assert forwards("again", activation_checkpointing=True) == 2 * (2 * micro_batches + evaluations)
    kept, again = (lines(tmp_path / name / "steps.jsonl") for name in ("kept", "again"))
    assert [step["loss"] for step in kept] == [step["loss"] for step in again]


class OwnSGD(Masked):
    def optimizer(self, params: list[tuple[str, torch.nn.Parameter]]) -> torch.optim.Optimizer:
        return torch.optim.SGD(params, lr=0.1, momentum=0.9)


def test_config_keys_that_a_tasks_optimizer_contradicts_are_refused(tmp_path: Path) -> None:
    for optim, said in (
        ({"weight_decay": 0.1}, "(SGD) does not do what the config says: weight_decay is 0.1, there 0;"),
        ({"lr": 0.01, "name": "adam"}, "name is adam; lr is 0.01, there 0.1;"),
        ({"options": {"nesterov": True}}, "options.nesterov is True, there False;"),
    ):
        with pytest.raises(ConfigError) as error:
            fit(tmp_path / "refused", OwnSGD(), optim=optim)
        assert said in str(error.value)
        assert not (tmp_path / "refused").exists()
    run = fit(tmp_path / "run", OwnSGD(), optim={"lr": 0.1, "momentum": 0.9, "name": "sgd", "schedule": "linear"})
    assert lines(run / "steps.jsonl")[0]["lr"] == 0.1
    written = Config.load(run / "config.yaml")
    assert Trainer(OwnSGD(), written, tmp_path / "again").ignored_keys is None
