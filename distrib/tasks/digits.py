"""The 8x8 handwritten digits that scikit-learn ships: 1,797 real images, no download."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

from distrib.errors import ConfigError
from distrib.extras import require
from distrib.task import Loss, Task


class Digits(Task):
    """Classify images of ten digits. Every fifth image is held out for evaluation. `network`: cnn or mlp."""

    def __init__(self, network: str = "cnn", hidden: int = 128, dropout: float = 0.0) -> None:
        if network not in NETWORKS:
            raise ConfigError(f"task.network: {network!r}; give {' or '.join(NETWORKS)}")
        self.network = NETWORKS[network]
        self.hidden, self.dropout = hidden, dropout
        require("examples", "task.target: this task")
        from sklearn.datasets import load_digits

        images, labels = load_digits(return_X_y=True)
        self.images = torch.tensor(images / 16, dtype=torch.float32).reshape(-1, 1, 8, 8)
        self.labels = torch.tensor(labels)
        self.held_out = torch.arange(len(labels)) % 5 == 4

    def train_dataset(self) -> TensorDataset:
        return TensorDataset(self.images[~self.held_out], self.labels[~self.held_out])

    def eval_dataset(self) -> TensorDataset:
        return TensorDataset(self.images[self.held_out], self.labels[self.held_out])

    def model(self) -> nn.Module:
        return self.network(self.hidden, self.dropout)

    def loss(self, output: Tensor, batch: tuple[Tensor, Tensor]) -> Loss:
        return Loss(F.cross_entropy(output, batch[1], reduction="sum"), len(batch[1]))

    def predict(self, output: Tensor, batch: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
        return {"right": output.argmax(dim=1) == batch[1]}

    def metrics(self, rows: dict[str, Tensor]) -> dict[str, float]:
        return {"accuracy": rows["right"].double().mean().item()}


def cnn(hidden: int, dropout: float) -> nn.Module:
    return nn.Sequential(
        *(nn.Conv2d(1, 16, 3, padding=1), nn.ReLU()),
        *(nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Flatten(), nn.Linear(32 * 4 * 4, hidden), nn.ReLU(), nn.Dropout(dropout)),
        nn.Linear(hidden, 10),
    )


def mlp(hidden: int, dropout: float) -> nn.Module:
    return nn.Sequential(
        *(nn.Flatten(), nn.Linear(64, hidden), nn.ReLU(), nn.Dropout(dropout)),
        *(nn.Linear(hidden, hidden), nn.ReLU(), nn.Dropout(dropout)),
        nn.Linear(hidden, 10),
    )


NETWORKS = {"cnn": cnn, "mlp": mlp}
