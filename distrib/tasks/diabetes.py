"""scikit-learn's diabetes data: ten measurements of each of 442 patients, and the progression of the disease in a year.

A Dataset and an nn.Module, for `distrib.tasks.supervised:Supervised` (see configs/diabetes.yaml).
"""

import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from distrib.extras import require


class Diabetes(TensorDataset):
    """Samples (inputs of shape (10,), target), standardised with the training split's mean and deviation.

    `split`: train or eval. Every fifth patient is in eval.
    """

    def __init__(self, split: str) -> None:
        require("examples", "task.train_dataset: this dataset")
        from sklearn.datasets import load_diabetes

        inputs, target = (torch.tensor(part, dtype=torch.float32) for part in load_diabetes(return_X_y=True))
        held_out = torch.arange(len(target)) % 5 == 4
        inputs, target = ((part - part[~held_out].mean(0)) / part[~held_out].std(0) for part in (inputs, target))
        chosen = {"train": ~held_out, "eval": held_out}[split]
        super().__init__(inputs[chosen], target[chosen])


class Regressor(nn.Module):
    """A network that maps inputs of shape (batch, 10) to predictions of shape (batch,)."""

    def __init__(self, hidden: int = 64) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(10, hidden), nn.ReLU(), nn.Linear(hidden, 1))

    def forward(self, inputs: Tensor) -> Tensor:
        output: Tensor = self.layers(inputs).squeeze(-1)
        return output
