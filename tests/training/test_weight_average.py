"""train.ema in one process: what is averaged, evaluated and exported, and which input is refused."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from conftest import Run, check, check_same, interrupted, lines, refused, tensors
from safetensors.torch import load_file
from tasks import Masked, Uneven, WithBuffers
from torch import Tensor, nn
from torch.nn import functional as F

from distrib import Config, Trainer
from distrib.data.loader import train_windows
from distrib.data.sampler import DistributedSampler
from distrib.errors import ConfigError
from distrib.processes.world import World
from distrib.run_folder import checkpoint
from distrib.run_folder.manifest import read_manifest
from distrib.strategies import registry
from distrib.task import Task
from distrib.training import build
from distrib.training.commands import evaluate_run, explain_run, export_run
from distrib.training.engine import Engine
from distrib.training.loop import train_step

EMA = {"decay": 0.9}
STEPS = 12


def fit(folder: Path, task: Task | None = None, ema: dict[str, Any] | None = EMA, **more: Any) -> Path:
    task = task or Masked()
    train = {"steps": STEPS, **more.pop("train", {}), **({} if ema is None else {"ema": ema})}
    options = {key: more.pop(key) for key in ("resume", "fork", "reset_optimizer") if key in more}
    values = {
        "seed": 2,
        "data": {"global_batch_size": 8, "micro_batch_size": 4},
        "optim": {"lr": 0.01},
        "train": train,
        "checkpoint": {"every_steps": 1, "keep": STEPS},
        "task": {"target": f"{type(task).__module__}:{type(task).__name__}"},
        **more,
    }
    Trainer(task, Config.from_dict(values), folder, **options).fit()
    return folder


def metrics(run: Path) -> list[dict[str, float]]:
    return [line["metrics"] for line in lines(run, "evals.jsonl")]


def check_averages(run: Path, first: int, decay: float) -> None:
    """Compute the average again from the weights of the checkpoints, step by step from the checkpoint `first`."""
    average = {key: value for key, value in tensors(run, first).items() if key.startswith("ema.")}
    for step in range(first + 1, STEPS + 1):
        saved = tensors(run, step)
        for key, value in average.items():
            average[key] = decay * value + (1 - decay) * saved[key.replace("ema.", "model.", 1)].astype(np.float64)
            np.testing.assert_allclose(saved[key], average[key], rtol=1e-5, atol=1e-6)


class Mixed(Masked):
    """Has tied weights, a frozen parameter, one in bf16, one in float64 and a scalar."""

    def model(self) -> nn.Module:
        return MixedModel()


class MixedModel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 16)
        self.middle = nn.Linear(16, 16)
        self.middle.bias.requires_grad_(False)
        self.head = nn.Linear(16, 11, bias=False)
        self.head.weight = self.embedding.weight
        self.low = nn.Parameter(torch.randn(11).bfloat16())
        self.high = nn.Parameter(torch.randn(11, dtype=torch.float64))
        self.scale = nn.Parameter(torch.tensor(1.0))

    def forward(self, tokens: Tensor) -> Tensor:
        logits: Tensor = self.head(self.middle(self.embedding(tokens)).relu())
        return (logits + self.low.float() + self.high.float()) * self.scale


def test_tied_and_frozen_parameters_and_other_dtypes(tmp_path: Path) -> None:
    run = fit(tmp_path / "run", Mixed())
    found = tensors_as_torch(run)
    averages = {key: value.dtype for key, value in found.items() if key.startswith("ema.")}
    assert averages == {
        "ema.low": torch.float32,
        "ema.high": torch.float64,
        "ema.scale": torch.float32,
        "ema.embedding.weight": torch.float32,
        "ema.middle.weight": torch.float32,
    }
    assert not torch.equal(found["ema.low"].bfloat16().float(), found["ema.low"])  # more precise than its weights
    # The evaluation gave every weight back.
    unseen = fit(tmp_path / "unseen", Mixed(), eval={"weights": "model"})
    for key, value in tensors_as_torch(unseen).items():
        assert torch.equal(value, found[key]), key
    export_run(run, tmp_path / "out", weights="ema")
    exported = load_file(tmp_path / "out" / "model.safetensors")
    model = MixedModel()
    model.load_state_dict(exported)
    assert exported["low"].dtype == torch.bfloat16
    assert torch.equal(exported["low"], found["ema.low"].bfloat16())
    assert torch.equal(exported["head.weight"], found["ema.embedding.weight"])
    assert torch.equal(exported["middle.bias"], found["model.middle.bias"])


def tensors_as_torch(run: Path) -> dict[str, Tensor]:
    path = sorted((run / "checkpoints").glob("step-*"))[-1]
    manifest = read_manifest(path)
    whole = {
        name: torch.empty(entry["shape"], dtype=getattr(torch, entry["dtype"]))
        for name, entry in manifest["tensors"].items()
    }
    checkpoint.load(path, manifest, {name: checkpoint.replicated(tensor) for name, tensor in whole.items()})
    return whole


def test_the_average_is_evaluated_with_the_models_buffers(tmp_path: Path) -> None:
    run = fit(tmp_path / "run", WithBuffers(), eval={"every_steps": 5})
    task, model = WithBuffers(), WithBuffers().model().eval()
    for line in lines(run, "evals.jsonl"):
        saved = {key: torch.from_numpy(value) for key, value in tensors(run, line["step"]).items()}
        state = {key.removeprefix("model."): value for key, value in saved.items() if key.startswith("model.")}
        for prefix, weights in {
            "eval": {},
            "eval/ema": {key.removeprefix("ema."): value for key, value in saved.items() if key.startswith("ema.")},
        }.items():
            model.load_state_dict({**state, **weights})
            features, targets, _ = task.eval_dataset().tensors
            with torch.no_grad():
                output = model(features)
            loss = F.cross_entropy(output.flatten(0, 1), targets.flatten(), ignore_index=-100)
            assert line["metrics"][f"{prefix}/loss"] == pytest.approx(loss.item(), rel=1e-4)
    assert all(found["eval/loss"] != found["eval/ema/loss"] for found in metrics(run))
    assert not [key for key in tensors(run) if key.startswith("ema.") and "running" in key]


@pytest.mark.parametrize(
    ("weights", "names"),
    [
        ("both", {"eval/loss", "eval/right", "eval/ema/loss", "eval/ema/right"}),
        ("model", {"eval/loss", "eval/right"}),
        ("ema", {"eval/ema/loss", "eval/ema/right"}),
    ],
)
def test_what_is_evaluated(tmp_path: Path, weights: str, names: set[str]) -> None:
    run = fit(tmp_path / "run", eval={"every_steps": 5, "weights": weights})
    assert [set(found) for found in metrics(run)] == [names] * 3
    folder = interrupted(run, tmp_path / "again", 5)
    (folder / "evals.jsonl").write_text("")
    fit(folder, eval={"every_steps": 5, "weights": weights})
    check_same(folder, run)
    # What is evaluated may change when a run resumes, unless it decides.
    fit(interrupted(run, tmp_path / "other", 6), eval={"every_steps": 5, "weights": "both"})
    assert tensors(tmp_path / "other").keys() == tensors(run).keys()


def test_without_an_average_nothing_is_new(tmp_path: Path) -> None:
    run = fit(tmp_path / "run", ema=None, eval={"every_steps": 5})
    assert {key.split(".")[0] for key in tensors(run)} == {"model", "optimizer"}
    assert {key for found in metrics(run) for key in found} == {"eval/loss", "eval/right"}


class TwoSets(Masked):
    def eval_datasets(self) -> Any:
        return {"near": self._data(2), "ema" if self.dropout else "far": self._data(3)}


def test_several_sets(tmp_path: Path) -> None:
    run = fit(tmp_path / "run", TwoSets(), eval={"every_steps": 4, "sets": {"far": {"every_steps": 6}}})
    of = {name: {f"eval/{name}/loss", f"eval/ema/{name}/loss"} for name in ("near", "far")}
    found = {line["step"]: set(line["metrics"]) for line in lines(run, "evals.jsonl")}
    assert {step: {key for key in keys if key.endswith("loss")} for step, keys in found.items()} == {
        4: of["near"],
        6: of["far"],
        8: of["near"],
        12: of["near"] | of["far"],
    }
    assert {line["count"] for line in lines(run, "evals.jsonl")} == {97, 194}
    with pytest.raises(ConfigError, match=r"task.eval_datasets: a set is named ema, but eval/ema/… are the metrics of"):
        fit(tmp_path / "refused", TwoSets(dropout=0.1))
    fit(tmp_path / "model", TwoSets(dropout=0.1), eval={"weights": "model"})


def test_decisions_by_the_average(tmp_path: Path) -> None:
    by = {"metric": "eval/ema/loss"}
    run = fit(
        tmp_path / "run",
        optim={"lr": 3.0, "name": "sgd"},
        train={"steps": STEPS, "stop": {**by, "patience": 2}},
        eval={"every_steps": 2},
        checkpoint={"every_steps": 0, "best": by, "keep": 1},
    )
    values = {line["step"]: line["metrics"]["eval/ema/loss"] for line in lines(run, "evals.jsonl")}
    best = json.loads((run / "summary.json").read_text())["best"]
    assert best == {"metric": "eval/ema/loss", "mode": "min", "value": min(values.values()), "step": best["step"]}
    assert (run / "checkpoints" / f"step-{best['step']:08d}").exists()
    for key, metric in {"train.stop": "eval/ema/los", "checkpoint.best": "eval/loss"}.items():
        section, name = key.split(".")
        with pytest.raises(ConfigError, match=rf"^{key}.metric: {metric} is not among the metrics of an evaluation: "):
            fit(
                tmp_path / name,
                **{section: {name: {"metric": metric}}},
                eval={"every_steps": 2, "weights": "ema"},
            )
        assert not lines(tmp_path / name)


@pytest.mark.parametrize("optim", [{"name": "adamw"}, {"name": "sgd", "momentum": 0.9}], ids=lambda o: o["name"])
def test_decided_on_the_host_or_on_the_device_the_average_is_the_same(optim: dict[str, Any]) -> None:
    """On a GPU nothing waits to learn whether a step was applied. Some steps of Uneven are skipped."""
    found: list[dict[str, Tensor]] = []
    for waits in (True, False):
        values = {
            "train": {"steps": 8, "ema": {"decay": 0.7, "every_steps": 2, "start_step": 1}},
            "data": {"global_batch_size": 8, "micro_batch_size": 4},
            "optim": {"lr": 0.05, **optim},
        }
        config, task = Config.from_dict(values), Uneven()
        strategy = registry.resolve(config, World())
        module = build.model(task, config)
        strategy.wrap(module, [], build.optimizer_maker(task, config))
        engine = Engine(strategy, max_grad_norm=0.5, ema=config.train.ema)
        engine.waits = waits
        sampler = DistributedSampler(
            task.train_dataset(), global_batch_size=8, micro_batch_size=4, num_replicas=1, rank=0, stop=8
        )
        updates, expected = 0, {}
        for window in train_windows(sampler):
            applied = train_step(engine, task, window, 0.05).read().applied
            updates += applied
            for name, parameter in module.named_parameters():
                if updates <= 1:
                    expected[name] = parameter.detach().clone()
                elif applied and (updates - 1) % 2 == 0:
                    expected[name] = torch.lerp(expected[name], parameter.detach(), 0.3)
        assert 2 < updates < 8
        assert engine.average is not None
        found.append({name: shard.tensor.clone() for name, shard in engine.average.shards().items()})
        for name, value in expected.items():
            torch.testing.assert_close(found[-1][f"ema.{name}"], value, rtol=1e-6, atol=1e-6)
    for name, value in found[0].items():
        torch.testing.assert_close(found[1][name], value, rtol=1e-6, atol=1e-6)


def test_an_evaluation_that_fails_gives_the_weights_back() -> None:
    config, task = Config.from_dict({"train": {"steps": 1, "ema": EMA}}), Mixed()
    strategy = registry.resolve(config, World())
    module = build.model(task, config)
    strategy.wrap(module, [], build.optimizer_maker(task, config))
    engine = Engine(strategy, ema=config.train.ema)
    assert engine.average is not None
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.001)
    weights = [parameter.detach().clone() for parameter in module.parameters()]
    averages = [shard.tensor.clone() for shard in engine.average.shards().values()]

    def evaluate() -> None:
        with engine.averaged():
            assert not torch.equal(next(module.parameters()), weights[0])
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        evaluate()
    for now, before in zip(module.parameters(), weights, strict=True):
        assert torch.equal(now, before)
    for shard, average in zip(engine.average.shards().values(), averages, strict=True):
        assert torch.equal(shard.tensor, average)


def test_forks(tmp_path: Path) -> None:
    """A fork takes the average with it. If there is none to take, the average begins with the weights."""
    plain, averaged = fit(tmp_path / "plain", ema=None), fit(tmp_path / "averaged")
    at = str(averaged / "checkpoints" / "step-00000005")
    same = fit(tmp_path / "same", resume=at, fork=True)
    for key, value in tensors(averaged).items():
        np.testing.assert_array_equal(tensors(same)[key], value, err_msg=key)
    slower = fit(tmp_path / "slower", resume=at, fork=True, ema={"decay": 0.99})
    check_averages(slower, 6, 0.99)
    begun = fit(tmp_path / "begun", resume=str(plain / "checkpoints" / "step-00000005"), fork=True)
    (warning,) = [line["reason"] for line in lines(begun, "events.jsonl") if line["event"] == "warning"]
    assert re.fullmatch(r".*step-00000005 has no average of the weights; the average begins with .*", warning)
    check_averages(begun, 6, 0.9)
    for key, value in tensors(begun, 6).items():
        if key.startswith("ema."):
            weights = [tensors(run, step)[key.replace("ema.", "model.")] for run, step in ((plain, 5), (begun, 6))]
            np.testing.assert_allclose(value, 0.9 * weights[0] + 0.1 * weights[1], rtol=1e-5, atol=1e-6)
    anew = fit(tmp_path / "anew", resume=at, fork=True, reset_optimizer=True)
    weights = tensors(averaged, 5)
    for key, value in tensors(anew, 6).items():
        if key.startswith("ema."):
            name = key.replace("ema.", "model.")
            np.testing.assert_allclose(value, 0.9 * weights[name] + 0.1 * tensors(anew, 6)[name], rtol=1e-5, atol=1e-6)
    fit(tmp_path / "without", resume=at, fork=True, ema=None)  # a checkpoint with an average serves other runs too
    assert not [key for key in tensors(tmp_path / "without") if key.startswith("ema.")]


def test_a_run_cannot_resume_with_another_average(tmp_path: Path) -> None:
    run = interrupted(fit(tmp_path / "run"), tmp_path / "again", 5)
    for ema, said in ((None, "train.ema"), ({"decay": 0.99}, "train.ema.decay was 0.9, is 0.99")):
        with pytest.raises(Exception, match=f"holds a run of another config .*{said}") as error:
            fit(run, ema=ema)
        assert getattr(error.value, "exit_code", None) == 2


@pytest.fixture
def trained(run: Run, tmp_path: Path) -> Path:
    config = {
        "task": {"target": "tasks:Masked"},
        "data": {"global_batch_size": 8, "micro_batch_size": 4},
        "train": {"steps": 6, "ema": EMA},
        "eval": {"every_steps": 2},
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(config))
    check(run("distrib", "launch", "--processes", 2, "run.yaml", "strategy.name=zero1"))
    return tmp_path / "runs" / "run"


def test_evaluate_and_export_take_the_average(run: Run, tmp_path: Path, trained: Path) -> None:
    found = metrics(trained)[-1]
    for weights in ("model", "ema"):
        for processes in (1, 2):
            command = ("distrib", "evaluate", "runs/run", "--json", "--weights", weights, "--processes", processes)
            said = json.loads(check(run(*command)).splitlines()[-1])["metrics"]
            expected = {key: value for key, value in found.items() if key.startswith("eval/ema/") == (weights == "ema")}
            assert said == pytest.approx(expected)
        out = check(run("distrib", "export", "runs/run", "--out", weights, "--weights", weights)).strip()
        prefix = "ema." if weights == "ema" else "model."
        expected_tensors = {key: value for key, value in tensors(trained).items() if key.startswith(prefix)}
        exported = load_file(tmp_path / out)
        assert {f"{prefix}{name}" for name in exported} == expected_tensors.keys()
        for name, tensor in exported.items():
            np.testing.assert_array_equal(tensor.numpy(), expected_tensors[f"{prefix}{name}"])
    for command in (("evaluate", "runs/run"), ("export", "runs/run", "--out", "x")):
        assert "--weights: swa is not model or ema" in refused(run("distrib", *command, "--weights", "swa"))
    config = yaml.safe_load((tmp_path / "run.yaml").read_text())
    config["train"].pop("ema")
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(config))
    check(run("distrib", "train", "run.yaml", "name=none"))
    for command in (("evaluate", "runs/none"), ("export", "runs/none", "--out", "x")):
        line = refused(run("distrib", *command, "--weights", "ema"))
        assert "step-00000006 has no average of the weights, because its run was trained without train.ema; " in line
        assert "leave --weights out, or train with train.ema" in line
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("train.ema.decay=1.0", "train.ema.decay: 1.0: "),
        ("train.ema.decay=high", "train.ema.decay: 'high': "),
        ("train.ema.every_steps=0", "train.ema.every_steps: 0: "),
        ("train.ema.start_step=1.5", "train.ema.start_step: 1.5: "),
        ("eval.weights=ema", "eval.weights: ema, but the run keeps no average of the weights; add train.ema, or leave"),
        ("eval.weights=swa", "eval.weights: 'swa': "),
    ],
)
def test_bad_input_is_refused_before_training(run: Run, tmp_path: Path, override: str, said: str) -> None:
    (tmp_path / "run.yaml").write_text(yaml.safe_dump({"task": {"target": "tasks:Masked"}, "train": {"steps": 2}}))
    for command in (("train", "run.yaml"), ("explain", "run.yaml")):
        assert said in refused(run("distrib", *command, override))
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("strategy", "part"),
    [("ddp", 1), ("zero0", 1), ("zero1", 1 / 4), ("zero2", 1 / 4), ("zero3", 1 / 4), ("fsdp2", 1 / 4), ("hsdp", 1 / 2)],
)
def test_explain_prints_the_memory_of_the_average(
    capsys: pytest.CaptureFixture[str], strategy: str, part: float
) -> None:
    options = {"shard_size": 2} if strategy == "hsdp" else {}
    values = {
        "task": {"target": "tasks:Large"},
        "data": {"global_batch_size": 8, "micro_batch_size": 1},
        "strategy": {"name": strategy, **options},
    }
    row = r"average of the weights, a rank +([\d,]+) bytes"
    explain_run(Config.from_dict({**values, "train": {"steps": 1}}), 4)
    assert re.search(row, capsys.readouterr().out) is None
    explain_run(Config.from_dict({**values, "train": {"steps": 1, "ema": {}}}), 4)
    found = re.search(row, capsys.readouterr().out)
    assert found is not None
    assert int(found[1].replace(",", "")) == pytest.approx(21_008_899 * 4 * part, rel=0.01)


def test_an_average_that_never_begins_is_a_warning(capsys: pytest.CaptureFixture[str]) -> None:
    values = {"task": {"target": "tasks:Masked"}, "train": {"steps": 5, "ema": {"start_step": 4, "every_steps": 2}}}
    explain_run(Config.from_dict(values), 1)
    assert (
        "warning: train.ema: the first average would be made at update 6, and the run has 5 steps: the average stays "
        "what it begins with"
    ) in capsys.readouterr().out


def test_evaluate_takes_the_best_by_the_average(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    by = {"metric": "eval/ema/loss"}
    run = fit(tmp_path / "run", eval={"every_steps": 2}, checkpoint={"every_steps": 0, "best": by})
    best = json.loads((run / "summary.json").read_text())["best"]
    found = evaluate_run(run, which="best", weights="ema")
    assert found["eval/ema/loss"] == best["value"]
    shutil.rmtree(run / "checkpoints" / f"step-{best['step']:08d}")
    with pytest.raises(ConfigError, match="--checkpoint best"):
        evaluate_run(run, which="best", weights="ema")
    capsys.readouterr()
