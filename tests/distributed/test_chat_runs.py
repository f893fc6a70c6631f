"""Training on conversations and on pairs of answers equals a plain loop with transformers and the tokenizer, on any
number of processes and under every strategy, also after an interruption."""

from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import chat_runs
import numpy as np
import pytest
import torch
from chat_runs import BATCH, LLAMA, RATES, RESUMED, STEPS, STRATEGIES, TASKS
from chats import conversations, tokenizer, turns, write_rows
from conftest import ROOT, check, check_same, lines, losses, no_process_left, starter, tensors
from torch import Tensor
from torch.nn import functional as F

from distrib.data.order import sample_indices

transformers = pytest.importorskip("transformers")

TOLERANCE = 1e-5  # see test_parity


def write_data(folder: Path) -> None:
    """Write conversations, some longer than a window, pairs, and a tokenizer."""
    chats = conversations(98)
    long = turns("a long question " * 15, "LONG", "and more", "MORE")
    rows = [{"messages": messages} for messages in [long, turns("no answer"), *chats]]
    pairs = [{"chosen": chat, "rejected": [*chat[:-1], {"role": "assistant", "content": "what?"}]} for chat in chats]
    for name, count in (("", 50), ("few-", 10)):
        write_rows(folder / f"{name}chats.jsonl", rows[: 2 * count])
        write_rows(folder / f"{name}pairs.jsonl", pairs[:count])
    tokenizer("chatml-marked").save_pretrained(folder / "tokenizer")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[int], Path]]:
    """The folder of the runs on so many processes."""
    with no_process_left() as mark, pytest.MonkeyPatch.context() as patch:

        @cache  # of a failed launch too
        def launch(processes: int) -> Any:
            folder = tmp_path_factory.mktemp(f"chat-{processes}-")
            write_data(folder)
            cached = {"XDG_CACHE_HOME": str(folder / "cache"), "TORCH_EXTENSIONS_DIR": str(folder / "extensions")}
            if processes == 1:
                patch.chdir(folder)
                patch.setenv("XDG_CACHE_HOME", cached["XDG_CACHE_HOME"])
                chat_runs.make_runs(folder)
                return folder, None
            program = ROOT / "tests/distributed/chat_runs.py"
            command = ("distrib", "launch", "--processes", processes, program, folder)
            return folder, starter(mark, folder)(*command, timeout=300, **cached)

        def folder_of(processes: int) -> Path:
            folder, result = launch(processes)
            if result is not None:
                check(result)
                said = "task.context_length: 1 of 120 conversation(s) are longer than 150 tokens, and cut at the right"
                starts = len(STRATEGIES[processes]["packed"]) * (2 if processes == 2 else 1)
                assert result.stderr.count(said) == starts  # by rank 0 alone
                assert (
                    "task.files: 4 of 120 conversation(s) are left out: there is nothing to learn (in 2"
                    in result.stderr
                )
            return folder  # type: ignore[no-any-return]

        yield folder_of


def encoded(rows: list[Any], length: int, side: str) -> list[tuple[Tensor, Tensor]]:
    """Return ids and labels of each conversation in which there is something to learn, by the tokenizer directly."""
    used = transformers.AutoTokenizer.from_pretrained("tokenizer", truncation_side=side)
    found = []
    for row in rows:
        given = used.apply_chat_template(
            row, truncation=True, max_length=length + 1, return_assistant_tokens_mask=True, return_dict=True
        )
        ids, mask = torch.tensor(given["input_ids"]), torch.tensor(given["assistant_masks"])
        if mask[1:].any():
            found.append((ids, torch.where(mask.bool(), ids, -100)))
    return found


def read(file: str, column: str) -> list[Any]:
    return [row[column] for row in lines(Path(), file)]


def new_model() -> Any:
    used = transformers.AutoTokenizer.from_pretrained("tokenizer")
    torch.manual_seed(7)
    values = {key: value for key, value in LLAMA.items() if key != "model_type"}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=len(used), use_cache=False, **values))


def nats(model: Any, ids: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(model(ids[None]).logits[0, :-1], labels[1:], reduction="sum")


def batches(samples: list[Any]) -> Iterator[list[Any]]:
    for step in range(STEPS):
        positions = np.arange(step * BATCH, (step + 1) * BATCH, dtype=np.uint64)
        yield [samples[index] for index in sample_indices(positions, len(samples), 7).tolist()]


def windows(task: str) -> list[list[tuple[Tensor, Tensor]]]:
    """Put conversations into windows, the next one into the last window if it fits."""
    length = TASKS[task]["context_length"]
    chats = encoded(read("chats.jsonl", "messages"), length, TASKS[task].get("truncation", "right"))
    if task == "alone":
        return [[chat] for chat in chats]
    found: list[list[tuple[Tensor, Tensor]]] = [[]]
    for chat in chats:
        if sum(len(ids) for ids, _ in found[-1]) + len(chat[0]) > length + 1:
            found.append([])
        found[-1].append(chat)
    return found


@cache
def plain(task: str) -> tuple[list[float], list[int]]:
    """Train on one conversation at a time, so that nothing is padded or packed; return losses and counts."""
    model = new_model()
    update, found, counts = torch.optim.SGD(model.parameters(), lr=RATES[task]), [], []
    for batch in batches(windows(task)):
        chats = [chat for window in batch for chat in window]
        count = sum(int((labels[1:] != -100).sum()) for _, labels in chats)
        loss = torch.stack([nats(model, *chat) for chat in chats]).sum() / count
        update.zero_grad()
        loss.backward()
        update.step()
        found.append(loss.item())
        counts.append(count)
    return found, counts


@cache
def plain_dpo() -> tuple[list[float], list[float]]:
    """Return losses and accuracies of a plain loop with the formula of the paper, one answer at a time."""
    policy, reference = new_model(), new_model()
    pairs = list(zip(*(encoded(read("pairs.jsonl", c), 250, "right") for c in ("chosen", "rejected")), strict=True))
    update, found, accuracies = torch.optim.SGD(policy.parameters(), lr=RATES["dpo"]), [], []
    for batch in batches(pairs):
        parts = []
        for chosen, rejected in batch:
            with torch.no_grad():
                before = nats(reference, *rejected) - nats(reference, *chosen)
            parts.append(0.1 * (nats(policy, *rejected) - nats(policy, *chosen) - before))
        margins = torch.stack(parts)
        loss = -F.logsigmoid(margins).mean()
        update.zero_grad()
        loss.backward()
        update.step()
        found.append(loss.item())
        accuracies.append((margins > 0).double().mean().item())
    return found, accuracies


RUNS = [(n, task, name) for n, by_task in STRATEGIES.items() for task, names in by_task.items() for name in names]


@pytest.mark.parametrize(("processes", "task", "strategy"), RUNS)
def test_runs_equal_the_plain_loop(runs: Callable[[int], Path], processes: int, task: str, strategy: str) -> None:
    runs(1)  # the plain loops read its data
    run = runs(processes) / f"{task}-{strategy}"
    assert {line["strategy"] for line in lines(run)} == {strategy}
    if task == "dpo":
        expected, accuracies = plain_dpo()
        assert expected[0] == pytest.approx(np.log(2))
        assert [line["train/accuracy"] for line in lines(run)] == pytest.approx(accuracies)
    else:
        expected, counts = plain(task)
        assert [line["count"] for line in lines(run)] == counts
        assert len(set(counts)) > 5
    assert expected[-1] < 0.9 * expected[0]
    np.testing.assert_allclose(losses(run), expected, rtol=TOLERANCE)
    (evaluated,), (alone,) = (lines(path, "evals.jsonl") for path in (run, runs(1) / f"{task}-single"))
    assert evaluated["metrics"] == pytest.approx(alone["metrics"], rel=TOLERANCE)


@pytest.mark.parametrize(("task", "strategy"), RESUMED)
def test_interrupted_runs_have_the_same_bits(runs: Callable[[int], Path], task: str, strategy: str) -> None:
    folder = runs(2)
    check_same(folder / f"{task}-{strategy}-resumed", folder / f"{task}-{strategy}")


def test_the_reference_stays_as_it_was(runs: Callable[[int], Path]) -> None:
    runs(1)
    initial = new_model().state_dict()
    for processes, name in ((1, "dpo-single"), (2, "dpo-fsdp2-resumed"), (2, "dpo-zero2-resumed")):
        found = tensors(runs(processes) / name)
        for key, value in initial.items():
            if key == "lm_head.weight":  # tied
                continue
            np.testing.assert_array_equal(found[f"model.reference.{key}"], value.numpy())
            assert (found[f"model.policy.{key}"] != value.numpy()).any()
