"""What a byte's loss depends on, what is counted, and that every strategy trains the same model."""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import ROOT, Run, check, check_same, interrupted, lines, losses
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F

from distrib import Config, Trainer
from distrib.data.order import sample_indices
from distrib.errors import ConfigError
from distrib.run_folder.export import export
from distrib.task import load_task
from distrib.tasks.language_model import GPT, SEPARATOR, LanguageModel
from distrib.training import build
from distrib.training.commands import evaluate_run, explain_run

SHAPE = {"context_length": 32, "layers": 2, "heads": 2, "width": 16}
# Sums in fp32 of a few hundred terms, and angles of positions up to 100 rounded at 1e-7 of their value.
ROUNDING = 1e-5


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


def task(**more: Any) -> LanguageModel:
    return LanguageModel(text=__file__, **{**SHAPE, **more})


def gpt() -> GPT:
    """Return a model with large weights, so that attention has a visible effect."""
    torch.manual_seed(0)
    model = GPT(layers=2, heads=2, width=16)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return model


def row(*documents: bytes) -> Tensor:
    """Return a sample of these documents, shape (1, length)."""
    separated = [token for document in documents for token in (SEPARATOR, *document)]
    return torch.tensor([[*separated, SEPARATOR]])


def total(model: GPT, sample: Tensor) -> tuple[Tensor, int, list[Tensor]]:
    """Return loss, count and gradients of a sample."""
    loss = task().loss(task().forward(model, sample), sample)
    return loss.total.detach(), int(loss.count), list(torch.autograd.grad(loss.total, list(model.parameters())))


@settings(max_examples=25)
@given(st.lists(st.binary(min_size=1, max_size=20), min_size=1, max_size=5))
def test_a_documents_loss_and_gradient_do_not_depend_on_packing(documents: list[bytes]) -> None:
    model = gpt()
    together, count, gradients = total(model, row(*documents))
    alone = [total(model, row(document)) for document in documents]
    assert count == sum(len(document) for document in documents) == sum(part[1] for part in alone)
    torch.testing.assert_close(together, torch.stack([part[0] for part in alone]).sum(), rtol=ROUNDING, atol=0)
    for gradient, parts in zip(gradients, zip(*(part[2] for part in alone), strict=True), strict=True):
        largest = gradient.abs().max().item()  # an entry is a sum of such terms with both signs
        torch.testing.assert_close(gradient, torch.stack(parts).sum(0), rtol=0, atol=10 * ROUNDING * largest)


def test_a_prediction_depends_only_on_earlier_bytes_of_its_document() -> None:
    model = gpt()
    sample = row(b"another", b"document")[:, :-1]
    before = model(sample)
    for place in range(sample.shape[1]):
        changed = sample.clone()
        changed[0, place] = (changed[0, place] + 1) % 256
        affected = (model(changed) != before).any(-1)[0].nonzero().flatten().tolist()
        document = range(8) if place < 8 else range(8, 17)
        if sample[0, place] != SEPARATOR:  # removing a separator would join two documents
            assert affected == [other for other in document if other >= place]


def test_the_loss_is_the_mean_over_the_bytes_of_all_samples() -> None:
    model = gpt()
    generator = torch.Generator().manual_seed(1)
    samples = torch.randint(0, 256, (12, 33), generator=generator)
    samples[torch.rand(samples.shape, generator=generator) < torch.arange(12)[:, None] / 12] = SEPARATOR
    parts = [task().loss(task().forward(model, part), part) for part in samples.split(4)]
    assert len({int(part.count) for part in parts}) == 3  # counts differ, so a mean of means would be wrong
    counted = samples[:, 1:] != SEPARATOR
    expected = F.cross_entropy(model(samples[:, :-1])[counted], samples[:, 1:][counted])
    got = sum(part.total for part in parts) / sum(part.count for part in parts)
    torch.testing.assert_close(got, expected, rtol=ROUNDING, atol=0)


def test_weight_decay_is_for_matrices() -> None:
    config = Config.from_dict({"train": {"steps": 1}, "optim": {"weight_decay": 0.1}})
    params = list(task().model().named_parameters())
    decaying, others = build.optimizer_maker(task(), config)(params).param_groups
    assert (decaying["weight_decay"], others["weight_decay"]) == (0.1, 0.0)
    assert sorted(decaying["param_names"] + others["param_names"]) == sorted(name for name, _ in params)
    assert all(name.endswith(".bias") or "norm." in name for name in others["param_names"])
    assert not any(name.endswith(".bias") or "norm." in name for name in decaying["param_names"])


def test_the_initial_loss_and_the_variance_of_layers() -> None:
    torch.manual_seed(0)
    model = GPT(layers=8, heads=4, width=256)
    assert model.blocks[0].feed_forward_in.weight.std().item() == pytest.approx(0.02, rel=0.02)
    assert model.blocks[0].feed_forward_out.weight.std().item() == pytest.approx(0.02 / 4, rel=0.02)
    assert model.head.weight is model.embedding.weight


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"width": 20, "heads": 4}, "task.width: 20 is not an even number for each of 4 heads; nearest that fits: 16"),
        ({"layers": 0}, "task.layers: 0; give a whole number, 1 or more"),
        ({"context_length": "long"}, "task.context_length: 'long'; give a whole number"),
        ({"dropout": 1.0}, "task.dropout: 1.0; give 0 or more, less than 1"),
        ({"text": "no/such/file"}, "task.text: 'no/such/file' matches no file"),
    ],
)
def test_errors_in_the_config_are_named(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        LanguageModel(**arguments)
    assert message in str(error.value)


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("gpt-*.yaml")), ids=lambda path: path.name)
def test_explain_accepts_the_configs(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    explain_run(Config.load(path), 8 if path.stem != "gpt-tiny" else 2)
    assert "optimizer state, a rank" in capsys.readouterr().out


STEPS, BATCH, MICRO = 20, 8, 2
STRATEGIES = ("ddp", "zero1", "zero2", "zero3", "fsdp2")
SCRIPT = """
import sys
from distrib import Config, Trainer
from distrib.task import load_task

for strategy in {strategies}:
    config = Config.from_dict({{**{config}, "strategy": {{"name": strategy, "activation_checkpointing": True}}}})
    Trainer(load_task(config.task), config, f"runs/{{strategy}}").fit()
"""


def written(folder: Path) -> dict[str, Any]:
    """Write some text, and return the config of a run on it."""
    folder.mkdir()
    generator = np.random.default_rng(3)
    for number in range(100):
        words = generator.choice([b"tensor", b"process", b"rank", b"gradient", b"step"], generator.integers(1, 12))
        (folder / f"{number}.txt").write_bytes(b" ".join(words.tolist()) + b" %d" % number)
    return {
        "seed": 7,
        "task": {"target": "distrib.tasks.language_model:LanguageModel", "text": f"{folder}/*.txt", **SHAPE},
        "data": {"global_batch_size": BATCH, "micro_batch_size": MICRO},
        "optim": {"name": "adamw", "lr": 0.01, "weight_decay": 0.5},
        "train": {"steps": STEPS, "max_grad_norm": 1.0},
    }


def plain(language_model: LanguageModel) -> tuple[list[float], GPT]:
    """Train with a plain PyTorch loop over the whole global batch."""
    torch.manual_seed(7)
    model, windows = language_model.model(), language_model.train_dataset()
    matrices = [
        parameter for name, parameter in model.named_parameters() if name.endswith("weight") and "norm" not in name
    ]
    others = [parameter for name, parameter in model.named_parameters() if name.endswith("bias") or "norm" in name]
    update = torch.optim.AdamW(
        [{"params": matrices}, {"params": others, "weight_decay": 0.0}], lr=0.01, weight_decay=0.5
    )
    found = []
    for step in range(STEPS):
        positions = np.arange(step * BATCH, (step + 1) * BATCH, dtype=np.uint64)
        batch = torch.stack([windows[int(index)] for index in sample_indices(positions, len(windows), 7)])
        inputs, targets = batch[:, :-1], batch[:, 1:]
        loss = F.cross_entropy(model(inputs).flatten(0, 1), targets.flatten(), ignore_index=SEPARATOR)
        update.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        update.step()
        found.append(loss.item())
    return found, model


def test_every_strategy_on_one_and_two_processes_equals_a_plain_loop(run: Run, tmp_path: Path) -> None:
    values = written(tmp_path / "text")
    (tmp_path / "train.py").write_text(SCRIPT.format(strategies=STRATEGIES, config=values))
    check(run("distrib", "launch", "--processes", 2, "train.py", TORCH_EXTENSIONS_DIR=str(tmp_path / "extensions")))
    config = Config.from_dict(values)
    language_model = load_task(config.task)
    assert isinstance(language_model, LanguageModel)
    Trainer(language_model, config, tmp_path / "runs/single").fit()
    expected, model = plain(language_model)
    assert expected[-1] < expected[0] - 0.5
    held_out = language_model.eval_dataset()
    assert held_out is not None
    bits = bits_per_byte(model, list(held_out))
    for strategy in ("single", *STRATEGIES):
        at = tmp_path / "runs" / strategy
        assert {line["strategy"] for line in lines(at)} == {strategy}
        np.testing.assert_allclose(losses(at), expected, rtol=ROUNDING, err_msg=strategy)
        (evaluated,) = lines(at, "evals.jsonl")
        assert evaluated["metrics"]["eval/bits_per_byte"] == pytest.approx(bits, rel=ROUNDING)
        (file,) = export(at / f"checkpoints/step-{STEPS:08}", at)
        weights = load_file(file)
        np.testing.assert_array_equal(weights["head.weight"], weights["embedding.weight"])
        exported = GPT(SHAPE["layers"], SHAPE["heads"], SHAPE["width"])
        exported.load_state_dict(weights)
        assert bits_per_byte(exported, list(held_out)) == pytest.approx(bits, rel=ROUNDING)
    assert evaluate_run(tmp_path / "runs/ddp")["eval/bits_per_byte"] == pytest.approx(bits, rel=ROUNDING)


def test_an_interrupted_language_model_run_has_the_same_bits(tmp_path: Path) -> None:
    values = written(tmp_path / "text")
    values["task"] = {**values["task"], "dropout": 0.1}
    config = Config.from_dict({**values, "checkpoint": {"every_steps": 7, "keep": 3}})
    undisturbed = tmp_path / "undisturbed"
    Trainer(load_task(config.task), config, undisturbed).fit()
    resumed = interrupted(undisturbed, tmp_path / "resumed", after=7)
    Trainer(load_task(config.task), config, resumed).fit()
    check_same(resumed, undisturbed)
    assert [line["event"] for line in lines(resumed, "events.jsonl")].count("resumed") == 1


def bits_per_byte(model: GPT, rows: list[Tensor]) -> float:
    """Compute it from the probabilities, sample by sample."""
    nats, count = 0.0, 0
    for sample in rows:
        with torch.no_grad():
            probabilities = model(sample[None, :-1])[0].double().softmax(-1)
        for place, byte in enumerate(sample[1:].tolist()):
            if byte != SEPARATOR:
                nats -= math.log(probabilities[place, byte])
                count += 1
    return nats / math.log(2) / count
