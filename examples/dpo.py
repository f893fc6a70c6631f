"""Direct preference optimization (Rafailov et al., 2023): a model learns to prefer one of two answers.

distrib launch --processes 2 dpo.yaml     in the folder examples/, after make_chats.py
"""

import copy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

import distrib
from distrib.data import Columns, Row, RowError, encoded_rows, find_files
from distrib.tasks.chat_template import ChatTemplate
from distrib.tasks.hugging_face import HuggingFace


class PolicyAndReference(nn.Module):
    """The model that is trained, and a copy of its initial weights that never changes."""

    def __init__(self, policy: nn.Module) -> None:
        super().__init__()
        self.policy = policy
        self.reference = copy.deepcopy(policy).requires_grad_(False)

    def train(self, mode: bool = True) -> "PolicyAndReference":
        super().train(mode)
        self.reference.eval()  # no dropout
        return self

    def forward(self, tokens: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Return the log-likelihoods of the answers under both models, shape (pairs, 2) each."""
        with torch.no_grad():
            reference = log_likelihood(self.reference, tokens, targets)
        return log_likelihood(self.policy, tokens, targets), reference


def log_likelihood(model: nn.Module, tokens: Tensor, targets: Tensor) -> Tensor:
    """Sum the log-probabilities of the targets. The padding is on the right, so no token attends to it."""
    logits = model(input_ids=tokens.flatten(0, 1)).logits.float()
    nats = F.cross_entropy(logits.transpose(1, 2), targets.flatten(0, 1), ignore_index=-100, reduction="none")
    return -nats.sum(1).view(tokens.shape[:2])


class DPO(HuggingFace):
    """Rows have two conversations, `chosen` and `rejected`, which differ in their last answers."""

    auto_class = "AutoModelForCausalLM"

    def __init__(
        self,
        model: Any,
        files: Any,
        eval_files: Any = None,
        tokenizer: str | None = None,
        chat_template: str | None = None,
        beta: float = 0.1,
        context_length: int = 512,
    ) -> None:
        columns: Columns = {"chosen": (list,), "rejected": (list,)}
        super().__init__(model, files, eval_files, tokenizer, context_length, columns)
        if chat_template is not None:
            self.tokenizer.chat_template = Path(chat_template).read_text()
        self.template, self.beta = ChatTemplate(self.tokenizer), beta

    def train_dataset(self) -> Any:
        return self._pairs(self.files, "task.files")

    def eval_dataset(self) -> Any:
        return None if self.eval_files is None else self._pairs(self.eval_files, "task.eval_files")

    def _pairs(self, files: Any, key: str) -> list[list[tuple[Tensor, Tensor]]]:
        batches = encoded_rows(find_files(files, key), self.columns, self._encode_pairs)
        return [pair for _, pairs in batches for pair in pairs]

    def _encode_pairs(self, rows: list[Row]) -> list[list[tuple[Tensor, Tensor]]]:
        """Return each row's tokens and targets, of the chosen and the rejected conversation."""
        encoded = (self.template.encode([row[column] for row in rows]) for column in self.columns)
        pairs = list(zip(*encoded, strict=True))
        for index, pair in enumerate(pairs):
            if max(len(tokens) for tokens, _ in pair) > self.context_length + 1:
                raise RowError(index, f"has more than task.context_length {self.context_length} tokens; leave it out")
        return [[self._shifted(*encoded) for encoded in pair] for pair in pairs]

    def _shifted(self, tokens: list[int], learned: list[bool]) -> tuple[Tensor, Tensor]:
        targets = torch.where(torch.tensor(learned), torch.tensor(tokens), -100)
        return torch.tensor(tokens[:-1]), targets[1:]

    def collate(self, samples: list[Any]) -> tuple[Tensor, Tensor]:
        tokens, targets = zip(*(answer for pair in samples for answer in pair), strict=True)
        inputs = pad_sequence(list(tokens), batch_first=True)
        padded = pad_sequence(list(targets), batch_first=True, padding_value=-100)
        pairs = (len(samples), 2, inputs.shape[1])
        return inputs.view(pairs), padded.view(pairs)

    def model(self) -> nn.Module:
        return PolicyAndReference(super().model())

    def forward(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        """Return by how much more than the reference the policy prefers the chosen answers."""
        policy, reference = model(*batch)
        gains: Tensor = policy - reference
        return self.beta * (gains[:, 0] - gains[:, 1])

    def loss(self, output: Tensor, batch: Any) -> distrib.Loss:
        return distrib.Loss(
            -F.logsigmoid(output).sum(), len(output), sums={"accuracy": ((output > 0).sum(), len(output))}
        )

    def predict(self, output: Tensor, batch: Any) -> dict[str, Tensor]:
        return {"margin": output}

    def metrics(self, rows: dict[str, Tensor]) -> dict[str, float]:
        return {"accuracy": (rows["margin"] > 0).double().mean().item(), "margin": rows["margin"].mean().item()}

    def export(self, weights: dict[str, Tensor], folder: Path) -> None:
        policy = {name.removeprefix("policy."): w for name, w in weights.items() if name.startswith("policy.")}
        super().export(policy, folder)
