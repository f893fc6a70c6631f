"""The task of the runs beside it. As it was when they were made: they hold its hash."""

import torch
from torch import nn
from torch.utils.data import TensorDataset

from distrib import Loss, Task


class Signs(Task):
    """The sign of a sum of four numbers."""

    def train_dataset(self):
        inputs = torch.randn(64, 4)
        return TensorDataset(inputs, (inputs.sum(1) > 0).float())

    def eval_dataset(self):
        return self.train_dataset()

    def model(self):
        return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.BatchNorm1d(8), nn.Linear(8, 1))

    def forward(self, model, batch):
        return model(batch[0]).squeeze(1)

    def loss(self, output, batch):
        total = nn.functional.binary_cross_entropy_with_logits(output, batch[1], reduction="sum")
        return Loss(total, len(output))

    def predict(self, output, batch):
        return {"right": (output > 0) == (batch[1] > 0)}

    def metrics(self, rows):
        return {"accuracy": rows["right"].float().mean()}
