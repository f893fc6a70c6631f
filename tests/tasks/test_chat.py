"""Conversations go through the chat template, the loss counts the answers' tokens, and windows hold whole
conversations. test_chat_runs.py has the runs."""

import math
import shutil
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from chats import TEMPLATES, conversations, tokenizer, turns, write_rows
from conftest import ROOT, losses
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from distrib import Config, Trainer
from distrib.data.rows import RowError
from distrib.errors import ConfigError
from distrib.tasks.chat import Chat
from distrib.tasks.chat_template import ChatTemplate, Conversation
from distrib.training import build
from distrib.training.commands import export_run

transformers = pytest.importorskip("transformers")

LLAMA = {
    "model_type": "llama",
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}
ROUNDING = 1e-5  # see test_hugging_face.py


@pytest.fixture(scope="module", autouse=True)
def work(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Make a folder with its own cache, conversations, and a tokenizer for each template; change to it."""
    folder = tmp_path_factory.mktemp("work")
    write_rows(folder / "chat.jsonl", [{"messages": messages} for messages in conversations(200)])
    for name in TEMPLATES:
        made(name).save_pretrained(folder / name)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
        patch.chdir(folder)
        yield folder


@cache
def made(template: str | None = "bounded-marked") -> Any:
    return tokenizer(template)


def chat(rows: list[dict[str, Any]] | None = None, **more: Any) -> Chat:
    """Return a task on these rows, for training and for evaluation."""
    files = {"files": "chat.jsonl"}
    if rows is not None:
        write_rows(Path("some.jsonl"), rows)
        files = {"files": "some.jsonl", "eval_files": "some.jsonl"}
    return Chat(**{"model": LLAMA, "tokenizer": "bounded-marked", "context_length": 60, **files, **more})


def learned(tokens: list[int], mask: list[bool]) -> list[int]:
    return [token for token, counted in zip(tokens, mask, strict=True) if counted]


TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
CHATS = st.tuples(st.lists(TEXT, min_size=2, max_size=7), st.none() | TEXT).map(
    lambda drawn: turns(*drawn[0], system=drawn[1])
)


@settings(max_examples=100)
@given(
    chats=st.lists(CHATS, min_size=1, max_size=4),
    template=st.sampled_from(["bounded", "bounded-marked"]),
    length=st.integers(2, 40),
    side=st.sampled_from(["left", "right"]),
    train_on=st.sampled_from(["answers", "all"]),
)
def test_the_learned_tokens_are_the_answers(
    chats: list[Conversation], template: str, length: int, side: str, train_on: str
) -> None:
    """The expected tokens are put together from the special tokens and the texts' own, without a template."""
    used = made(template)
    task = Chat.__new__(Chat)
    task.context_length, task.truncation, task.pair, task.columns = length, side, False, {"messages": (list,)}
    task.template = ChatTemplate(used, None, train_on)
    documents = task._encode([{"messages": messages} for messages in chats])
    whole = ChatTemplate(used).encode(chats)
    for messages, (tokens, left_out, mask), (all_tokens, all_learned) in zip(chats, documents, whole, strict=True):
        expected, counted = [used.bos_token_id], [False]
        for message in messages:
            answer = message["role"] == "assistant"
            text = used(message["content"], add_special_tokens=False)["input_ids"]
            part = [used.convert_tokens_to_ids("<|answer|>" if answer else f"<|{message['role']}|>"), *text]
            expected += [*part, used.eos_token_id] if answer else part
            counted += [False, *([answer] * len(text)), *([True] if answer else [])]
        assert (all_tokens, all_learned) == (expected, counted)
        answers = "".join(f"{m['content']}<|im_end|>" for m in messages if m["role"] == "assistant")
        assert used.decode(learned(all_tokens, all_learned)) == answers
        if train_on == "all":
            counted = [False, *([True] * (len(expected) - 1))]
        cut = slice(None, length + 1) if side == "right" else slice(-length - 1, None)
        if any(counted[cut][1:]):
            assert (tokens, mask) == (expected[cut], counted[cut])
            assert left_out == max(0, len(expected) - length - 1)
        else:
            assert (tokens, mask) == ([], [])


@settings(max_examples=50)
@given(
    said=st.lists(TEXT.map(str.strip), min_size=2, max_size=6),
    system=st.none() | TEXT,
    template=st.sampled_from(["chatml", "chatml-marked", "instructions"]),
)
def test_the_learned_tokens_decode_to_the_answers(said: list[str], system: str | None, template: str) -> None:
    """With templates that have no special token before an answer. A token across its border would be refused."""
    used = made(template)
    messages = turns(*said, system=None if template == "instructions" else system)
    try:
        ((tokens, mask),) = ChatTemplate(used).encode([messages])
    except RowError as error:
        assert "an answer whose tokens cannot be told apart" in str(error)  # noqa: PT017, it may also be accepted
        assert template != "chatml-marked"
        whole = used.apply_chat_template(messages)["input_ids"]
        places = [place for place, message in enumerate(messages) if message["role"] == "assistant"]
        parts = [used.apply_chat_template(messages[:place], add_generation_prompt=True) for place in places]
        assert any(whole[: len(part["input_ids"])] != part["input_ids"] for part in parts)
        return
    assert tokens == used.apply_chat_template(messages)["input_ids"]
    shape = " {} <|im_end|>" if template == "instructions" else "{}<|im_end|>"
    assert used.decode(learned(tokens, mask)) == "".join(shape.format(text) for text in said[1::2])


def targets_of(task: Chat) -> list[str]:
    """Return what each window learns."""
    samples = task.train_dataset()
    batch = samples.__getitems__(list(range(len(samples))))  # type: ignore[arg-type]
    return [task.tokenizer.decode(row[row != -100]) for row in batch["targets"]]


def test_windows_hold_whole_conversations_and_learn_the_answers() -> None:
    rows = [{"messages": messages} for messages in conversations(30)]
    answers = [[m["content"] for m in row["messages"] if m["role"] == "assistant"] for row in rows]
    expected = "".join(f"{text}<|im_end|>" for row in answers for text in row)
    for template, packing in (("bounded", True), ("chatml", True), ("chatml-marked", True), ("bounded-marked", False)):
        task = chat(rows, tokenizer=template, packing=packing, context_length=200)
        assert "".join(targets_of(task)) == expected, (template, packing)
        assert (len(task.train_dataset()) == len(rows)) != packing  # type: ignore[arg-type]


def test_a_conversations_loss_does_not_depend_on_its_neighbours() -> None:
    torch.manual_seed(0)
    model = chat().model().eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.5)  # so that attention has a visible effect
    rows = [{"messages": messages} for messages in conversations(12)]

    def loss(task: Chat) -> tuple[float, int]:
        samples = task.train_dataset()
        batch = samples.__getitems__(list(range(len(samples))))  # type: ignore[arg-type]
        found = task.loss(task.forward(model, batch), batch)
        return found.total.item(), int(found.count)

    used = made()
    total, count = 0.0, 0
    for row in rows:  # with transformers and the tokenizer directly
        given = used.apply_chat_template(row["messages"], return_assistant_tokens_mask=True, return_tensors="pt")
        labels = torch.where(given["assistant_masks"].bool(), given["input_ids"], -100)
        with torch.no_grad():
            logits = model(given["input_ids"], use_cache=False).logits
        total += F.cross_entropy(logits[0, :-1], labels[0, 1:], reduction="sum").item()
        count += int((labels[0, 1:] != -100).sum())
    for packing in (True, False):
        assert loss(chat(rows, context_length=150, packing=packing)) == (pytest.approx(total, rel=ROUNDING), count)


def test_a_question_and_an_answer_in_two_columns() -> None:
    texts = [{"q": "rank", "a": "RANK"}, {"q": "loss ", "a": " LOSS"}]
    given = {"prompt_column": "q", "answer_column": "a"}
    assert targets_of(chat(texts, packing=False, **given)) == ["RANK<|im_end|>", " LOSS<|im_end|>"]
    lists = [
        {"q": turns("rank", system="shout"), "a": [{"role": "assistant", "content": "RANK"}]},
        {"q": turns("a", "A", "b"), "a": [{"role": "assistant", "content": "B"}]},
    ]
    assert targets_of(chat(lists, packing=False, **given)) == ["RANK<|im_end|>", "A<|im_end|>B<|im_end|>"]


def test_a_template_from_a_file_is_used_and_exported(work: Path) -> None:
    (work / "template.jinja").write_text(TEMPLATES["chatml-marked"])
    plain = {"model": LLAMA, "tokenizer": "bounded", "files": "chat.jsonl", "context_length": 200}
    task = Chat(**plain, chat_template="template.jinja")
    expected = Chat(**{**plain, "tokenizer": "chatml-marked"})
    assert targets_of(task) == targets_of(expected)
    assert task.packed == expected.packed != Chat(**plain).packed
    task.export(task.model().state_dict(), work / "exported")
    assert transformers.AutoTokenizer.from_pretrained("exported").chat_template == TEMPLATES["chatml-marked"]
    (work / "bytes.jinja").write_text("{% for m in messages %}{{ m.role + ':' + m.content + eos_token }}{% endfor %}")
    row = {"messages": turns("q", "answer")}
    task = chat([row], tokenizer="bytes", chat_template="bytes.jinja")  # this tokenizer is written in Python
    assert targets_of(task) == ["assistant:answer</s>"]  # nothing separates the role from the answer


def test_variables_of_the_template_and_the_date(work: Path) -> None:
    dated = "{%- if not today is defined %}{% set today = strftime_now('%d') %}{% endif %}{{ today + '\\n' }}"
    (work / "dated.jinja").write_text(dated + TEMPLATES["chatml-marked"])
    (work / "insisting.jinja").write_text("{{ strftime_now('%d') }}" + TEMPLATES["chatml-marked"])
    with pytest.raises(ConfigError, match="its chat template writes today's date, so a run would depend on its day; g"):
        chat(chat_template="dated.jinja")
    row = {"messages": turns("q", "answer")}
    task = chat([row], chat_template="dated.jinja", template_arguments={"today": "a day"})
    assert targets_of(task) == ["answer<|im_end|>"]
    assert task.tokenizer.decode(task.train_dataset().tokens).startswith("a day\n<|im_start|>user")
    assert task.packed != chat([row], chat_template="dated.jinja", template_arguments={"today": "two"}).packed
    with pytest.raises(
        ConfigError, match=r"row 1 of some.jsonl cannot be rendered by the chat template: 'not_defined'"
    ):
        chat([row], chat_template="insisting.jinja", template_arguments={"today": "a day"}).train_dataset()


def test_rows_that_are_cut_or_left_out_are_counted(capsys: pytest.CaptureFixture[str]) -> None:
    rows = [
        {"messages": turns("rank", "loss")},
        {"messages": turns("rank", "loss " * 50)},  # cut
        {"messages": turns("rank " * 50, "loss")},  # left out, or cut from the left
        {"messages": turns("rank")},  # nothing to learn
        {"messages": []},
    ]
    for _ in range(2):  # packed, and from the cache
        chat(rows, eval_files=None, context_length=40).train_dataset()
        said = capsys.readouterr().err
        assert "task.context_length: 1 of 5 conversation(s) are longer than 40 tokens, and cut at the right" in said
        assert (
            "task.files: 3 of 5 conversation(s) are left out: there is nothing to learn (in 1 of them because" in said
        )
        assert "learn to stop" not in said
    chat(rows, eval_files=None, context_length=40, truncation="left").train_dataset()
    said = capsys.readouterr().err
    assert "2 of 5 conversation(s) are longer than 40 tokens, and cut at the left (task.truncation)" in said
    assert "2 of 5 conversation(s) are left out: there is nothing to learn (in 0 of them" in said
    chat(rows[:1]).train_dataset()
    assert "conversation(s)" not in capsys.readouterr().err
    assert targets_of(chat(rows[2:3], context_length=8, truncation="left")) == ["loss<|im_end|>"]


def test_an_end_that_is_not_learned_is_reported(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    unmarked_end = TEMPLATES["chatml-marked"].replace(
        "{{ m.content + '<|im_end|>' }}{% endgeneration %}", "{{ m.content }}{% endgeneration %}{{ '<|im_end|>' }}"
    )
    assert unmarked_end != TEMPLATES["chatml-marked"]
    (work / "open.jinja").write_text(unmarked_end)
    task = chat([{"messages": turns("q", "answer")}], chat_template="open.jinja")
    assert targets_of(task) == ["answer"]
    said = capsys.readouterr().err
    assert "task.tokenizer: no answer ends with the eos_token '<|im_end|>' as the chat template marks it, so" in said


def test_the_beginning_must_have_the_same_tokens_as_in_the_whole() -> None:
    """A template like Qwen 3's renders the last answer with its thoughts."""
    template = ChatTemplate(made("thoughts"))
    ((tokens, mask),) = template.encode([turns("q", "answer")])
    assert made().decode(learned(tokens, mask)) == "<think>\n\n</think>\n\nanswer<|im_end|>"
    with pytest.raises(
        RowError, match="has message 2, an answer whose tokens cannot be told apart: the beginning"
    ) as e:
        template.encode([turns("q", "answer"), turns("q", "answer", "again", "once more")])
    assert e.value.index == 1
    with pytest.raises(RowError, match="has message 2, an answer whose"):  # its first token has white space before it
        ChatTemplate(made("chatml")).encode([turns("q", "\n\nanswer")])
    longer_prompt = tokenizer("bounded")
    longer_prompt.chat_template += "{% if add_generation_prompt %}{{ 'well, ' }}{% endif %}"
    with pytest.raises(RowError, match="has message 2, an answer whose"):
        ChatTemplate(longer_prompt).encode([turns("q", "answer")])
    everything = ChatTemplate(made("thoughts"), train_on="all").encode([turns("q", "answer", "again", "more")])
    assert all(everything[0][1][1:])


def test_a_conversation_may_have_no_token(work: Path) -> None:
    (work / "bare.jinja").write_text("{% for m in messages %}{{ m.content }}{% endfor %}")
    rows = [{"messages": turns("q", "answer")}, {"messages": turns("", "")}]
    task = chat(rows, chat_template="bare.jinja")
    assert targets_of(task) == ["answer"]
    assert np.diff(task.train_dataset().starts).tolist()[1] == 0


def messages(*given: Any) -> list[dict[str, Any]]:
    return [{"messages": turns("q", "a")}, {"messages": list(given)}]


USER = {"role": "user", "content": "q"}


@pytest.mark.parametrize(
    ("rows", "arguments", "message"),
    [
        (messages(), {"train_on": "answer"}, "task.train_on: 'answer'; give answers or all"),
        (messages(), {"truncation": "middle"}, "task.truncation: 'middle'; give right or left"),
        (messages(), {"packing": 1}, "task.packing: 1; give true or false"),
        (messages(), {"chat_template": "no.jinja"}, "task.chat_template: no.jinja cannot be read: No such file"),
        (messages(), {"chat_template": 3}, "task.chat_template: 3; give the path of a file"),
        (messages(), {"template_arguments": [1]}, "task.template_arguments: [1]; give names and values"),
        (messages(), {"template_arguments": {"tokenize": 1}}, "task.template_arguments: 'tokenize' is not a variable"),
        (messages(), {"prompt_column": "q"}, "task.answer_column: None; give the name of a column"),
        (messages(), {"messages_column": "chat"}, "task.files: some.jsonl has no column 'chat'; it has: messages; set"),
        (
            messages(),
            {"tokenizer": "untaught"},
            "task.tokenizer: it has no chat template; give the tokenizer of a chat ",
        ),
        (messages(), {"tokenizer": "endless"}, "task.tokenizer: it has no eos_token, with which an answer ends; give "),
        ([{"messages": "q"}], {}, "row 1 of some.jsonl has 'q' in column 'messages', which is not a list; leave such"),
        (
            messages({"role": "human", "content": "q"}),
            {},
            "row 2 of some.jsonl has the role 'human' in message 1; give ",
        ),
        (
            messages({"from": "user", "value": "q"}),
            {},
            "row 2 of some.jsonl has no role in message 1; it has: from, value",
        ),
        (
            messages({"role": "user", "content": 3}),
            {},
            "row 2 of some.jsonl has the content 3 in message 1; give a text",
        ),
        ([{"messages": [{"role": "user", "content": 3}]}], {}, "row 1 of some.jsonl has the content 3 in message 1; "),
        ([{"messages": [{"from": "user"}]}], {}, "row 1 of some.jsonl has no role in message 1; it has: from"),
        ([{"messages": ["q"]}], {}, "row 1 of some.jsonl has 'q' as message 1; give {role, content}"),
        (messages(USER, {"role": "assistant", "content": None}), {}, "row 2 of some.jsonl has the content None in mes"),
        (
            messages(USER, USER),
            {"tokenizer": "instructions"},
            "row 2 of some.jsonl cannot be rendered by the chat template: roles must alternate: user, assistant",
        ),
        (
            messages({"role": "system", "content": "s"}, USER),
            {"tokenizer": "silent"},
            "row 2 of some.jsonl has the role 'system', and the chat template leaves out messages of this role; leave",
        ),
        (
            messages({"role": "assistant", "content": "a"}),
            {"tokenizer": "bounded"},
            "row 2 of some.jsonl begins with an answer, and the chat template does not mark answers; give task.chat_t",
        ),
        (
            messages(),
            {"chat_template": "broken.jinja"},
            "row 1 of some.jsonl cannot be rendered by the chat template: ",
        ),
        (
            messages(),
            {"chat_template": "macro.jinja"},
            "which the chat template marks wrongly; give task.chat_template",
        ),
        (
            [{"messages": [USER]}],
            {},
            "task.files: no row is left, in all 1 there is nothing to learn; give answers, of the role assistant, that",
        ),
        (messages(USER, *turns("q" * 80, "a")), {"context_length": 2}, "task.files: no row is left, in all 2 there is"),
    ],
)
def test_errors_are_named(work: Path, rows: list[dict[str, Any]], arguments: dict[str, Any], message: str) -> None:
    if not (work / "untaught").exists():
        made(None).save_pretrained(work / "untaught")
        tokenizer(bos_token="<s>").save_pretrained(work / "endless")
        (work / "broken.jinja").write_text("{% for m in messages %}{{ m.content }}")
        (work / "macro.jinja").write_text(  # transformers loses the place of an answer in a macro
            "{% macro turn(m) %}{{ '<|im_start|>' + m.role + ': a long beginning of each turn\n' }}{% generation %}"
            "{{ m.content + eos_token }}{% endgeneration %}{% endmacro %}"
            "{% for m in messages %}{{ turn(m) }}{% endfor %}"
        )
    with pytest.raises(ConfigError) as error:
        chat(rows, **arguments).train_dataset()
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_an_error_in_a_row_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    """The display of the packing leaves nothing on the screen."""
    with pytest.raises(ConfigError, match=r"row 2 of some\.jsonl has the role 'robot' in message 1"):
        chat(messages({"role": "robot", "content": "q"})).train_dataset()
    assert not capsys.readouterr().err.strip()


def test_the_examples_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The configs as they stand, with fewer steps: the second begins with the model that the first one exports."""
    shutil.copytree(ROOT / "examples", tmp_path / "examples")
    monkeypatch.chdir(tmp_path / "examples")
    monkeypatch.syspath_prepend(tmp_path / "examples")
    subprocess.run([sys.executable, "make_chats.py", "200"], check=True)

    def trained(name: str) -> Path:
        config = Config.load(Path(f"{name}.yaml"), ["train.steps=3", "eval.every_steps=0", "eval.limit=8"])
        Trainer(build.task(config), config, Path("runs") / name).fit()
        return Path("runs") / name

    export_run(trained("chat"), Path("chat-model"))
    before = transformers.AutoModelForCausalLM.from_pretrained("chat-model").state_dict()
    run = trained("dpo")
    assert losses(run)[0] == pytest.approx(math.log(2))
    export_run(run, Path("preferred"))
    after = transformers.AutoModelForCausalLM.from_pretrained("preferred").state_dict()
    assert after.keys() == before.keys()
    assert any((after[name] != before[name]).any() for name in after)
