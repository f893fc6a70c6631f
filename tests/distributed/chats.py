"""Tokenizers, chat templates and conversations for tests, made here: nothing is downloaded."""

import json
from pathlib import Path
from typing import Any

import numpy as np

CHATML = (
    "{%% for m in messages %%}{{ '<|im_start|>' + m.role + '\\n' }}"
    "{%% if m.role == 'assistant' %%}%s{{ m.content + '<|im_end|>' }}%s"
    "{%% else %%}{{ m.content + '<|im_end|>' }}{%% endif %%}"
    "{{ '\\n' }}{%% endfor %%}{%% if add_generation_prompt %%}{{ '<|im_start|>assistant\\n' }}{%% endif %%}"
)
# Special tokens are before and after each content, so that no token lies across a border.
BOUNDED = (
    "{{ bos_token }}{%% for m in messages %%}"
    "{%% if m.role == 'assistant' %%}{{ '<|answer|>' }}%s{{ m.content + eos_token }}%s"
    "{%% else %%}{{ '<|' + m.role + '|>' + m.content }}{%% endif %%}{%% endfor %%}"
    "{%% if add_generation_prompt %%}{{ '<|answer|>' }}{%% endif %%}"
)
MARKS, NO_MARKS = ("{% generation %}", "{% endgeneration %}"), ("", "")
TEMPLATES = {
    "chatml-marked": CHATML % MARKS,
    "chatml": CHATML % NO_MARKS,
    "bounded-marked": BOUNDED % MARKS,
    "bounded": BOUNDED % NO_MARKS,
    # Like Llama 2's: no system role, turns alternate, nothing begins an answer.
    "instructions": (
        "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
        "{{ raise_exception('roles must alternate: user, assistant') }}{% endif %}"
        "{% if m.role == 'user' %}{{ bos_token + '[INST] ' + m.content + ' [/INST]' }}"
        "{% else %}{{ ' ' + m.content + ' ' + eos_token }}{% endif %}{% endfor %}"
    ),
    # Like Qwen 3's: the last answer begins with its thoughts, earlier ones do not.
    "thoughts": (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' }}"
        "{% if m.role == 'assistant' and loop.last %}{{ '<think>\\n\\n</think>\\n\\n' }}{% endif %}"
        "{{ m.content + '<|im_end|>\\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
    ),
    "silent": (
        "{% for m in messages %}{% if m.role != 'system' %}"
        "{{ '<|' + m.role + '|>' + m.content + eos_token }}{% endif %}{% endfor %}"
    ),
}
SPECIAL = ["<|im_start|>", "<|im_end|>", "<s>", "<|system|>", "<|user|>", "<|assistant|>", "<|answer|>"]
WORDS = ("tensor", "process", "rank", "gradient", "step", "loss", "window", "shard")


def tokenizer(template: str | None = "bounded-marked", **special: str) -> Any:
    """Train a byte-pair tokenizer like GPT-2's with 340 tokens."""
    import transformers
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    pairs = Tokenizer(models.BPE())
    pairs.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    pairs.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=340, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    pairs.train_from_iterator([f"{' '.join(WORDS)} user assistant\n\n"] * 5, trainer)
    given = special or {"bos_token": "<s>", "eos_token": "<|im_end|>"}
    found = transformers.PreTrainedTokenizerFast(tokenizer_object=pairs, **given)
    found.chat_template = None if template is None else TEMPLATES[template]
    return found


def turns(*contents: str, system: str | None = None) -> list[dict[str, str]]:
    """Return a conversation in which user and assistant alternate."""
    begin = [] if system is None else [{"role": "system", "content": system}]
    roles = ("user", "assistant")
    return begin + [{"role": roles[number % 2], "content": content} for number, content in enumerate(contents)]


def conversations(count: int) -> list[list[dict[str, str]]]:
    """Return conversations of one to three turns, some with a system message. An answer repeats the question."""
    generator = np.random.default_rng(5)

    def say() -> str:
        return " ".join(generator.choice(WORDS, generator.integers(1, 6)))

    found = []
    for number in range(count):
        questions = [say() for _ in range(generator.integers(1, 4))]
        said = [text for question in questions for text in (question, question.upper())]
        found.append(turns(*said, system=None if number % 3 else "repeat"))
    return found


def write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
