"""A task whose loss or gradient is not finite in given steps."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from tasks import Masked
from torch import Tensor
from torch.utils.data import TensorDataset

from distrib import Loss
from distrib.data.order import sample_indices


class Spoilt(Masked):
    """Trains in steps of `batch` samples. `how`: for each step "" or what is not finite, loss or gradient."""

    def __init__(self, how: Sequence[str], batch: int = 8) -> None:
        super().__init__(samples=len(how) * batch)
        positions = np.arange(0, self.samples, batch, dtype=np.uint64)  # the first of each step
        self.how = dict(zip(sample_indices(positions, self.samples, seed=0).tolist(), how, strict=True))

    def train_dataset(self) -> TensorDataset:
        tokens, _ = super().train_dataset().tensors
        return TensorDataset(tokens, tokens, torch.arange(self.samples))

    def eval_dataset(self) -> None:  # type: ignore[override]
        return None

    def loss(self, output: Tensor, batch: Any) -> Loss:
        how = "".join(self.how.get(number, "") for number in batch[2].tolist())
        if how == "gradient":
            output = output + (output.detach() * 0 + torch.finfo(output.dtype).max) * (output - output.detach())
        loss = super().loss(output, batch)
        return Loss(loss.total * float("nan"), loss.count) if how == "loss" else loss
