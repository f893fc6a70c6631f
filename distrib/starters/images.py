"""Classify pictures that lie in folders, one folder for each class."""

from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageOps
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import Dataset

import distrib

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp")


class Images(distrib.Task):
    """`path`: a folder with a folder of pictures for each class. `size`: of the square they are cut and scaled to.
    A fifth of the pictures is held out for evaluation."""

    def __init__(self, path: str, size: int = 64, width: int = 32) -> None:
        self.size, self.width = size, width
        self.classes = sorted(folder.name for folder in Path(path).iterdir() if pictures_in(folder))
        files = [(file, number) for number, name in enumerate(self.classes) for file in pictures_in(Path(path) / name)]
        order = torch.randperm(len(files), generator=torch.Generator().manual_seed(0)).tolist()
        self.train = Pictures([files[place] for place in order[len(files) // 5 :]], size)
        self.held_out = Pictures([files[place] for place in order[: len(files) // 5]], size)

    def train_dataset(self) -> "Pictures":
        return self.train

    def eval_dataset(self) -> "Pictures":
        return self.held_out

    def model(self) -> nn.Module:
        widths = [3, self.width, 2 * self.width, 4 * self.width]
        blocks = [block(inputs, outputs) for inputs, outputs in pairwise(widths)]
        return nn.Sequential(*blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(widths[-1], len(self.classes)))

    def loss(self, output: Tensor, batch: Any) -> distrib.Loss:
        right = (output.argmax(1) == batch[1]).sum()
        total = F.cross_entropy(output, batch[1], reduction="sum")
        return distrib.Loss(total, len(output), sums={"accuracy": (right, len(output))})

    def predict(self, output: Tensor, batch: Any) -> dict[str, Tensor]:
        return {"guess": output.argmax(1), "answer": batch[1]}

    def metrics(self, rows: dict[str, Tensor]) -> dict[str, float]:
        return {"accuracy": (rows["guess"] == rows["answer"]).double().mean().item()}

    def samples(self, rows: dict[str, Tensor]) -> dict[str, distrib.Image | distrib.Table]:
        """How often each class was taken for each other, and the first pictures that were not recognised."""
        size = len(self.classes)
        counts = torch.bincount(rows["answer"] * size + rows["guess"], minlength=size * size).view(size, size).tolist()
        rows_of_table = [[name, *row] for name, row in zip(self.classes, counts, strict=True)]
        wrong = (rows["guess"] != rows["answer"]).nonzero()[:8, 0].tolist()
        shown = [self.held_out[place][0] for place in wrong]
        confusion = distrib.Table(["answer", *self.classes], rows_of_table)
        return {"confusion": confusion, **({"wrong": distrib.Image(torch.cat(shown, 2))} if shown else {})}


class Pictures(Dataset[Any]):
    """Samples (picture of shape (3, size, size) with values from 0 to 1, number of its class)."""

    def __init__(self, files: list[tuple[Path, int]], size: int) -> None:
        self.files, self.size = files, size

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        file, number = self.files[index]
        with Image.open(file) as picture:
            upright: Any = ImageOps.exif_transpose(picture)
            if upright.mode.startswith("I"):  # 16 bits
                upright = upright.point(lambda value: value / 256).convert("L")
            fitted = ImageOps.fit(upright.convert("RGB"), (self.size, self.size))
        values = torch.frombuffer(bytearray(fitted.tobytes()), dtype=torch.uint8)
        return values.view(self.size, self.size, 3).permute(2, 0, 1).float() / 255, number


def pictures_in(folder: Path) -> list[Path]:
    """Return the pictures in a folder, also in its folders; none if it is no folder. Hidden files are none."""
    if not folder.is_dir() or folder.name.startswith((".", "__")):
        return []
    found = (file for file in folder.rglob("*") if file.suffix.lower() in SUFFIXES and file.is_file())
    return sorted(file for file in found if not any(part.startswith(".") for part in file.relative_to(folder).parts))


def block(inputs: int, outputs: int) -> nn.Module:
    """Halve height and width. Group normalisation: batch statistics would depend on the number of processes."""
    return nn.Sequential(
        *(nn.Conv2d(inputs, outputs, 3, padding=1), nn.GroupNorm(8, outputs), nn.ReLU()),
        *(nn.Conv2d(outputs, outputs, 3, padding=1), nn.GroupNorm(8, outputs), nn.ReLU(), nn.MaxPool2d(2)),
    )
