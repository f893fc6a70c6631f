"""The Hugging Face tasks: the same losses under every strategy, documents that do not attend to each other, and import
and export of models. All models are made here, with random weights."""

import importlib
import json
import math
import os
import shutil
import socket
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import ROOT, Run, check, check_same, interrupted, lines, losses, refused
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from distrib import Config, Trainer
from distrib.data.order import sample_indices
from distrib.errors import ConfigError
from distrib.targets import hidden_by
from distrib.task import load_task
from distrib.tasks import pretrained
from distrib.tasks.hugging_face import CausalLM, HuggingFace, SequenceClassification
from distrib.training import build
from distrib.training.commands import evaluate_run, explain_run, export_run

transformers = pytest.importorskip("transformers")

# fp32 sums of a few hundred terms; see tests/tasks/test_language_model.py
ROUNDING = 1e-5
SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
MODELS: dict[str, dict[str, Any]] = {
    "llama": {**SMALL, "model_type": "llama", "intermediate_size": 32, "tie_word_embeddings": True},
    "gpt2": {"model_type": "gpt2", "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64},
    "mistral": {
        **SMALL,
        "model_type": "mistral",
        "intermediate_size": 32,
        "num_key_value_heads": 1,
        "sliding_window": 4,
    },
    "opt": {**SMALL, "model_type": "opt", "ffn_dim": 32, "word_embed_proj_dim": 16},
    "bert": {**SMALL, "model_type": "bert", "intermediate_size": 32},
}
CAUSAL, CLASSIFIER = (f"distrib.tasks.hugging_face:{name}" for name in ("CausalLM", "SequenceClassification"))


@pytest.fixture(scope="module", autouse=True)
def work(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Make a folder with its own cache, some texts and a tokenizer, and change to it."""
    folder = tmp_path_factory.mktemp("work")
    generator = np.random.default_rng(3)
    words = np.array(["tensor", "process", "rank", "gradient", "step", "loss"])
    with open(folder / "rows.jsonl", "w") as file:
        for number in range(300):
            chosen = generator.choice(words, generator.integers(1, 12)).tolist()
            row = {"text": f"{' '.join(chosen)} {number}", "prompt": f"say {number}: ", "label": int("loss" in chosen)}
            file.write(f"{json.dumps(row)}\n")
    byte_pairs(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
        patch.chdir(folder)
        yield folder


def byte_pairs(folder: Path) -> None:
    """Save a byte-pair tokenizer like GPT-2's, with 300 tokens and no pad_token."""
    from tokenizers import ByteLevelBPETokenizer

    trained = ByteLevelBPETokenizer()
    trained.train([str(folder / "rows.jsonl")], vocab_size=300, special_tokens=["<|endoftext|>"], show_progress=False)
    end = {"eos_token": "<|endoftext|>", "bos_token": "<|endoftext|>"}
    transformers.PreTrainedTokenizerFast(tokenizer_object=trained._tokenizer, **end).save_pretrained(folder / "bpe")


def causal(model: Any = None, **more: Any) -> CausalLM:
    given = {"model": model or MODELS["llama"], "files": "rows.jsonl", "tokenizer": "bytes", "context_length": 24}
    return CausalLM(**{**given, **more})


def classifier(model: Any = None, **more: Any) -> SequenceClassification:
    given = {"model": model or MODELS["bert"], "files": "rows.jsonl", "tokenizer": "bytes", "classes": 2}
    return SequenceClassification(**{**given, **more})


@cache
def sensitive(architecture: str) -> Any:
    """Return a model with large weights, so that attention has a visible effect."""
    torch.manual_seed(0)
    model = causal(MODELS[architecture]).model()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.5)
    return model.eval()


def total(task: HuggingFace, model: Any, rows: list[str]) -> tuple[Tensor, float]:
    """Return loss and count of these texts, in one batch of all windows."""
    Path("some.jsonl").write_text("".join(f"{json.dumps({'text': row})}\n" for row in rows))
    task.files = task.eval_files = "some.jsonl"
    task.__dict__.pop("packed", None)
    windows = task.train_dataset()
    batch = windows.__getitems__(list(range(len(windows))))  # type: ignore[arg-type]
    loss = task.loss(task.forward(model, batch), batch)
    return loss.total.detach(), float(loss.count)


@settings(max_examples=5)
@given(rows=st.lists(st.text("abcdefgh ", min_size=1, max_size=10), min_size=2, max_size=4))
@pytest.mark.parametrize("architecture", ["llama", "gpt2", "mistral"])
def test_a_documents_loss_does_not_depend_on_packing(architecture: str, rows: list[str]) -> None:
    model, length = sensitive(architecture), 60
    together, count = total(causal(MODELS[architecture], context_length=length), model, rows)
    alone = [total(causal(MODELS[architecture], context_length=length), model, [row]) for row in rows]
    apart, as_many = total(causal(MODELS[architecture], context_length=length, packing=False), model, rows)
    assert (
        count == as_many == sum(len(row) for row in rows)
    )  # each document's eos_token is a target, its first token is not
    expected = torch.stack([part for part, _ in alone]).sum()
    torch.testing.assert_close(together, expected, rtol=10 * ROUNDING, atol=0)
    torch.testing.assert_close(apart, expected, rtol=10 * ROUNDING, atol=0)


def test_the_loss_is_the_one_that_transformers_computes() -> None:
    model, row = sensitive("llama"), "what is to be predicted"
    ids = torch.tensor([[*(byte + 3 for byte in row.encode()), 1]])  # ByT5's numbers, and its end
    expected = model(input_ids=ids, labels=ids).loss.detach()
    mine, count = total(causal(context_length=60), model, [row])
    torch.testing.assert_close(mine / count, expected, rtol=ROUNDING, atol=0)


def test_the_loss_does_not_count_the_prompt() -> None:
    task = causal(tokenizer="bpe", prompt_column="prompt", context_length=40, packing=False)
    batch = task.train_dataset().__getitems__(list(range(100)))
    tokenizer = transformers.AutoTokenizer.from_pretrained("bpe")
    rows = [json.loads(line) for line in Path("rows.jsonl").read_text().splitlines()]
    texts = {row["prompt"]: row["text"] for row in rows}
    checked = 0
    for ids, targets in zip(batch["input_ids"], batch["targets"], strict=True):
        if len(targets[targets != -100]) and tokenizer.decode(ids).startswith("say"):
            prompt, colon, _ = tokenizer.decode(ids).partition(": ")
            said = tokenizer.decode(targets[targets != -100])
            assert said == (texts[prompt + colon] + "<|endoftext|>")[: len(said)]
            checked += 1
    assert checked > 50


def llama_like(folder: Path) -> None:
    """Save a tokenizer that adds <s> before a text, as Llama's does."""
    from tokenizers import processors

    byte_pairs(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "bpe")
    tokenizer.add_special_tokens({"bos_token": "<s>", "eos_token": "<|im_end|>"})
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.bos_token_id)]
    )
    tokenizer.save_pretrained(folder / "llama")


def documents(task: CausalLM, *rows: dict[str, str]) -> list[str]:
    Path("chat.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    task.files = task.eval_files = "chat.jsonl"  # both, because otherwise a row might be held out
    read = task.train_dataset()
    bounds = zip(read.starts, read.starts[1:], strict=False)
    return [task.tokenizer.decode(read.tokens[start:end].astype(np.int64)) for start, end in bounds]


def test_special_tokens_are_not_added_twice(work: Path) -> None:
    llama_like(work)
    texts = ("loss", "<s>loss", "loss<|im_end|>", "<s>loss<|im_end|>\n", "loss \n", "")
    found = documents(causal(tokenizer="llama"), *({"text": text} for text in texts))
    assert found == [
        *(4 * ["<s>loss<|im_end|>"]),
        *("<s>loss \n<|im_end|>", "<s><|im_end|>"),
    ]
    rows = (
        {"prompt": "<s>step<|im_end|>\n", "text": "loss<|im_end|>"},  # the prompt's own end stays
        {"prompt": "step ", "text": "loss"},
    )
    found = documents(causal(tokenizer="llama", prompt_column="prompt"), *rows)
    assert found == ["<s>step<|im_end|>\nloss<|im_end|>", "<s>step loss<|im_end|>"]


def test_too_long_prompts_are_reported(capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"prompt": "p" * length, "text": "answer"} for length in (5, 24, 25, 60)]  # each in both files
    documents(causal(prompt_column="prompt", packing=False), *rows)
    assert "task.prompt_column: 4 row(s) have a prompt longer than task.context_length 24" in capsys.readouterr().err
    documents(causal(prompt_column="prompt", packing=False, context_length=40), *rows)
    assert "2 row(s) have a prompt longer than task.context_length 40" in capsys.readouterr().err


def test_padding_does_not_change_a_classifiers_loss() -> None:
    task = classifier({**MODELS["gpt2"], "n_positions": 128}, tokenizer="bpe", context_length=100)
    torch.manual_seed(0)
    model, samples = task.model().eval(), task.train_dataset()
    batch = samples.__getitems__(list(range(8)))
    assert len({int(row.sum()) for row in batch["attention_mask"]}) > 1
    together = task.loss(task.forward(model, batch), batch)
    parts = [samples.__getitems__([number]) for number in range(8)]
    alone = [task.loss(task.forward(model, part), part).total for part in parts]
    torch.testing.assert_close(together.total, torch.stack(alone).sum(), rtol=ROUNDING, atol=0)
    assert together.count == 8


@pytest.mark.parametrize(
    ("architecture", "message"),
    [
        (
            "opt",
            "task.packing: OPTForCausalLM of opt lets documents in one window attend to each other; set packing: false",
        ),
        (
            "bert",
            "task.model: BertLMHeadModel of bert attends to later tokens; if it has is_decoder, set it to true",
        ),
    ],
)
def test_architectures_that_do_not_fit_are_refused(architecture: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        causal(MODELS[architecture]).model()
    decoder = {"is_decoder": True} if architecture == "bert" else {}
    causal({**MODELS[architecture], **decoder}, packing=False).model()


def test_the_layers_are_the_blocks_and_matrices_decay() -> None:
    for task in (causal(), causal(MODELS["gpt2"]), classifier()):
        model = task.model()
        assert len(task.blocks(model)) == 2
        assert all("Layer" in type(block).__name__ or "Block" in type(block).__name__ for block in task.blocks(model))
    decaying, others = build.optimizer_maker(
        causal(MODELS["gpt2"]), Config.from_dict({"train": {"steps": 1}, "optim": {"weight_decay": 0.1}})
    )(list(model.named_parameters())).param_groups
    assert {"LayerNorm" in name or name.endswith("bias") for name in others["param_names"]} == {True}
    assert {"LayerNorm" in name or name.endswith("bias") for name in decaying["param_names"]} == {False}


def test_the_dtype_of_tokens_fits_the_vocabulary() -> None:
    assert causal().train_dataset().tokens.dtype == np.uint16
    wide = causal({**MODELS["llama"], "vocab_size": 70_000})
    assert wide.train_dataset().tokens.dtype == np.uint32
    shutil.copytree("bpe", "copied")
    assert causal(tokenizer="copied").packed == causal(tokenizer="bpe").packed != causal().packed
    assert causal(tokenizer="bpe", prompt_column="prompt").packed != causal(tokenizer="bpe").packed


def test_missing_config_values_come_from_the_tokenizer() -> None:
    config = causal(tokenizer="bpe").config
    end = transformers.AutoTokenizer.from_pretrained("bpe").eos_token_id
    assert (config.vocab_size, config.eos_token_id, config.pad_token_id) == (300, end, None)
    assert causal({**MODELS["llama"], "vocab_size": 512}).model().lm_head.weight.shape == (512, 16)


STEPS = 12
SCRIPT = """
from distrib import Config, Trainer
from distrib.targets import hidden_by
from distrib.task import load_task
from distrib.tasks import pretrained

for name, values in {runs}.items():
    config = Config.from_dict(values)
    Trainer(load_task(config.task), config, f"runs/{{name}}").fit()
"""


def config(target: str, strategy: str = "auto", **task: Any) -> dict[str, Any]:
    return {
        "seed": 7,
        "task": {"target": target, "files": "rows.jsonl", **task},
        "data": {"global_batch_size": 8, "micro_batch_size": 2},
        "optim": {"name": "adamw", "lr": 0.01, "weight_decay": 0.1},
        "train": {"steps": STEPS, "max_grad_norm": 1.0},
        "checkpoint": {"every_steps": 6},
        "strategy": {"name": strategy, "activation_checkpointing": strategy == "fsdp2"},
    }


def language(strategy: str = "auto", **task: Any) -> dict[str, Any]:
    given = {"model": MODELS["llama"], "tokenizer": "bytes", "context_length": 24}
    return config(CAUSAL, strategy, **{**given, **task})


def plain(task: CausalLM) -> list[float]:
    """Train with a plain PyTorch loop over the whole global batch, with the mean that torch computes."""
    torch.manual_seed(7)
    model, windows = task.model().train(), task.train_dataset()
    matrices, others = ([p for p in model.parameters() if (p.dim() > 1) == flag] for flag in (True, False))
    update = torch.optim.AdamW(
        [{"params": matrices}, {"params": others, "weight_decay": 0.0}], lr=0.01, weight_decay=0.1
    )
    found = []
    for step in range(STEPS):
        positions = np.arange(step * 8, (step + 1) * 8, dtype=np.uint64)
        batch = windows.__getitems__(sample_indices(positions, len(windows), 7).tolist())  # type: ignore[arg-type]
        logits = model(input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False).logits
        loss = F.cross_entropy(logits.flatten(0, 1), batch["targets"].flatten())
        update.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        update.step()
        found.append(loss.item())
    return found


@pytest.fixture(scope="module")
def trained(work: Path) -> Path:
    """Make a run of each kind in this process."""
    for name, values in (("language", language()), ("classes", classes())):
        loaded = Config.from_dict(values)
        Trainer(load_task(loaded.task), loaded, work / "runs" / name).fit()
    return work / "runs"


def classes(strategy: str = "auto", **task: Any) -> dict[str, Any]:
    given = {"model": MODELS["bert"], "tokenizer": "bytes", "classes": ["without", "with loss"], "context_length": 64}
    return config(CLASSIFIER, strategy, **{**given, **task})


def test_two_processes_have_the_same_losses_under_every_strategy(
    run: Run, work: Path, trained: Path, tmp_path: Path
) -> None:
    runs = {strategy: language(strategy) for strategy in ("ddp", "zero3", "fsdp2")}
    runs["classes"] = classes("ddp")
    (tmp_path / "train.py").write_text(SCRIPT.format(runs=runs))
    (tmp_path / "rows.jsonl").symlink_to(work / "rows.jsonl")
    with socket.create_server(("127.0.0.1", 0)) as hub:  # requests to the Hub would arrive here
        hub.setblocking(False)
        outside = {"HF_ENDPOINT": f"http://127.0.0.1:{hub.getsockname()[1]}", "HF_HUB_OFFLINE": "0"}
        cached = {"XDG_CACHE_HOME": str(tmp_path / "cache"), "TORCH_EXTENSIONS_DIR": str(tmp_path / "extensions")}
        result = run("distrib", "launch", "--processes", 2, "train.py", **outside, **cached)
        check(result)
        with pytest.raises(BlockingIOError):
            hub.accept()
    assert result.stderr.count("packing") == 2  # for the first run and the run on classes, by one process each
    assert "Loading" not in result.stderr
    task = causal()
    expected = plain(task)
    assert expected[-1] < expected[0] - 0.5
    assert len({line["count"] for line in lines(trained / "language")}) > 1  # windows have different counts
    np.testing.assert_allclose(losses(trained / "language"), expected, rtol=ROUNDING)
    for strategy in ("ddp", "zero3", "fsdp2"):
        at = tmp_path / "runs" / strategy
        assert {line["strategy"] for line in lines(at)} == {strategy}
        np.testing.assert_allclose(losses(at), expected, rtol=ROUNDING, err_msg=strategy)
        check_evaluated(at, trained / "language")
    np.testing.assert_allclose(losses(tmp_path / "runs/classes"), losses(trained / "classes"), rtol=ROUNDING)
    check_evaluated(tmp_path / "runs/classes", trained / "classes")
    check_exported(run, tmp_path / "runs/zero3", tmp_path / "exported", task)


def check_evaluated(at: Path, alone: Path) -> None:
    (here,), (there,) = (lines(path, "evals.jsonl") for path in (at, alone))
    assert here["metrics"] == pytest.approx(there["metrics"], rel=ROUNDING)


def check_exported(run: Run, at: Path, out: Path, task: CausalLM) -> None:
    """Export the weights with the command, load them with transformers, and train them further by config."""
    said = check(run("distrib", "export", at, "--out", out))
    assert {Path(line).name for line in said.splitlines()} == {path.name for path in out.iterdir()}
    assert {"config.json", "generation_config.json", "model.safetensors", "tokenizer_config.json"} <= set(
        os.listdir(out)
    )
    model, found = transformers.AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not any(found.values())
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.config.use_cache
    held_out = task.eval_dataset()
    assert held_out is not None
    (evaluated,) = lines(at, "evals.jsonl")
    assert perplexity(model, held_out) == pytest.approx(evaluated["metrics"]["eval/perplexity"], rel=ROUNDING)
    assert (
        transformers.AutoTokenizer.from_pretrained(out)("rank 0")["input_ids"] == task.tokenizer("rank 0")["input_ids"]
    )
    refusal = refused(run("distrib", "export", at, "--out", out))
    assert "model.safetensors: exists already; choose another folder" in refusal
    again = causal(str(out), tokenizer=None)
    for name, tensor in again.model().state_dict().items():
        torch.testing.assert_close(tensor, model.state_dict()[name], rtol=0, atol=0)
    loaded = Config.from_dict(language(model=str(out), tokenizer=None))
    Trainer(load_task(loaded.task), loaded, out.parent / "runs/tuned").fit()
    assert losses(out.parent / "runs/tuned")[0] < losses(at)[0] - 0.5  # it starts from the trained weights
    new_head = SequenceClassification(str(out), "rows.jsonl", classes=["no", "yes"])
    assert new_head.model().score.weight.shape == (2, 16)


def perplexity(model: Any, held_out: Any) -> float:
    """Compute it from the probabilities, window by window and token by token."""
    nats, count = 0.0, 0
    for sample in held_out:
        positions, targets = sample["position_ids"], sample["targets"]
        with torch.no_grad():
            probabilities = model(sample["input_ids"][None], position_ids=positions[None], use_cache=False).logits[0]
        for place in (targets != -100).nonzero().flatten().tolist():
            nats -= math.log(probabilities.double().softmax(-1)[place, targets[place]])
            count += 1
    return math.exp(nats / count)


def test_an_interrupted_hugging_face_run_has_the_same_bits(trained: Path, tmp_path: Path) -> None:
    for name, values in (("language", language()), ("classes", classes())):
        at = interrupted(trained / name, tmp_path / name, after=6)
        loaded = Config.from_dict(values)
        Trainer(load_task(loaded.task), loaded, at).fit()
        check_same(at, trained / name)


def test_an_exported_classifier_can_be_loaded(trained: Path, tmp_path: Path) -> None:
    export_run(trained / "classes", tmp_path / "out")
    classify = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    assert classify.config.id2label == {0: "without", 1: "with loss"}
    again = classifier(str(tmp_path / "out"), tokenizer=None, classes=None, context_length=64)
    assert again.classes == ["without", "with loss"]
    held_out = again.eval_dataset()
    assert held_out is not None
    right = [classify(sample["input_ids"][None]).logits.argmax() == sample["labels"] for sample in held_out]
    accuracy = float(torch.stack(right).double().mean())
    assert evaluate_run(trained / "classes")["eval/accuracy"] == pytest.approx(accuracy)
    with pytest.raises(
        ConfigError, match=r"task.classes: \['a', 'b'\]; leave it out, the model's classes are without, "
    ):
        classifier(str(tmp_path / "out"), classes=["a", "b"])


@pytest.fixture(scope="module")
def saved(work: Path) -> Path:
    """Save a model's folder with transformers."""
    values = {**MODELS["llama"], "vocab_size": 259, "max_position_embeddings": 32}
    model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(**values))
    model.save_pretrained(work / "saved")
    causal().tokenizer.save_pretrained(work / "saved")
    return work / "saved"


def test_a_config_of_a_folder_has_random_weights(saved: Path) -> None:
    torch.manual_seed(1)
    one = causal(str(saved / "config.json")).model().state_dict()
    torch.manual_seed(1)
    other = causal(str(saved / "config.json")).model().state_dict()
    imported = causal(str(saved), tokenizer=None).model().state_dict()
    for name, tensor in one.items():
        assert torch.equal(tensor, other[name])
    assert not torch.equal(one["lm_head.weight"], imported["lm_head.weight"])


def used(arguments: dict[str, Any]) -> None:
    task = causal(**arguments)
    task.train_dataset()
    task.model()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"model": "org/model"},
            "task.model: 'org/model' is not a local folder, and nothing is downloaded; fetch ",
        ),
        ({"model": 7}, "task.model: 7; give the path of a local folder"),
        (
            {"model": {"model_type": "lama"}},
            "task.model.model_type: transformers has no 'lama', did you mean",
        ),
        (
            {"model": {"n_layer": 2}},
            "task.model: the config has no model_type; give the architecture, for example",
        ),
        (
            {"model": {**MODELS["gpt2"], "n_layers": 3}},
            "task.model.n_layers: gpt2 has no such key, did you mean n_layer?",
        ),
        ({"model": {**MODELS["llama"], "hidden_size": "x"}}, "task.model: Validation error for field 'hidden_size'"),
        ({"model": {**MODELS["llama"], "hidden_size": 15}}, "task.model: Class validation error"),
        ({"model": {"model_type": "t5", "d_model": 8}}, "task.model: Unrecognized configuration class"),
        (
            {"model": {**MODELS["llama"], "vocab_size": 99}},
            "task.tokenizer: it has 259 tokens, the model has 99; give",
        ),
        ({"tokenizer": None}, "task.tokenizer: missing, and task.model is a config; give a local folder, or bytes"),
        ({"tokenizer": "gpt2"}, "task.tokenizer: 'gpt2' is not a local folder, and nothing is downloaded"),
        (
            {"tokenizer": "."},
            "task.tokenizer: . has no tokenizer_config.json; give a folder that save_pretrained wrote",
        ),
        ({"model": "."}, "task.model: . has no config.json; give a folder that save_pretrained wrote"),
        (
            {"model": MODELS["gpt2"], "context_length": 65},
            "task.context_length: 65; the model has 64 positions, give no",
        ),
        ({"context_length": 1}, "task.context_length: 1; give a whole number, 2 or more"),
        ({"packing": "yes"}, "task.packing: 'yes'; give true or false"),
        (
            {"text_column": "body"},
            "task.files: rows.jsonl has no column 'body'; it has: text, prompt, label; set the",
        ),
        ({"text_column": 3}, "task.text_column: 3; give the name of a column"),
        ({"files": "no.jsonl"}, "task.files: 'no.jsonl' matches no file, looked for from /"),
        ({"eval_files": "no.jsonl"}, "task.eval_files: 'no.jsonl' matches no file, looked for from /"),
    ],
)
def test_errors_in_the_config_are_named(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        used(arguments)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"classes": None}, "task.classes: None; give the names of the classes, or how many: 2 or more"),
        ({"classes": 1}, "task.classes: 1; give the names"),
        ({"classes": ["a", "a"]}, "task.classes: ['a', 'a']; give the names"),
        ({"classes": ["a", "b"], "label_column": "text"}, "is none of the classes a, b"),
        ({"label_column": "class"}, "task.files: rows.jsonl has no column 'class'; it has: text, prompt, label"),
    ],
)
def test_errors_in_a_classifiers_config_are_named(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        classifier(**arguments).train_dataset()
    assert message in str(error.value)


@given(
    st.dictionaries(
        st.sampled_from(["model", "tokenizer", "files", "context_length", "packing", "text_column"]),
        st.none() | st.integers() | st.text(max_size=5) | st.lists(st.integers()) | st.floats(),
        min_size=1,
    )
)
@settings(max_examples=50)
def test_any_arguments_are_accepted_or_refused_in_one_line(arguments: dict[str, Any]) -> None:
    try:
        causal(**arguments).train_dataset()
    except ConfigError as error:
        assert "\n" not in str(error)  # noqa: PT017, it may also be taken


def test_errors_in_a_model_folder_are_named(saved: Path, tmp_path: Path) -> None:
    def spoilt(name: str, **changes: Any) -> Path:
        folder = shutil.copytree(saved, tmp_path / name)
        values = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**values, **changes}))
        return folder

    pickled, bare = spoilt("pickled"), spoilt("bare")
    (pickled / "model.safetensors").rename(pickled / "pytorch_model.bin")
    (bare / "model.safetensors").unlink()
    (spoilt("damaged") / "model.safetensors").write_bytes(b"x" * 100)
    remote = {"auto_map": {"AutoConfig": "code.Config"}, "model_type": "its_own"}
    for folder, message in (
        (pickled, "has its weights in pytorch_model.bin, a pickle, which can run code; if you trust it, convert it: "),
        (bare, "has no model.safetensors; for random weights give .*/bare/config.json"),
        (tmp_path / "damaged", "task.model: "),
        (spoilt("deeper", num_hidden_layers=3), "/deeper lacks 9 of the weights, first model.layers.2"),
        (spoilt("wider", intermediate_size=64), "task.model: "),
        (spoilt("quantized", quantization_config={"quant_method": "gptq", "bits": 4}), "are quantized, and cannot be"),
        (
            spoilt("remote", **remote),
            "transformers has no 'its_own', and code that comes with a model is not run",
        ),
    ):
        with pytest.raises(ConfigError, match=message) as error:
            causal(str(folder), tokenizer=None).model()
        assert "\n" not in str(error.value)


def test_a_missing_extra_is_one_line(run: Run, tmp_path: Path) -> None:
    here, elsewhere = tmp_path / "here", tmp_path / "elsewhere"
    here.mkdir()
    elsewhere.mkdir()
    (elsewhere / "transformers.py").write_text("raise ModuleNotFoundError('no', name='transformers')")
    (here / "config.yaml").write_text(json.dumps(language()))
    said = refused(run("distrib", "train", "config.yaml", cwd=here, PYTHONPATH=str(elsewhere)))
    assert said.endswith(
        "task.target: this task needs transformers, which is not installed; pip install 'distrib[huggingface]'"
    )


def test_a_users_folder_that_shadows_a_library_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "datasets").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "datasets", raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    assert hidden_by("datasets") is None  # a folder of data: without an __init__.py it hides nothing
    (tmp_path / "datasets" / "__init__.py").write_text("raise RuntimeError")
    importlib.invalidate_caches()
    with pytest.raises(ConfigError, match=rf"the library datasets, but {tmp_path}/datasets/__init__.py is imported"):
        pretrained.require_installed()


def test_explain_accepts_the_config(capsys: pytest.CaptureFixture[str]) -> None:
    explain_run(Config.load(ROOT / "configs/llama-tiny.yaml", ["task.files=rows.jsonl"]), 2)
    assert "optimizer state, a rank" in capsys.readouterr().out
