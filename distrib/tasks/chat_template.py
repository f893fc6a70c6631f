"""Turns conversations into tokens with a tokenizer's chat template, and finds the tokens of the answers.

An answer is a message of the role `assistant`. If the template marks answers with {% generation %}, transformers
returns the mask. Otherwise the beginnings of a conversation are rendered too, before and after each answer, and each
must have the tokens with which the whole conversation begins.
"""

import inspect
import re
from collections.abc import Sequence
from typing import Any

from distrib.data.rows import RowError
from distrib.errors import ConfigError

ROLES = ("system", "developer", "user", "assistant", "tool")
Message = dict[str, Any]  # role and content, and other keys for the template
Conversation = list[Message]
Parts = list[tuple[int, Conversation]]  # each with the number of its row
Tokens = tuple[list[int], list[bool]]  # of a conversation, and for each whether the model learns to predict it

_MARK = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")
_TODAY = "strftime_now"  # the function of transformers that returns today's date
_PROBE = "qzprobe"
_HINT = "give task.chat_template, a file with a template that marks answers with {% generation %}"


class ChatTemplate:
    """Encodes conversations. `arguments`: more variables for the template. `train_on`: answers | all."""

    def __init__(self, tokenizer: Any, arguments: dict[str, Any] | None = None, train_on: str = "answers") -> None:
        """Raises ConfigError if the tokenizer has no template, or if it writes the date of the day."""
        self.tokenizer, self.arguments, self.train_on = tokenizer, arguments or {}, train_on
        reserved = inspect.signature(tokenizer.apply_chat_template).parameters
        if wrong := [str(name) for name in self.arguments if not isinstance(name, str) or name in reserved]:
            raise ConfigError(f"task.template_arguments: {wrong[0]!r} is not a variable of the template; leave it out")
        try:
            self.template: str = tokenizer.get_chat_template()
        except ValueError:
            raise ConfigError(
                "task.tokenizer: it has no chat template; give the tokenizer of a chat model, or task.chat_template, "
                "a file with a template"
            ) from None
        if _TODAY in self.template:
            if not self.arguments:
                raise ConfigError(
                    "task.tokenizer: its chat template writes today's date, so a run would depend on its day; give a "
                    'date that stays, as the template names it: task.template_arguments: {date_string: "26 Jul 2024"}'
                )
            self.template = f"{{% set {_TODAY} = not_defined +%}}{self.template}"
        # The mask needs the places of tokens in the text, which tokenizers written in Python do not know.
        self._marked = bool(_MARK.search(self.template)) and tokenizer.is_fast
        self._roles_checked: set[str] = set()

    def encode(self, conversations: Sequence[Conversation]) -> list[Tokens]:
        """Return tokens and mask of each conversation, of one without messages none. Raises RowError."""
        for row, conversation in enumerate(conversations):
            _check(row, conversation)
            for place, message in reversed(list(enumerate(conversation))):
                if message["role"] not in self._roles_checked:
                    self._check_role(row, conversation, place)
                    self._roles_checked.add(message["role"])
        parts = [(row, conversation) for row, conversation in enumerate(conversations) if conversation]
        found: list[Tokens] = [([], []) for _ in conversations]
        for (row, _), tokens in zip(parts, self._encode(parts), strict=True):
            found[row] = tokens
        return found

    def teaches_end(self) -> bool:
        """Return whether an answer ends with the eos_token, and the model learns it. If not, it does not learn to
        stop."""
        question, answer = {"role": "user", "content": "question"}, {"role": "assistant", "content": "answer"}
        try:
            ((tokens, learned),) = self._encode([(0, [question, answer])])
        except RowError:
            return True  # the template is not for such a conversation, and the rows may be others
        return self.tokenizer.eos_token_id in _only(tokens, learned)

    def _encode(self, parts: Parts) -> list[Tokens]:
        if not parts:
            return []
        if self.train_on == "answers" and self._marked:
            marked = self._apply(parts, return_dict=True, return_assistant_tokens_mask=True)
            masks = [[bool(flag) for flag in mask] for mask in marked["assistant_masks"]]
            found = list(zip(marked["input_ids"], masks, strict=True))
        else:
            found = [(tokens, [self.train_on == "all"] * len(tokens)) for tokens in self._tokens(parts)]
            if self.train_on == "answers":
                self._mark_answers(parts, found)
        for _, learned in found:
            learned[:1] = [False] * len(learned[:1])  # nothing predicts the first token
        return found

    def _mark_answers(self, parts: Parts, found: list[Tokens]) -> None:
        """Set the mask of each answer, from the tokens before and after it."""
        answers = [
            (row, conversation, place, tokens)
            for (row, conversation), tokens in zip(parts, found, strict=True)
            for place, message in enumerate(conversation)
            if message["role"] == "assistant"
        ]
        for row, _, place, _ in answers:
            if place == 0:
                raise RowError(row, f"begins with an answer, and the chat template does not mark answers; {_HINT}")
        before = self._tokens([(row, chat[:place]) for row, chat, place, _ in answers], add_generation_prompt=True)
        after = self._tokens([(row, chat[: place + 1]) for row, chat, place, _ in answers])
        for (row, _, place, (tokens, learned)), prompt, answered in zip(answers, before, after, strict=True):
            start, end = len(prompt), len(answered)
            if start > end or tokens[:start] != prompt or tokens[:end] != answered:
                raise RowError(
                    row,
                    f"has message {place + 1}, an answer whose tokens cannot be told apart: the beginning of the "
                    f"conversation has other tokens alone than in the whole; {_HINT}",
                )
            end = self._cut_white_space(tokens, start, end)
            learned[start:end] = [True] * (end - start)

    def _cut_white_space(self, tokens: list[int], start: int, end: int) -> int:
        """Return where an answer ends: after its eos_token, if only white space follows it."""
        last = end
        while last > start and tokens[last - 1] != self.tokenizer.eos_token_id:
            last -= 1
        return end if last == start or self.tokenizer.decode(tokens[last:end]).strip() else last

    def _check_role(self, row: int, conversation: Conversation, place: int) -> None:
        """Check with another content in a message that the template writes it, and marks answers alone."""
        role = conversation[place]["role"]
        probed = [*conversation[:place], {**conversation[place], "content": _PROBE}, *conversation[place + 1 :]]
        (text,) = self._apply([(row, probed)], tokenize=False)
        if _PROBE not in text:
            raise RowError(
                row,
                f"has the role {role!r}, and the chat template leaves out messages of this role; leave out such rows, "
                "or give task.chat_template another template",
            )
        ((tokens, learned),) = self._encode([(row, probed)])
        readable = _PROBE in self.tokenizer.decode(tokens)  # not in a vocabulary without these letters
        marked = _PROBE in self.tokenizer.decode(_only(tokens, learned))
        if self.train_on == "answers" and readable and marked != (role == "assistant"):
            raise RowError(
                row, f"has message {place + 1} of the role {role!r}, which the chat template marks wrongly; {_HINT}"
            )

    def _tokens(self, parts: Parts, **options: Any) -> list[list[int]]:
        return self._apply(parts, return_dict=True, **options)["input_ids"] if parts else []

    def _apply(self, parts: Parts, **options: Any) -> Any:
        """Apply the template to conversations, each with its row. Raises RowError for the first that fails."""
        from jinja2 import TemplateError

        def apply(conversations: list[Conversation]) -> Any:
            given = {"chat_template": self.template, **self.arguments, **options}
            return self.tokenizer.apply_chat_template(conversations, **given)

        conversations = [[_without_none(message) for message in conversation] for _, conversation in parts]
        refused = (TemplateError, TypeError, ValueError, LookupError, AttributeError, ImportError)
        try:
            return apply(conversations)
        except refused:
            for (row, _), conversation in zip(parts, conversations, strict=True):
                try:
                    apply([conversation])
                except refused as error:
                    reason = " ".join(str(error).split())[:200] or type(error).__name__
                    raise RowError(row, f"cannot be rendered by the chat template: {reason}") from None
            raise


def _check(row: int, conversation: Any) -> None:
    """Raise RowError if this is not a list of messages."""
    if not isinstance(conversation, list):
        raise RowError(row, f"has {_short(conversation)} for a conversation; give a list of {{role, content}}")
    for number, message in enumerate(conversation, 1):
        if not isinstance(message, dict):
            raise RowError(row, f"has {_short(message)} as message {number}; give {{role, content}}")
        for key in ("role", "content"):
            if key not in message:
                raise RowError(row, f"has no {key} in message {number}; it has: {', '.join(map(str, message))}")
        if message["role"] not in ROLES:
            raise RowError(
                row, f"has the role {_short(message['role'])} in message {number}; give one of {', '.join(ROLES)}"
            )
        if not isinstance(message["content"], str):
            raise RowError(row, f"has the content {_short(message['content'])} in message {number}; give a text")


def _without_none(message: Message) -> Message:
    """Leave out keys without a value: `datasets` gives each message the keys of all."""
    return {key: value for key, value in message.items() if value is not None}


def _only(tokens: list[int], learned: list[bool]) -> list[int]:
    return [token for token, counted in zip(tokens, learned, strict=True) if counted]


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
