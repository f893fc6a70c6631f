"""A task that trains a causal language model on conversations, through the tokenizer's chat template."""

import sys
from pathlib import Path
from typing import Any

import numpy as np

from distrib.data.documents import Documents, WholeDocuments
from distrib.data.packing import Encoded
from distrib.data.rows import Row
from distrib.errors import ConfigError
from distrib.processes.world import World
from distrib.tasks.chat_template import ChatTemplate, Conversation
from distrib.tasks.hugging_face import HuggingFace, named_columns
from distrib.tasks.next_token import NextToken

SIDES = ("right", "left")


class Chat(NextToken, HuggingFace):
    """Trains an AutoModelForCausalLM on conversations. The loss counts the tokens of the answers alone.

    A row is a conversation: a list of {role, content} in `messages_column`; or a question and an answer in
    `prompt_column` and `answer_column`, each a text or a list of messages. `chat_template`: a file, by default the
    tokenizer's own; `template_arguments`: more variables for it. `train_on`: answers | all. A longer conversation is
    cut to `context_length` tokens and the token after them, at its end (`truncation: right`) or beginning (`left`). A
    row in which nothing is left to learn is left out. With `packing`, a window holds several whole conversations,
    which do not attend to each other.
    """

    masked = True

    def __init__(
        self,
        model: str | dict[str, Any],
        files: str | list[str],
        eval_files: str | list[str] | None = None,
        tokenizer: str | None = None,
        messages_column: str = "messages",
        prompt_column: str | None = None,
        answer_column: str | None = None,
        chat_template: str | None = None,
        template_arguments: dict[str, Any] | None = None,
        train_on: str = "answers",
        truncation: str = "right",
        context_length: int = 512,
        packing: bool = True,
        adapter: dict[str, Any] | None = None,
    ) -> None:
        self.packing = self._checked_packing(packing)
        for key, value, allowed in (("train_on", train_on, ("answers", "all")), ("truncation", truncation, SIDES)):
            if value not in allowed:
                raise ConfigError(f"task.{key}: {value!r}; give {' or '.join(allowed)}")
        if template_arguments is not None and not isinstance(template_arguments, dict):
            raise ConfigError(f"task.template_arguments: {template_arguments!r}; give names and values")
        self.train_on, self.truncation = train_on, truncation
        self.pair = prompt_column is not None or answer_column is not None
        if self.pair:
            columns = named_columns(prompt_column=prompt_column, answer_column=answer_column)
        else:
            columns = named_columns(messages_column=messages_column)
        types = (str, list) if self.pair else (list,)
        super().__init__(model, files, eval_files, tokenizer, context_length, dict.fromkeys(columns, types), adapter)
        if self.tokenizer.eos_token_id is None:
            raise ConfigError("task.tokenizer: it has no eos_token, with which an answer ends; give one that has it")
        if chat_template is not None:
            self.tokenizer.chat_template = _read(chat_template)
        self.template = ChatTemplate(self.tokenizer, template_arguments, train_on)

    def _encode(self, rows: list[Row]) -> Encoded:
        size = self.context_length + 1
        side = slice(None, size) if self.truncation == "right" else slice(-size, None)
        encoded = self.template.encode([self._conversation(row) for row in rows])
        return [self._cut(tokens, learned, side) for tokens, learned in encoded]

    def _cut(self, tokens: list[int], learned: list[bool], side: slice) -> tuple[list[int], int, list[bool]]:
        """Return a document whose number is that of the tokens cut off, without tokens if nothing is left to learn."""
        left_out = max(0, len(tokens) - self.context_length - 1) if any(learned) else 0
        tokens, learned = tokens[side], learned[side]
        return (tokens, left_out, learned) if any(learned[1:]) else ([], left_out, [])

    def _conversation(self, row: Row) -> Conversation:
        if not self.pair:
            (messages,) = row.values()
            return messages  # type: ignore[no-any-return]
        turns = zip(("user", "assistant"), self.columns, strict=True)
        given = [[{"role": r, "content": row[c]}] if isinstance(row[c], str) else row[c] for r, c in turns]
        return [*given[0], *given[1]]

    def _settings(self) -> dict[str, Any]:
        return {
            "chat": list(self.columns),
            "arguments": self.template.arguments,
            "train_on": self.train_on,
            "truncation": self.truncation,
            "context_length": self.context_length,
        }

    def _samples(self, split: str) -> WholeDocuments:
        samples = WholeDocuments(self.packed, split, self.context_length, self.packing)
        rows = len(samples.numbers)
        if rows and not len(samples) and (split == "train" or self.eval_files is not None):
            key = "task.files" if split == "train" else "task.eval_files"
            raise ConfigError(
                f"{key}: no row is left, in all {rows} there is nothing to learn; give answers, of the role assistant, "
                f"that are not cut off (task.context_length: {self.context_length})"
            )
        return samples

    def train_dataset(self) -> Documents:
        samples = super().train_dataset()
        if World.detect().is_rank_0:
            self._report()
        return samples

    def _report(self) -> None:
        """Print what the rows have lost, from what is packed: the same at each start."""
        splits = [Documents(self.packed, split) for split in ("train", "eval")]
        sizes = np.concatenate([np.diff(split.starts) for split in splits])
        cut_off = np.concatenate([split.numbers for split in splits])
        left_out, cut = sizes == 0, (sizes > 0) & (cut_off > 0)
        if cut.any():
            print(
                f"task.context_length: {cut.sum()} of {len(sizes)} conversation(s) are longer than "
                f"{self.context_length} tokens, and cut at the {self.truncation} (task.truncation)",
                file=sys.stderr,
            )
        if left_out.any():
            print(
                f"task.files: {left_out.sum()} of {len(sizes)} conversation(s) are left out: there is nothing to learn "
                f"(in {(left_out & (cut_off > 0)).sum()} of them because they are cut)",
                file=sys.stderr,
            )
        if self.train_on == "answers" and not self.template.teaches_end():
            print(
                f"task.tokenizer: no answer ends with the eos_token {self.tokenizer.eos_token!r} as the chat template "
                "marks it, so the model does not learn to stop",
                file=sys.stderr,
            )


def _read(chat_template: Any) -> str:
    if not isinstance(chat_template, str):
        raise ConfigError(f"task.chat_template: {chat_template!r}; give the path of a file")
    try:
        return Path(chat_template).expanduser().read_text()
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise ConfigError(f"task.chat_template: {chat_template} cannot be read: {reason}") from None
