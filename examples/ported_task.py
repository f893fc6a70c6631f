"""examples/tutorial.py as a task; examples/ported.yaml has the rest. Run both in the folder examples/."""

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import distrib


class Digits(distrib.Task):
    # 1. Prepare the data: 1,440 images to train on, 357 to validate.

    def __init__(self) -> None:
        images, labels = load_digits(return_X_y=True)
        self.images = torch.tensor(images / 16, dtype=torch.float32).reshape(-1, 1, 8, 8)
        self.labels = torch.tensor(labels)

    def train_dataset(self) -> TensorDataset:
        return TensorDataset(self.images[:1440], self.labels[:1440])

    def eval_dataset(self) -> TensorDataset:
        return TensorDataset(self.images[1440:], self.labels[1440:])

    # 2. Build the model.

    def model(self) -> nn.Module:
        return nn.Sequential(
            *(nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Flatten(), nn.Linear(128, 10)),
        )

    # 3. Define the loss: a sum and a count. The optimizer, and the training loop (4), are in the config.

    def loss(self, output: Tensor, batch: tuple[Tensor, Tensor]) -> distrib.Loss:
        return distrib.Loss(nn.functional.cross_entropy(output, batch[1], reduction="sum"), len(batch[1]))

    # 5. Evaluate on unseen data.

    def predict(self, output: Tensor, batch: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
        return {"right": output.argmax(1) == batch[1]}

    def metrics(self, rows: dict[str, Tensor]) -> dict[str, float]:
        return {"accuracy": rows["right"].double().mean().item()}
