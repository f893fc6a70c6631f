"""Tasks for Hugging Face models on local data: causal language models and sequence classifiers.

They need `pip install 'distrib[huggingface]'`. For another Auto class, derive a task from `HuggingFace`, with its loss
and its samples.
"""

import sys
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from distrib.data.documents import Classified, Documents, TokenWindows
from distrib.data.packing import Encoded, pack
from distrib.data.rows import Columns, Row, find_files
from distrib.errors import ConfigError
from distrib.task import Loss, Task
from distrib.tasks import adapters, pretrained
from distrib.tasks.next_token import NextToken


class HuggingFace(Task):
    """Base class with model, tokenizer, data and export.

    `model`: the folder of a pretrained model; or, for random initial weights, a config: a mapping with its
    `model_type`, or the path of a config.json. `tokenizer`: a folder (default: the model's), or `bytes`. `files`: globs
    of json, jsonl, csv, tsv, parquet, arrow and text files, or a folder that `Dataset.save_to_disk` wrote.
    `eval_files`: likewise; if None, one row in 20 is held out, chosen by its hash. `adapter`: trained instead of the
    model, see `adapters.with_adapter`.
    """

    auto_class: str  # name of a class of transformers
    adapter_task: str  # peft's name of the task
    masked = False  # whether `_encode` returns masks
    new_head = False  # whether a pretrained model without a head gets a new, random one

    def __init__(
        self,
        model: str | dict[str, Any],
        files: str | list[str],
        eval_files: str | list[str] | None,
        tokenizer: str | None,
        context_length: int,
        columns: Columns,
        adapter: dict[str, Any] | None = None,
    ) -> None:
        """`columns`: the columns to read, each with its allowed types. Raises ConfigError."""
        if isinstance(context_length, bool) or not isinstance(context_length, int) or context_length < 2:
            raise ConfigError(f"task.context_length: {context_length!r}; give a whole number, 2 or more")
        pretrained.require_installed()
        self.adapter = None if adapter is None else adapters.checked(adapter, self.adapter_task)
        self.files, self.eval_files, self.context_length, self.columns = files, eval_files, context_length, columns
        self.config, self.folder = pretrained.find_config(model)
        self.tokenizer = pretrained.find_tokenizer(tokenizer, self.folder)
        if isinstance(model, dict):  # an architecture's defaults are for another vocabulary
            own = {name: getattr(self.tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
            for name, value in {"vocab_size": len(self.tokenizer), **own}.items():
                setattr(self._text_config, name, model.get(name, value))
        pretrained.require_sizes(self._text_config, self.tokenizer, context_length)

    @property
    def _text_config(self) -> Any:
        """The part of the config that has the vocabulary, also if the config has several parts."""
        return self.config.get_text_config()

    @property
    def _auto_class(self) -> Any:
        import transformers

        return getattr(transformers, self.auto_class)

    @cached_property
    def packed(self) -> Path:
        files = find_files(self.files, "task.files")
        evaluation = None if self.eval_files is None else find_files(self.eval_files, "task.eval_files")
        dtype = "<u2" if self._text_config.vocab_size <= 2**16 else "<u4"
        settings = {"tokenizer": pretrained.tokenizer_digest(self.tokenizer), **self._settings()}
        return pack(files, evaluation, self.columns, self._encode, dtype, settings, self.masked)

    def train_dataset(self) -> Documents:
        samples = self._samples("train")
        if len(samples) == 0:  # type: ignore[arg-type]
            raise ConfigError("task.files: all rows are held out, so there is nothing to train on; give more rows")
        return samples

    def eval_dataset(self) -> Documents | None:
        samples = self._samples("eval")
        return samples if len(samples) or self.eval_files is not None else None  # type: ignore[arg-type]

    def model(self) -> nn.Module:
        model = pretrained.build(self._auto_class, self.config, self.folder, self.new_head)
        if next(model.parameters()).device.type != "meta":
            self._require_fit(model)
        return model if self.adapter is None else adapters.with_adapter(model, self.adapter, self.adapter_task)

    def decays(self, name: str, parameter: nn.Parameter) -> bool:
        """Apply weight decay to matrices and embeddings, not to biases and normalisation weights."""
        return parameter.dim() > 1

    def export(self, weights: dict[str, Tensor], folder: Path) -> None:
        """Write a folder that `from_pretrained` reads, with weights, config and tokenizer."""
        pretrained.export(self._auto_class, self.config, self.tokenizer, self.folder, weights, folder)

    def _require_fit(self, model: nn.Module) -> None:
        """Raise ConfigError if the model cannot be trained on the samples."""

    def _settings(self) -> dict[str, Any]:
        """Return the settings besides the tokenizer that `_encode` depends on."""
        return {}

    def _encode(self, rows: list[Row]) -> Encoded:
        raise NotImplementedError

    def _samples(self, split: str) -> Documents:
        raise NotImplementedError

    def _tokenize(self, texts: list[str], **options: Any) -> list[list[int]]:
        ids: list[list[int]] = self.tokenizer(texts, return_attention_mask=False, **options)["input_ids"]
        return ids


class CausalLM(NextToken, HuggingFace):
    """Trains an AutoModelForCausalLM to predict the next token.

    A document is the text of a row, after the special tokens with which the tokenizer begins a text, and followed by
    its eos_token. If the text has these tokens already, as from a chat template, they are not added again. With
    `prompt_column`, the text follows the prompt, and the loss counts only the text. With `packing`, a window of
    `context_length` tokens holds several documents, which do not attend to each other; without it, only one.
    """

    def __init__(
        self,
        model: str | dict[str, Any],
        files: str | list[str],
        eval_files: str | list[str] | None = None,
        tokenizer: str | None = None,
        text_column: str = "text",
        prompt_column: str | None = None,
        context_length: int = 512,
        packing: bool = True,
        adapter: dict[str, Any] | None = None,
    ) -> None:
        self.packing = self._checked_packing(packing)
        self.text_column, self.prompt_column = text_column, prompt_column
        self._prompts_too_long = 0  # rows, counted while they are packed
        prompt = {} if prompt_column is None else {"prompt_column": prompt_column}
        columns: Columns = dict.fromkeys(named_columns(**prompt, text_column=text_column), (str,))
        super().__init__(model, files, eval_files, tokenizer, context_length, columns, adapter)
        if self.tokenizer.eos_token_id is None:
            raise ConfigError("task.tokenizer: it has no eos_token to end a document with; give one that has it")
        self._special_tokens = pretrained.SpecialTokens(self.tokenizer)

    def _encode(self, rows: list[Row]) -> Encoded:
        begun, ended = self._special_tokens.begun, self._special_tokens.ended
        texts = [row[self.text_column] for row in rows]
        if self.prompt_column is None:
            return [(ended(begun(ids)), 1) for ids in self._tokenize(texts, add_special_tokens=False)]
        given = self._tokenize([row[self.prompt_column] for row in rows], add_special_tokens=False)
        prompts, answers = [begun(ids) for ids in given], self._tokenize(texts, add_special_tokens=False)
        self._prompts_too_long += sum(len(prompt) > self.context_length for prompt in prompts)
        return [([*prompt, *ended(ids)], max(1, len(prompt))) for prompt, ids in zip(prompts, answers, strict=True)]

    @cached_property
    def packed(self) -> Path:
        folder = super().packed
        if self._prompts_too_long:
            print(
                f"task.prompt_column: {self._prompts_too_long} row(s) have a prompt longer than task.context_length "
                f"{self.context_length}; the model learns their answers without the whole prompt, in later windows",
                file=sys.stderr,
            )
        return folder

    def _settings(self) -> dict[str, Any]:
        if self.prompt_column is None:
            return {"special_tokens": "once"}
        # With another context_length, rows are packed again, so that the message about long prompts is printed.
        return {"special_tokens": "once", "prompt": self.prompt_column, "context_length": self.context_length}

    def _samples(self, split: str) -> Documents:
        return TokenWindows(self.packed, split, self.context_length, self.packing)


class SequenceClassification(HuggingFace):
    """Trains an AutoModelForSequenceClassification to predict the class of a text.

    `classes`: their names, or how many; leave it out for a model that is a classifier already. A label is a class name
    or a number from 0. Texts are truncated to `context_length` tokens.
    """

    auto_class, adapter_task = "AutoModelForSequenceClassification", "SEQ_CLS"
    new_head = True

    def __init__(
        self,
        model: str | dict[str, Any],
        files: str | list[str],
        classes: int | list[str] | None = None,
        eval_files: str | list[str] | None = None,
        tokenizer: str | None = None,
        text_column: str = "text",
        label_column: str = "label",
        context_length: int = 512,
        adapter: dict[str, Any] | None = None,
    ) -> None:
        self.text_column, self.label_column = text_column, label_column
        text, label = named_columns(text_column=text_column, label_column=label_column)
        columns: Columns = {label: (str, int), text: (str,)}
        super().__init__(model, files, eval_files, tokenizer, context_length, columns, adapter)
        if self.tokenizer.pad_token is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token
        if self.tokenizer.pad_token is None:
            raise ConfigError("task.tokenizer: it has neither a pad_token nor an eos_token to pad with; give one")
        if self._text_config.pad_token_id is None:
            self._text_config.pad_token_id = self.tokenizer.pad_token_id
        self.classes = self._classes(classes)
        self.config.id2label = dict(enumerate(self.classes))
        self.config.label2id = {name: number for number, name in self.config.id2label.items()}
        self.config.problem_type = "single_label_classification"

    def _classes(self, given: Any) -> list[str]:
        names = list(range(given)) if isinstance(given, int) else given
        names = [str(name) for name in names] if isinstance(names, list) else names
        trained = any(name.endswith("ForSequenceClassification") for name in self.config.architectures or [])
        own = [self.config.id2label[number] for number in range(self.config.num_labels)] if trained else None
        if own is not None:
            if given is not None and names != own and given != len(own):
                raise ConfigError(f"task.classes: {given!r}; leave it out, the model's classes are {', '.join(own)}")
            return own
        if not isinstance(names, list) or len(names) < 2 or len(set(names)) < len(names):
            raise ConfigError(f"task.classes: {given!r}; give the names of the classes, or how many: 2 or more")
        return names

    def _encode(self, rows: list[Row]) -> Encoded:
        texts = [row[self.text_column] for row in rows]
        tokens = self._tokenize(texts, truncation=True, max_length=self.context_length)
        filler = [self.tokenizer.pad_token_id]  # for a text without any token
        return [(ids or filler, self._class(row[self.label_column])) for ids, row in zip(tokens, rows, strict=True)]

    def _class(self, label: str | int) -> int:
        name = str(label)
        if name in self.config.label2id:
            return int(self.config.label2id[name])
        if name.isdecimal() and int(name) < len(self.classes):
            return int(name)
        raise ConfigError(f"task.label_column: {label!r} is none of the classes {', '.join(self.classes)}")

    def _settings(self) -> dict[str, Any]:
        return {"classes": self.classes, "context_length": self.context_length}

    def _samples(self, split: str) -> Documents:
        return Classified(self.packed, split, self.tokenizer.pad_token_id)

    def forward(self, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        logits: Tensor = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        return logits

    def loss(self, output: Tensor, batch: dict[str, Tensor]) -> Loss:
        return Loss(F.cross_entropy(output.float(), batch["labels"], reduction="sum"), len(output))

    def predict(self, output: Tensor, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"right": output.argmax(1) == batch["labels"]}

    def metrics(self, rows: dict[str, Tensor]) -> dict[str, float]:
        return {"accuracy": rows["right"].double().mean().item()}


def named_columns(**columns: Any) -> list[str]:
    """Return the names of columns, given by config key. Raises ConfigError."""
    for key, column in columns.items():
        if not isinstance(column, str):
            raise ConfigError(f"task.{key}: {column!r}; give the name of a column")
    return list(columns.values())
