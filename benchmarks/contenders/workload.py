"""What all contenders run: the same model, data, batch, loss and optimizer, from the same initial weights."""

from typing import Any

import torch
from torch import Tensor, nn, optim
from torch.utils.data import Dataset

SEED = 0
LEARNING_RATE, WEIGHT_DECAY = 1e-3, 1e-2  # AdamW's own defaults


class Workload:
    """Imports torch alone: who starts is timed, and not all contenders need what distrib does."""

    train: Dataset[Any]
    global_batch_size: int
    max_grad_norm: float | None

    def network(self) -> nn.Module:
        raise NotImplementedError

    def inputs(self, batch: Any) -> Tensor:
        raise NotImplementedError

    def loss(self, output: Tensor, batch: Any) -> Tensor:
        """Mean over a batch."""
        raise NotImplementedError

    def model(self) -> nn.Module:
        torch.manual_seed(SEED)
        return self.network()

    def optimizer(self, parameters: Any) -> optim.Optimizer:
        """As one writes it: how torch carries it out is its own choice."""
        return optim.AdamW(parameters, lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
