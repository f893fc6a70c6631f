"""A task to begin with: a small network learns which of two spirals a point is on. Replace each part by your own."""

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

import distrib


class First(distrib.Task):
    """The arguments are the keys of the config's section `task`. `points`: how many to make."""

    def __init__(self, points: int = 2000, hidden: int = 64) -> None:
        self.points, self.hidden = points, hidden

    # 1. Prepare the data: datasets of single samples. distrib makes the batches and divides them among the processes.

    def train_dataset(self) -> TensorDataset:
        return spirals(self.points)

    def eval_dataset(self) -> TensorDataset:
        return spirals(self.points // 4)

    # 2. Build the model.

    def model(self) -> nn.Module:
        return nn.Sequential(
            *(nn.Linear(2, self.hidden), nn.Tanh()),
            *(nn.Linear(self.hidden, self.hidden), nn.Tanh()),
            nn.Linear(self.hidden, 2),
        )

    # 3. Define the loss: its sum over the batch, and the number of items. The optimizer is in the config.
    # 4. The training loop is distrib's. By default its forward is model(batch[0]).

    def loss(self, output: Tensor, batch: Any) -> distrib.Loss:
        right = (output.argmax(1) == batch[1]).sum()
        total = F.cross_entropy(output, batch[1], reduction="sum")
        return distrib.Loss(total, len(output), sums={"accuracy": (right, len(output))})

    # 5. Evaluate on unseen data: what to keep of each batch, and metrics over all of it.

    def predict(self, output: Tensor, batch: Any) -> dict[str, Tensor]:
        return {"right": output.argmax(1) == batch[1]}

    def metrics(self, rows: dict[str, Tensor]) -> dict[str, float]:
        return {"accuracy": rows["right"].double().mean().item()}


def spirals(points: int) -> TensorDataset:
    """Return points (x, y) near two spirals, and the number of each one's spiral. distrib seeds the random numbers."""
    which = torch.arange(points) % 2
    along = torch.rand(points).sqrt() * 2 * math.pi
    angle = along + math.pi * which
    place = torch.stack([angle.cos(), angle.sin()], 1) * along[:, None] / (2 * math.pi)
    return TensorDataset(place + 0.02 * torch.randn(points, 2), which)
