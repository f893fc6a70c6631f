"""Handwritten digits in plain PyTorch: train, validate after each epoch, halve the rate on a plateau, keep the best
weights, stop when the validation loss improves no more.

python examples/tutorial.py
"""

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.optim.lr_scheduler import ReduceLROnPlateau
from torch.utils.data import DataLoader, TensorDataset

from distrib.data import sample_indices

SEED, BATCH_SIZE, MAX_EPOCHS, PATIENCE = 0, 48, 40, 4

# 1. Prepare the data: 1,440 images to train on, 357 to validate.
images, labels = load_digits(return_X_y=True)
images = torch.tensor(images / 16, dtype=torch.float32).reshape(-1, 1, 8, 8)
labels = torch.tensor(labels)
train_set = TensorDataset(images[:1440], labels[:1440])
validation_set = TensorDataset(images[1440:], labels[1440:])

# 2. Build the model.
torch.manual_seed(SEED)
model = nn.Sequential(
    *(nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
    *(nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
    *(nn.Flatten(), nn.Linear(128, 10)),
)

# 3. Define loss and optimizer.
loss_function = nn.CrossEntropyLoss()
optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
scheduler = ReduceLROnPlateau(optimizer, factor=0.5, patience=1, threshold=0.0, threshold_mode="abs")


def train(epoch: int) -> None:
    # An ordinary script says DataLoader(train_set, BATCH_SIZE, shuffle=True). This one takes the order that distrib
    # has, so that both see the same batches and their curves can be compared.
    positions = np.arange(epoch * len(train_set), (epoch + 1) * len(train_set), dtype=np.uint64)
    loader = DataLoader(train_set, BATCH_SIZE, sampler=sample_indices(positions, len(train_set), SEED).tolist())
    model.train()
    for inputs, targets in loader:  # 4. the training loop
        output = model(inputs)
        loss = loss_function(output, targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def validate() -> tuple[float, float]:
    model.eval()
    total, right = 0.0, 0
    with torch.no_grad():
        for inputs, targets in DataLoader(validation_set, 100):
            output = model(inputs)
            total += nn.functional.cross_entropy(output, targets, reduction="sum").item()
            right += int((output.argmax(1) == targets).sum())
    return total / len(validation_set), right / len(validation_set)


best, best_epoch = float("inf"), 0
for epoch in range(MAX_EPOCHS):  # until the model's performance stops improving
    train(epoch)
    loss, accuracy = validate()  # 5. evaluate on unseen data
    print(f"epoch {epoch + 1} loss {loss:.9f} accuracy {accuracy:.9f} lr {optimizer.param_groups[0]['lr']:g}")
    scheduler.step(loss)
    if loss < best:
        best, best_epoch = loss, epoch
        torch.save(model.state_dict(), "best.pt")
    if epoch - best_epoch == PATIENCE:
        break
print(f"best loss {best:.9f} after epoch {best_epoch + 1}")
