"""Adapters of peft's: what a checkpoint holds and refuses, exports that the libraries' own loaders read, bad input."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Run, check_same, interrupted, lines, losses, refused
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from distrib import Config, Loss, Task, Trainer
from distrib.errors import ConfigError, MismatchError
from distrib.task import load_task
from distrib.tasks.adapters import with_adapter
from distrib.training import build
from distrib.training.commands import evaluate_run, explain_run, export_run, verify_run

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

ROUNDING = 1e-5  # see tests/tasks/test_hugging_face.py
LLAMA = {
    "model_type": "llama",
    "hidden_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "intermediate_size": 512,
    "vocab_size": 259,
    "tie_word_embeddings": True,
}
BERT = {"model_type": "bert", "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 259}
LORA = {"type": "lora", "r": 4, "alpha": 8, "dropout": 0.1, "target_modules": ["q_proj", "v_proj"]}
TOKENS = torch.randint(3, 259, (2, 12), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module", autouse=True)
def work(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Make a folder with texts, its own cache and a base model, and change to it."""
    folder = tmp_path_factory.mktemp("work")
    words = ["tensor", "process", "rank", "gradient", "step", "loss"]
    rows = [{"text": f"{words[n % 6]} {words[n * 7 % 5]} {n}", "label": n % 2} for n in range(80)]
    (folder / "rows.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(**LLAMA))
    model.save_pretrained(folder / "base")
    transformers.ByT5Tokenizer(extra_ids=0).save_pretrained(folder / "base")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
        patch.chdir(folder)
        yield folder


def config(adapter: Any, target: str = "CausalLM", steps: int = 4, **more: Any) -> Config:
    task = {"model": "base"} if target == "CausalLM" else {"model": BERT, "tokenizer": "bytes", "classes": 2}
    return Config.from_dict(
        {
            "seed": 7,
            "task": {
                "target": f"distrib.tasks.hugging_face:{target}",
                "files": "rows.jsonl",
                "context_length": 24,
                "adapter": adapter,
                **task,
            },
            "data": {"global_batch_size": 8, "micro_batch_size": 4},
            "optim": {"name": "adamw", "lr": 0.05},
            "train": {"steps": steps, **more},
            "checkpoint": {"every_steps": 2},
        }
    )


def trained(folder: Path, given: Config) -> Path:
    Trainer(load_task(given.task), given, folder).fit()
    return folder


@pytest.fixture(scope="module")
def language(work: Path) -> Path:
    return trained(work / "runs/language", config(LORA, ema={"decay": 0.5}))


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model.eval()(input_ids=TOKENS).logits
    return found


def check_close(found: Tensor, expected: Tensor) -> None:
    """Merged weights are rounded once more than the others; four layers leave some 3e-5 of the largest logit."""
    torch.testing.assert_close(found, expected, rtol=0, atol=10 * ROUNDING * expected.abs().max().item())


def as_in_evaluation(run: Path, given: Config, prefix: str = "model.") -> Any:
    """Return the run's model: the task's, with the tensors of its newest checkpoint."""
    newest = max((run / "checkpoints").iterdir())
    manifest, model = json.loads((newest / "manifest.json").read_text()), build.model(load_task(given.task), given)
    stored = load_file(newest / "shard-00000.safetensors")
    own = {name.removeprefix(prefix): value for name, value in stored.items() if name.startswith(prefix)}
    shaped = {name: value.view(manifest["tensors"][f"{prefix}{name}"]["shape"]) for name, value in own.items()}
    missing, unexpected = model.load_state_dict(shaped, strict=False)
    assert not unexpected
    assert not [name for name in missing if "lora" in name]
    return model


def test_a_checkpoint_is_small_and_both_exports_have_the_runs_logits(language: Path, tmp_path: Path) -> None:
    given = config(LORA)
    size = sum(file.stat().st_size for file in max((language / "checkpoints").iterdir()).iterdir())
    assert size < 0.05 * Path("base/model.safetensors").stat().st_size
    expected = logits(as_in_evaluation(language, given))
    base = transformers.AutoModelForCausalLM.from_pretrained("base", dtype=torch.float32)
    assert (expected - logits(base)).abs().max() > 0.01
    export_run(language, tmp_path / "adapter")
    described = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
    assert (described["base_model_name_or_path"], described["task_type"]) == ("base", "CAUSAL_LM")
    assert sum(file.stat().st_size for file in (tmp_path / "adapter").iterdir()) < size
    torch.testing.assert_close(logits(peft.PeftModel.from_pretrained(base, tmp_path / "adapter")), expected)
    export_run(language, tmp_path / "whole", merged=True)
    whole, found = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "whole", output_loading_info=True)
    assert not any(found.values())
    check_close(logits(whole), expected)
    export_run(language, tmp_path / "average", weights="ema")
    base = transformers.AutoModelForCausalLM.from_pretrained("base", dtype=torch.float32)
    average = logits(peft.PeftModel.from_pretrained(base, tmp_path / "average"))
    torch.testing.assert_close(average, logits(as_in_evaluation(language, given, "ema.")))
    assert (average - expected).abs().max() > 1e-3


def test_a_killed_run_is_evaluated_and_resumed(language: Path, tmp_path: Path) -> None:
    again = trained(interrupted(language, tmp_path / "again", after=2), config(LORA, ema={"decay": 0.5}))
    check_same(again, language)
    evaluated = lines(language, "evals.jsonl")[-1]["metrics"]
    assert evaluate_run(language)["eval/loss"] == evaluated["eval/loss"]
    verify_run(again)


def test_a_fork_begins_with_the_adapter(language: Path, tmp_path: Path) -> None:
    given = config(LORA, steps=6)
    at = language / "checkpoints/step-00000004"
    fork = Trainer(load_task(given.task), given, tmp_path / "fork", resume=str(at), fork=True, reset_optimizer=True)
    fork.fit()
    assert len(losses(tmp_path / "fork")) == 2


def test_another_base_is_refused(language: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One weight of the base has another last bit."""
    run = interrupted(language, tmp_path / "run", after=2)
    weights, file = load_file("base/model.safetensors"), Path("base/model.safetensors")
    kept, changed = file.read_bytes(), weights["model.norm.weight"]
    changed[3] += 2**-23
    save_file(weights, file, {"format": "pt"})
    said = "holds an adapter for another base: the values of the 38 frozen parameters"
    try:
        for use in (
            lambda: trained(run, config(LORA, ema={"decay": 0.5})),
            lambda: evaluate_run(run),
            lambda: export_run(run, tmp_path / "out"),
            lambda: export_run(run, tmp_path / "out", merged=True),
        ):
            with pytest.raises(MismatchError, match=said) as error:
                use()
            assert "\n" not in str(error.value)
    finally:
        file.write_bytes(kept)
    assert not list(tmp_path.glob("out/*"))


def test_a_classifier_trains_its_head(work: Path, tmp_path: Path) -> None:
    """The head of a base in bf16 computes in fp32, without mixed precision."""
    given = config(
        {"type": "lora", "r": 2, "target_modules": ["query"], "base_dtype": "bf16"}, "SequenceClassification"
    )
    run = trained(tmp_path / "run", given)
    model = as_in_evaluation(run, given)
    head = model.base_model.model.classifier.modules_to_save["default"]
    assert head.weight.dtype == torch.float32
    assert not torch.equal(head.weight, model.base_model.model.classifier.original_module.weight.float())
    assert {p.dtype for p in model.parameters() if not p.requires_grad} == {torch.bfloat16}
    export_run(run, tmp_path / "whole", merged=True)
    whole = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "whole")
    for parameter in model.parameters():
        parameter.data = parameter.data.float()  # so that only the logits are rounded to bf16
    torch.testing.assert_close(logits(whole), logits(model).float(), rtol=2**-8, atol=ROUNDING)
    torch.testing.assert_close(whole.classifier.weight, head.weight, rtol=0, atol=0)


def test_a_tied_output_layer_that_an_adapter_changes_is_exported_apart(tmp_path: Path) -> None:
    """The embeddings get LoRA, and the output layer, which has the same weights, does not."""
    given = config({**LORA, "dropout": 0.0, "target_modules": ["embed_tokens"]}, steps=2)
    run = trained(tmp_path / "run", given)
    export_run(run, tmp_path / "whole", merged=True)
    whole = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "whole")
    assert not torch.equal(whole.lm_head.weight, whole.model.embed_tokens.weight)
    expected = logits(as_in_evaluation(run, given))
    check_close(logits(whole), expected)


class Net(nn.Module):
    """A module of the user's own, with running statistics."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(8, 32), nn.BatchNorm1d(32), nn.ReLU())
        self.head = nn.Linear(32, 2)

    def forward(self, inputs: Tensor) -> Tensor:
        found: Tensor = self.head(self.body(inputs))
        return found


class Small(Task):
    """`part`: only the body has an adapter, and the head is trained as it is."""

    def __init__(self, kind: str = "lora", part: bool = False, scale: float = 1.0) -> None:
        self.options = {"type": kind, "target_modules": ["0"] if part else ["body.0"]}
        self.part, self.scale = part, scale

    def train_dataset(self) -> TensorDataset:
        inputs = torch.randn(64, 8, generator=torch.Generator().manual_seed(1))
        return TensorDataset(inputs, (inputs.sum(1) > 0).long())

    def eval_dataset(self) -> TensorDataset:
        return self.train_dataset()

    def model(self) -> nn.Module:
        model = Net()
        if not self.part:
            return with_adapter(model, self.options)
        model.body = with_adapter(model.body, self.options)  # type: ignore[assignment]
        return model

    def loss(self, output: Tensor, batch: Any) -> Loss:
        return Loss(nn.functional.cross_entropy(output, batch[1], reduction="sum"), len(output))


def small(**task: Any) -> Config:
    return Config.from_dict(
        {
            "task": {"target": f"{__name__}:Small", **task},
            "data": {"global_batch_size": 16, "micro_batch_size": 8},
            "optim": {"lr": 0.05},
            "train": {"steps": 3},
        }
    )


def built(given: Config) -> nn.Module:
    torch.manual_seed(0)
    return load_task(given.task).model()


@pytest.mark.parametrize("task", [{"kind": "lora"}, {"kind": "lokr"}, {"part": True}], ids=str)
def test_a_module_of_the_users_own(task: dict[str, Any], tmp_path: Path) -> None:
    given = small(**task)
    run = trained(tmp_path / "run", given)
    manifest = json.loads((max((run / "checkpoints").iterdir()) / "manifest.json").read_text())
    held = {name.removeprefix("model.") for name in manifest["tensors"] if name.startswith("model.")}
    assert any("running_mean" in name for name in held)  # buffers change
    assert ("head.weight" in held) == ("part" in task)
    assert not any("base_layer" in name for name in held)
    export_run(run, tmp_path / "whole", merged=True)
    plain = Net()
    plain.load_state_dict(load_file(tmp_path / "whole/model.safetensors"))
    inputs, answers = load_task(given.task).eval_dataset().tensors  # type: ignore[union-attr]
    with torch.no_grad():
        expected = nn.functional.cross_entropy(plain.eval()(inputs), answers).item()
    assert evaluate_run(run)["eval/loss"] == pytest.approx(expected, rel=ROUNDING)
    if "part" in task:
        export_run(run, tmp_path / "all")
        assert set(load_file(tmp_path / "all/model.safetensors")) == set(built(given).state_dict())
    else:
        with pytest.raises(
            ConfigError, match=r"has changed the buffer base_model.model.body.1.running_mean of the base"
        ):
            export_run(run, tmp_path / "adapter")


def test_a_checkpoint_over_other_frozen_parameters_is_refused(tmp_path: Path) -> None:
    run = trained(tmp_path / "run", small())
    newest = max((run / "checkpoints").iterdir())
    given = Config.from_dict({**small(part=True).model_dump(mode="json"), "train": {"steps": 5}})
    fork = Trainer(load_task(given.task), given, tmp_path / "fork", resume=str(newest), fork=True)
    with pytest.raises(MismatchError, match=r"was saved without base_model.* and is not here"):
        fork.fit()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"type": "lorra"}, "task.adapter.type: 'lorra': peft has no such adapter, did you mean lora?"),
        ({"type": None}, "task.adapter.type: None: peft has no such adapter; there are lora, "),
        ({"type": "prefix_tuning"}, "task.adapter.type: prefix_tuning: it adds tokens of its own to each text, which"),
        ({"type": "adalora"}, "task.adapter.type: adalora: it must be told the number of steps, and changes its ranks"),
        ({"rank": 3}, "task.adapter.rank: unknown key"),
        ({"target_module": ["q"]}, "task.adapter.target_module: unknown key, did you mean target_modules?"),
        ({"r": "4"}, "task.adapter.r: '4': input should be a valid integer"),
        ({"r": 0}, "task.adapter: `r` should be a positive integer value but the value passed is 0"),
        ({"target_modules": ["q_proj", "v_prj"]}, "'v_prj' is no module of LlamaForCausalLM, did you mean v_proj?"),
        ({"target_modules": "layers.*nothing"}, "task.adapter.target_modules: 'layers.*nothing' is no module of"),
        ({"target_modules": ["norm"]}, "task.adapter: Target module LlamaRMSNorm"),
        (
            {"modules_to_save": ["lm_hed"]},
            "task.adapter.modules_to_save: 'lm_hed' is no module of LlamaForCausalLM",
        ),
        ({"init_lora_weights": "pissa"}, "task.adapter.init_lora_weights: 'pissa' changes the frozen weights, so the"),
        ({"base_dtype": "int4"}, "task.adapter.base_dtype: 'int4'; give bf16, or leave it out"),
    ],
)
def test_bad_input_is_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        load_task(config({**LORA, **changes}).task).model()
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_an_adapter_that_is_no_section_is_refused() -> None:
    for given, message in (
        ("lora", "task.adapter: 'lora'; give a section, for "),
        ({}, "task.adapter.type: missing; "),
    ):
        with pytest.raises(ConfigError, match=message):
            load_task(config(given).task)


def test_the_command_line(run: Run, tmp_path: Path, work: Path) -> None:
    (tmp_path / "bad.json").write_text(config({**LORA, "target_modules": ["q_prj"]}).model_dump_json())
    for name in ("base", "rows.jsonl"):
        (tmp_path / name).symlink_to(work / name)
    without = trained(tmp_path / "without", config(None, steps=1))  # packs the rows, which is shown on a line
    said = refused(run("distrib", "train", "bad.json", "--run-dir", "new", XDG_CACHE_HOME=str(work / "cache")))
    assert said == "error: task.adapter.target_modules: 'q_prj' is no module of LlamaForCausalLM, did you mean q_proj?"
    assert not (tmp_path / "new").exists()
    said = refused(run("distrib", "export", without, "--out", "out", "--merged"))
    assert said.startswith("error: --merged: ")
    assert said.endswith("is of a run without an adapter, so leave --merged out")


def test_explain_counts_what_is_trained(capsys: pytest.CaptureFixture[str]) -> None:
    explain_run(config(LORA), 2)
    assert "8,192 trained, 1,082,880 frozen" in capsys.readouterr().out
