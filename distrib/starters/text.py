"""Learn to write like some text files: a byte-level GPT, trained from the beginning."""

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

import distrib
from distrib.tasks.language_model import GPT


class Texts(distrib.Task):
    """`path`: a text file, or a folder whose .txt and .md files are read one after another. A tenth of the pieces of
    `context_length` bytes is held out for evaluation."""

    def __init__(
        self,
        path: str,
        context_length: int = 128,
        layers: int = 4,
        heads: int = 4,
        width: int = 128,
        dropout: float = 0.1,
    ) -> None:
        self.layers, self.heads, self.width, self.dropout = layers, heads, width, dropout
        content = b"\n\n".join(file.read_bytes() for file in files_in(Path(path)))
        tokens = torch.frombuffer(bytearray(content), dtype=torch.uint8)
        self.pieces = tokens.unfold(0, context_length + 1, context_length)  # each begins with the last byte before it
        self.held_out = torch.randperm(len(self.pieces), generator=torch.Generator().manual_seed(0)) % 10 == 9

    def train_dataset(self) -> TensorDataset:
        return TensorDataset(self.pieces[~self.held_out])

    def eval_dataset(self) -> TensorDataset:
        return TensorDataset(self.pieces[self.held_out])

    def model(self) -> nn.Module:
        return GPT(self.layers, self.heads, self.width, self.dropout)

    def forward(self, model: nn.Module, batch: Any) -> Any:
        return model(batch[0][:, :-1].long())

    def loss(self, output: Tensor, batch: Any) -> distrib.Loss:
        following = batch[0][:, 1:].long()
        total = F.cross_entropy(output.flatten(0, 1), following.flatten(), reduction="sum")
        return distrib.Loss(total, following.numel())

    def predict(self, output: Tensor, batch: Any) -> dict[str, Tensor]:
        following = batch[0][:, 1:].long()
        return {"nats": F.cross_entropy(output.float().transpose(1, 2), following, reduction="none").mean(1)}

    def metrics(self, rows: dict[str, Tensor]) -> dict[str, float]:
        return {"bits_per_byte": rows["nats"].double().mean().item() / math.log(2)}

    def samples(self, rows: dict[str, Tensor]) -> dict[str, distrib.Text]:
        """The held-out piece that surprised the model most, and the one that it knew best."""
        pieces = self.pieces[self.held_out]
        found = {"hardest": rows["nats"].argmax(), "easiest": rows["nats"].argmin()}
        return {name: distrib.Text(bytes(pieces[at].tolist()).decode("utf-8", "replace")) for name, at in found.items()}


def files_in(path: Path) -> list[Path]:
    """Return the file itself, or a folder's text files, also those in its folders, in the order of their names."""
    if not path.is_dir():
        return [path]
    return sorted(file for file in path.rglob("*") if file.suffix.lower() in (".txt", ".md") and file.is_file())
