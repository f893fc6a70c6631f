"""The workloads of peers.py as distrib tasks: `digits` and `gpt`."""

from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset
from workload import SEED, Workload

from distrib import Task
from distrib.data.documents import PaddedWindows
from distrib.data.order import sample_indices
from distrib.tasks.digits import Digits
from distrib.tasks.language_model import GPT, SEPARATOR, LanguageModel

CONTEXT_LENGTH, TRAIN_WINDOWS, EVAL_WINDOWS = 256, 4096, 192


class TaskWorkload(Workload):
    task: Task

    @cached_property
    def train(self) -> TensorDataset:
        """Return the samples in the order in which distrib reads its first epoch, so that contenders without shuffling
        read the same."""
        dataset = self.task.train_dataset()
        order = sample_indices(np.arange(len(dataset), dtype=np.uint64), len(dataset), SEED)
        chosen = torch.from_numpy(order.astype(np.int64))
        return TensorDataset(*(tensor[chosen] for tensor in dataset.tensors))

    @cached_property
    def eval(self) -> TensorDataset:
        return self.task.eval_dataset()

    def network(self) -> nn.Module:
        return self.task.model()


class DigitsWorkload(TaskWorkload):
    """Measures the overhead of a step."""

    global_batch_size, max_grad_norm = 64, None

    def __init__(self) -> None:
        self.task = Digits("mlp")

    def inputs(self, batch: Any) -> Tensor:
        return batch[0]

    def loss(self, output: Tensor, batch: Any) -> Tensor:
        return F.cross_entropy(output, batch[1])


class Text(LanguageModel):
    """Windows of the source of Python's library, in memory and without separators. Each has the same number of bytes,
    so a mean of means is the right loss."""

    def __init__(self) -> None:
        super().__init__(context_length=CONTEXT_LENGTH)

    def train_dataset(self) -> TensorDataset:  # type: ignore[override]
        return TensorDataset(_windows(super().train_dataset(), TRAIN_WINDOWS))

    def eval_dataset(self) -> TensorDataset:  # type: ignore[override]
        held_out = super().eval_dataset()
        assert held_out is not None, "Python's own library has enough text"
        return TensorDataset(_windows(held_out, EVAL_WINDOWS))

    def model(self) -> nn.Module:
        return GPT(self.layers, self.heads, self.width)

    def forward(self, model: nn.Module, batch: Any) -> Tensor:
        return super().forward(model, batch[0])

    def loss(self, output: Tensor, batch: Any) -> Any:
        return super().loss(output, batch[0])

    def predict(self, output: Tensor, batch: Any) -> dict[str, Tensor]:
        return super().predict(output, batch[0])


def _windows(windows: PaddedWindows, number: int) -> Tensor:
    tokens = np.asarray(windows.tokens[: 2 * number * (CONTEXT_LENGTH + 1)])
    tokens = tokens[tokens != SEPARATOR][: number * (CONTEXT_LENGTH + 1)]
    return torch.from_numpy(tokens.astype(np.int64)).view(number, CONTEXT_LENGTH + 1)


class TextWorkload(TaskWorkload):
    """Measures throughput."""

    global_batch_size, max_grad_norm = 16, 1.0

    def __init__(self) -> None:
        self.task = Text()

    def inputs(self, batch: Any) -> Tensor:
        return batch[0][:, :-1]

    def loss(self, output: Tensor, batch: Any) -> Tensor:
        return F.cross_entropy(output.flatten(0, 1), batch[0][:, 1:].flatten())


WORKLOADS = {"digits": DigitsWorkload, "gpt": TextWorkload}
