"""The workload of all contenders: model, data, batch, loss and optimizer, with the same initial weights."""

from typing import Any

import torch
from torch import Tensor, nn, optim
from torch.utils.data import Dataset

SEED = 0
LEARNING_RATE, WEIGHT_DECAY = 1e-3, 1e-2  # AdamW's own defaults


class Workload:
    """This module imports only torch, because the start is timed, and not all contenders need distrib's imports."""

    train: Dataset[Any]
    global_batch_size: int
    max_grad_norm: float | None

    def network(self) -> nn.Module:
        raise NotImplementedError

    def inputs(self, batch: Any) -> Tensor:
        raise NotImplementedError

    def loss(self, output: Tensor, batch: Any) -> Tensor:
        """Return the mean over a batch."""
        raise NotImplementedError

    def model(self) -> nn.Module:
        torch.manual_seed(SEED)
        return self.network()

    def optimizer(self, parameters: Any) -> optim.Optimizer:
        """Return the optimizer as users write it, with torch's default implementation."""
        return optim.AdamW(parameters, lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
