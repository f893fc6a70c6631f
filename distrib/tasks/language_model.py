"""A byte-level GPT: GPT-2's decoder and initialisation (Radford et al., 2019) with rotary positions (Su et al., 2021).

A token attends only to its own document, so a document's loss does not depend on the documents packed with it.
"""

import math
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from distrib.data.documents import PaddedWindows
from distrib.data.packing import Encoded, pack
from distrib.data.rows import Files, Row, expand_globs
from distrib.errors import ConfigError
from distrib.task import Loss, Task

SEPARATOR = 256  # precedes each document
VOCABULARY = 257


class LanguageModel(Task):
    """Trains a GPT to predict the next byte of text files.

    `text`: globs of files, each of which is a document; `stdlib` means Python's library. One document in 20 is held
    out, chosen by its hash. `dropout` is applied to the embeddings and to the output of each sublayer.
    """

    def __init__(
        self,
        text: str | Sequence[str] = "stdlib",
        context_length: int = 256,
        layers: int = 4,
        heads: int = 4,
        width: int = 128,
        dropout: float = 0.0,
    ) -> None:
        given = {"context_length": context_length, "layers": layers, "heads": heads, "width": width}
        for key, value in given.items():
            if not isinstance(value, int) or value < 1:
                raise ConfigError(f"task.{key}: {value!r}; give a whole number, 1 or more")
        if width % (2 * heads):
            fitting = max(1, round(width / (2 * heads))) * 2 * heads
            raise ConfigError(
                f"task.width: {width} is not an even number for each of {heads} heads; nearest that fits: {fitting}"
            )
        if not 0 <= dropout < 1:
            raise ConfigError(f"task.dropout: {dropout!r}; give 0 or more, less than 1")
        self.context_length, self.layers, self.heads, self.width, self.dropout = (*given.values(), dropout)
        self.files = expand_globs(text, "task.text")

    @cached_property
    def packed(self) -> Path:
        files = Files("bytes", self.files, "task.text")
        return pack([files], None, {"content": (bytes,)}, encode, "<u2", {"tokenizer": "bytes"})

    def train_dataset(self) -> PaddedWindows:
        windows = PaddedWindows(self.packed, "train", self.context_length, SEPARATOR)
        if len(windows) == 0:
            raise ConfigError(f"task.text: all of its {len(self.files)} file(s) are held out; give more files")
        return windows

    def eval_dataset(self) -> PaddedWindows | None:
        windows = PaddedWindows(self.packed, "eval", self.context_length, SEPARATOR)
        return windows if len(windows) else None

    def model(self) -> nn.Module:
        return GPT(self.layers, self.heads, self.width, self.dropout)

    def forward(self, model: nn.Module, batch: Tensor) -> Tensor:
        logits: Tensor = model(batch[:, :-1])
        return logits

    def loss(self, output: Tensor, batch: Tensor) -> Loss:
        nats, counted = _nats(output, batch)
        return Loss(nats.sum(), counted.sum())

    def predict(self, output: Tensor, batch: Tensor) -> dict[str, Tensor]:
        nats, counted = _nats(output, batch)
        return {"nats": nats, "bytes": counted}

    def metrics(self, rows: dict[str, Tensor]) -> dict[str, float]:
        nats, count = rows["nats"].double().sum().item(), rows["bytes"].sum().item()
        return {"bits_per_byte": nats / math.log(2) / count if count else math.nan}

    def decays(self, name: str, parameter: nn.Parameter) -> bool:
        """Apply weight decay to matrices and the embedding, not to biases and normalisation weights."""
        return parameter.dim() > 1


def encode(documents: list[Row]) -> Encoded:
    """Return the tokens of each document: the separator, then the bytes."""
    first = np.uint16(SEPARATOR)
    return [(np.append(first, np.frombuffer(document["content"], np.uint8)), 1) for document in documents]


def _nats(logits: Tensor, batch: Tensor) -> tuple[Tensor, Tensor]:
    """Return each sample's cross-entropy in nats, summed over its target bytes, and their number: (batch,) each.

    A separator is not a target, because it is not a byte of a document.
    """
    targets = batch[:, 1:]
    nats = F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), ignore_index=SEPARATOR, reduction="none")
    return nats.view_as(targets).sum(1), (targets != SEPARATOR).sum(1)


class GPT(nn.Module):
    """A decoder that maps tokens (batch, length) to logits of the next tokens (batch, length, VOCABULARY)."""

    def __init__(self, layers: int, heads: int, width: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.heads = heads
        self.embedding = nn.Embedding(VOCABULARY, width)
        self.dropout = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(Block(heads, width, dropout) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, VOCABULARY, bias=False)
        self.head.weight = self.embedding.weight
        for name, parameter in self.named_parameters():
            if parameter.dim() > 1:  # GPT-2 scales the residual projections down, because 2 * layers of them add up
                nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * layers) if name.endswith("out.weight") else 0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)

    def forward(self, tokens: Tensor) -> Tensor:
        document = (tokens == SEPARATOR).cumsum(1)
        # A window with one document would only need a causal mask, but finding that out would wait for the device.
        # docs/language-model.md has the cost.
        mask = (document[:, :, None] == document[:, None, :]).tril()[:, None]
        rotation = rotary(tokens.shape[1], self.embedding.embedding_dim // self.heads, tokens.device)
        x = self.dropout(self.embedding(tokens))
        for block in self.blocks:
            x = block(x, mask, *rotation)
        logits: Tensor = self.head(self.norm(x))
        return logits


class Block(nn.Module):
    """Self-attention and a feed-forward layer with residual connections, shape (batch, length, width)."""

    def __init__(self, heads: int, width: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.attention_norm = nn.LayerNorm(width)
        self.attention_in = nn.Linear(width, 3 * width)
        self.attention_out = nn.Linear(width, width)
        self.feed_forward_norm = nn.LayerNorm(width)
        self.feed_forward_in = nn.Linear(width, 4 * width)
        self.feed_forward_out = nn.Linear(4 * width, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, mask: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        qkv = self.attention_in(self.attention_norm(x)).unflatten(2, (3, self.heads, -1))
        query, key, value = qkv.permute(2, 0, 3, 1, 4)  # (batch, heads, length, width / heads) each
        query, key = rotate(query, cos, sin), rotate(key, cos, sin)
        attended = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        x = x + self.dropout(self.attention_out(attended.transpose(1, 2).flatten(2)))
        hidden = F.gelu(self.feed_forward_in(self.feed_forward_norm(x)), approximate="tanh")
        result: Tensor = x + self.dropout(self.feed_forward_out(hidden))
        return result


def rotary(length: int, width: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return cosine and sine of the rotary angles, shape (length, width / 2) each. `width`: of a head.

    They are computed in each forward, because a buffer would be sent to every rank in each step.
    """
    frequencies = 10_000.0 ** (-torch.arange(0, width, 2, device=device) / width)
    angles = torch.arange(length, device=device)[:, None] * frequencies
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the channel pairs (i, i + width / 2), so that dot products depend only on the distance of positions."""
    left, right = x.chunk(2, dim=-1)
    return torch.cat((left * cos - right * sin, left * sin + right * cos), dim=-1).type_as(x)
