"""Predict one column of a CSV file from the others."""

import csv
import math
from collections import Counter
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

import distrib

MOST_TEXTS = 50  # in a column; one with more different texts, such as names, is left out
MISSING = ("", "na", "n/a", "nan", "null", "none", "?", "-")  # what stands for no value, in upper or lower case


class Table(distrib.Task):
    """`path`: the file, with the columns' names in its first line. `column`: the one to predict. `kind`: `number` or
    `class`. A fifth of the rows is held out for evaluation; rows without a value to predict are left out."""

    def __init__(self, path: str, column: str, kind: str, hidden: int = 64, dropout: float = 0.1) -> None:
        self.kind, self.hidden, self.dropout = kind, hidden, dropout
        with open(path, encoding="utf-8-sig", newline="") as file:
            rows = [row for row in csv.DictReader(file) if known(row[column])]
        self.held_out = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0)) % 5 == 4
        columns = {name: [known(row[name]) for row in rows] for name in rows[0]}
        answers = columns.pop(column)
        encoded = {name: self._encoded(values) for name, values in columns.items()}
        self.left_out = [name for name, inputs in encoded.items() if not inputs]  # constants, names, identifiers
        parts = [part for inputs in encoded.values() for part in inputs]
        self.inputs = torch.tensor(parts, dtype=torch.float32).reshape(len(parts), len(rows)).T.contiguous()
        if kind == "class":
            self.classes = sorted(set(answers))
            self.answers = torch.tensor([self.classes.index(answer) for answer in answers])
        else:
            self.answers = torch.tensor([float(answer) for answer in answers])
            trained = self.answers[~self.held_out]
            self.mean, self.deviation = trained.mean(), trained.std().clamp(min=1e-12)

    def _encoded(self, values: list[str]) -> list[list[float]]:
        """Return a column as inputs of about size 1, with the statistics of the rows that are trained on: a number is
        standardised, and the mean where it is missing; a text is one input for each different text."""
        trained = [value for value, held_out in zip(values, self.held_out.tolist(), strict=True) if not held_out]
        numbers = [as_number(value) for value in values]
        if all(value is not None or not text for value, text in zip(numbers, values, strict=True)):
            found = torch.tensor([value for value in map(as_number, trained) if value is not None], dtype=torch.float64)
            if len(found) < 2 or not found.std():
                return []
            mean, deviation = found.mean().item(), found.std().item()
            return [[0.0 if value is None else (value - mean) / deviation for value in numbers]]
        texts = Counter(trained)
        return (
            [[float(value == text) for value in values] for text in sorted(texts)] if len(texts) <= MOST_TEXTS else []
        )

    def train_dataset(self) -> TensorDataset:
        return TensorDataset(self.inputs[~self.held_out], self.answers[~self.held_out])

    def eval_dataset(self) -> TensorDataset:
        return TensorDataset(self.inputs[self.held_out], self.answers[self.held_out])

    def model(self) -> nn.Module:
        return nn.Sequential(
            *(nn.Linear(self.inputs.shape[1], self.hidden), nn.ReLU(), nn.Dropout(self.dropout)),
            *(nn.Linear(self.hidden, self.hidden), nn.ReLU(), nn.Dropout(self.dropout)),
            nn.Linear(self.hidden, len(self.classes) if self.kind == "class" else 1),
        )

    def loss(self, output: Tensor, batch: Any) -> distrib.Loss:
        if self.kind == "class":
            return distrib.Loss(F.cross_entropy(output, batch[1], reduction="sum"), len(output))
        wanted = (batch[1] - self.mean) / self.deviation
        return distrib.Loss(F.mse_loss(output[:, 0], wanted, reduction="sum"), len(output))

    def predict(self, output: Tensor, batch: Any) -> dict[str, Tensor]:
        if self.kind == "class":
            return {"guess": output.argmax(1), "answer": batch[1]}
        return {"guess": output[:, 0].float() * self.deviation + self.mean, "answer": batch[1]}

    def metrics(self, rows: dict[str, Tensor]) -> dict[str, float]:
        guess, answer = rows["guess"].double(), rows["answer"].double()
        if self.kind == "class":
            return {"accuracy": (guess == answer).double().mean().item()}
        error = guess - answer
        explained = 1 - error.square().sum() / (answer - answer.mean()).square().sum()
        return {"mean_absolute_error": error.abs().mean().item(), "r2": explained.item()}

    def samples(self, rows: dict[str, Tensor]) -> dict[str, distrib.Table]:
        """The ten rows with the largest errors, or how often each class was taken for each other."""
        guess, answer = rows["guess"], rows["answer"]
        if self.kind == "class":
            pairs = Counter(zip(answer.tolist(), guess.tolist(), strict=True))
            counts = [[name, *(pairs[a, g] for g in range(len(self.classes)))] for a, name in enumerate(self.classes)]
            return {"confusion": distrib.Table(["answer", *self.classes], counts)}
        worst = (guess - answer).abs().argsort(descending=True)[:10]
        shown = [[f"{answer[at]:.4g}", f"{guess[at]:.4g}"] for at in worst.tolist()]
        return {"worst": distrib.Table(["answer", "guess"], shown)}


def known(text: str | None) -> str:
    """Return a value without spaces around it; an empty text if it is missing."""
    text = (text or "").strip()
    return "" if text.lower() in MISSING else text


def as_number(text: str) -> float | None:
    """Return a finite number, or None."""
    try:
        number = float(text)
    except ValueError:
        return None
    return number if math.isfinite(number) else None
