"""The workloads of resuming.py: a regression on samples that are computed from their indices."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import Dataset
from workload import Workload

FEATURES = 16
_FREQUENCIES = torch.arange(1.0, FEATURES + 2) * 0.618  # the last is the target's: nothing that could be learned


class Numbers(Dataset[tuple[int, Tensor]]):
    """Samples (index, features, target), computed from the index, so that no number of them takes memory."""

    def __init__(self, size: int) -> None:
        self.size = size

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, number: int) -> tuple[int, Tensor]:
        return number, torch.sin(number * _FREQUENCIES)


class Numbered(Workload):
    global_batch_size, max_grad_norm = 64, None

    def __init__(self, samples: int, width: int, depth: int) -> None:
        self.train = Numbers(samples)
        self.width, self.depth = width, depth
        self.latest: tuple[Tensor, Tensor] | None = None
        """The loss of this rank's batch, and its samples, of the first call since this was emptied: what follows in the
        same step only looks at the loss."""

    def network(self) -> nn.Module:
        hidden = [layer for _ in range(self.depth) for layer in (nn.Linear(self.width, self.width), nn.ReLU())]
        return nn.Sequential(nn.Linear(FEATURES, self.width), nn.ReLU(), *hidden, nn.Linear(self.width, 1))

    def inputs(self, batch: Any) -> Tensor:
        return batch[1][:, :-1]

    def loss(self, output: Tensor, batch: Any) -> Tensor:
        loss = F.mse_loss(output, batch[1][:, -1:])
        if self.latest is None:
            self.latest = loss.detach(), batch[0]
        return loss


WORKLOADS = {
    "large": (10**6, 2048, 6),  # 25 million parameters
    "late": (10**7, 32, 1),
    "large small": (10**4, 64, 6),
    "late small": (10**4, 32, 1),
}
