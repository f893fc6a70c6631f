"""Tasks for tests of how data are collated, drawn, mixed and streamed."""

from collections.abc import Iterator
from itertools import count
from typing import Any

import numpy as np
import torch
from tasks import LENGTH, Masked
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

from distrib import Loss
from distrib.data import Mixture, ShardedStream
from distrib.data.order import sample_indices


class Ragged(Masked):
    """Samples are dicts with a string and sequences of 1 to 6 tokens, which collate pads to the longest of a batch."""

    def _samples(self, seed: int) -> list[dict[str, Any]]:
        lengths = torch.randint(1, LENGTH + 1, (self.samples,), generator=torch.Generator().manual_seed(seed)).tolist()
        rows = zip(*super()._data(seed).tensors, lengths, strict=True)
        return [
            {"name": f"sample {number}", "tokens": tokens[:length], "targets": (targets[:length], {"length": length})}
            for number, (tokens, targets, length) in enumerate(rows)
        ]

    def train_dataset(self) -> Any:
        return self._samples(4)

    def eval_dataset(self) -> Any:
        return self._samples(2)

    def collate(self, samples: list[Any]) -> Any:
        assert all(type(sample["name"]) is str for sample in samples)
        padded = nn.utils.rnn.pad_sequence([sample["tokens"] for sample in samples], batch_first=True)
        targets = nn.utils.rnn.pad_sequence([s["targets"][0] for s in samples], batch_first=True, padding_value=-100)
        lengths = [sample["targets"][1]["length"] for sample in samples]
        return {"names": [sample["name"] for sample in samples], "tokens": padded, "rest": (targets, {"of": lengths})}

    def forward(self, model: nn.Module, batch: Any) -> Tensor:
        output: Tensor = model(batch["tokens"])
        return output

    def loss(self, output: Tensor, batch: Any) -> Loss:
        targets = batch["rest"][0]
        total = F.cross_entropy(output.flatten(0, 1), targets.flatten(), ignore_index=-100, reduction="sum")
        return Loss(total, (targets != -100).sum())

    def predict(self, output: Tensor, batch: Any) -> dict[str, Any]:
        rows = zip(output.argmax(-1), batch["rest"][1]["of"], strict=True)
        return {"tokens": [row[:length] for row, length in rows], "name": batch["names"]}

    def metrics(self, rows: dict[str, Any]) -> dict[str, float]:
        assert rows["name"] == [f"sample {number}" for number in range(len(rows["name"]))]
        lengths = [len(row) for row in rows["tokens"]]
        assert lengths == [sample["targets"][1]["length"] for sample in self._samples(2)[: len(lengths)]]
        return {"sum": float(sum((place + 1) * int(row.sum()) for place, row in enumerate(rows["tokens"])))}


class Weighted(Masked):
    """Draws its samples by weights, of which every seventh is 0."""

    def sample_weights(self) -> Any:
        return [float(number % 7) for number in range(self.samples)]


class Mixed(Masked):
    """Mixes the first 31 samples of Masked and the others."""

    def train_dataset(self) -> Any:
        samples = super().train_dataset()
        first, rest = (TensorDataset(*samples[part]) for part in (slice(31), slice(31, None)))
        return Mixture({"first": (first, 0.7), "rest": (rest, 0.3)})


BEGINS = (0, 5, 5, 20, 31, 50, 58, 75, 90, 97)  # of the shards of Lines, in Masked's samples; shard 1 is empty


class Lines(ShardedStream):
    """Masked's samples in nine shards of different lengths."""

    def __init__(self, samples: TensorDataset) -> None:
        self.samples = samples

    def shards(self) -> list[str]:
        return [f"lines-{number}" for number in range(len(BEGINS) - 1)]

    def open(self, shard: str, offset: int) -> Iterator[Any]:
        number = self.shards().index(shard)
        for index in range(BEGINS[number] + offset, BEGINS[number + 1]):
            yield self.samples[index]


class Sharded(Masked):
    def train_dataset(self) -> Any:
        return Lines(super().train_dataset())


def samples_of_shards(seed: int, micro_batches: int, shards: int) -> list[Iterator[int]]:
    """Return for each micro-batch of a step the samples of its shards, pass by pass, one shard after the other."""

    def lane(number: int) -> Iterator[int]:
        for passes in count():
            order = sample_indices(np.arange(passes * shards, (passes + 1) * shards, dtype=np.uint64), shards, seed)
            for shard in order.tolist()[number::micro_batches]:
                yield from range(BEGINS[shard], BEGINS[shard + 1])

    return [lane(number) for number in range(micro_batches)]


def padded_loss(model: nn.Module, samples: list[dict[str, Any]]) -> Tensor:
    """Return the mean loss of Ragged over a whole step, one sample at a time, so that nothing is padded."""
    losses = [
        F.cross_entropy(model(s["tokens"][None])[0], s["targets"][0], ignore_index=-100, reduction="sum")
        for s in samples
    ]
    return torch.stack(losses).sum() / sum(int((sample["targets"][0] != -100).sum()) for sample in samples)
