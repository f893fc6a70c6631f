"""Small tasks for tests, importable by the processes that the tests start."""

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import Dataset, IterableDataset, TensorDataset, get_worker_info

from distrib import Image, Loss, Table, Task, Text
from distrib.data.order import sample_indices

VOCABULARY, LENGTH = 11, 6


class Masked(Task):
    """Predicts tokens. The number of counted tokens differs between samples, and may be 0."""

    sums = False  # whether the loss brings numbers of its own

    def __init__(self, samples: int = 97, dropout: float = 0.0, sums: bool = False) -> None:
        self.samples, self.dropout, self.sums = samples, dropout, sums

    def _data(self, seed: int) -> TensorDataset:
        generator = torch.Generator().manual_seed(seed)
        tokens = torch.randint(0, VOCABULARY, (self.samples, LENGTH), generator=generator)
        counted = torch.randint(0, LENGTH + 1, (self.samples, 1), generator=generator)
        # Half of the targets are noise, so that no loss is near 0, where the relative error of fp32 is unbounded.
        noise = torch.randint(0, VOCABULARY, tokens.shape, generator=generator)
        targets = torch.where(torch.rand(tokens.shape, generator=generator) < 0.5, noise, (tokens * 3 + 1) % VOCABULARY)
        targets = torch.where(torch.arange(LENGTH) < counted, targets, -100)
        return TensorDataset(tokens, targets)

    def train_dataset(self) -> TensorDataset:
        return self._data(4)

    def eval_dataset(self) -> TensorDataset:
        return self._data(2)

    def model(self) -> nn.Module:
        return nn.Sequential(
            nn.Embedding(VOCABULARY, 16),
            nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Dropout(self.dropout)),
            nn.Sequential(nn.LayerNorm(32), nn.Linear(32, VOCABULARY)),
        )

    def loss(self, output: Tensor, batch: Any) -> Loss:
        targets = batch[1]
        total = F.cross_entropy(output.flatten(0, 1), targets.flatten(), ignore_index=-100, reduction="sum")
        return Loss(total, (targets != -100).sum(), own_sums(output, targets) if self.sums else None)

    def predict(self, output: Tensor, batch: Any) -> dict[str, Tensor]:
        return {"right": ((output.argmax(-1) == batch[1]) & (batch[1] != -100)).sum(1), "token": batch[0][:, 0]}

    def metrics(self, rows: dict[str, Tensor]) -> dict[str, float]:
        return {"right": rows["right"].double().sum().item()}


def own_sums(output: Tensor, targets: Tensor) -> dict[str, Any]:
    """Whole numbers, numbers that are rounded, and Python's own."""
    counted = targets != -100
    return {
        "right": (((output.argmax(-1) == targets) & counted).sum(), counted.sum()),
        "squares": (output.float().square().sum(), output.numel()),
        "none": (0, 0),
    }


def plain_loss(model: nn.Module, data: TensorDataset, step: int, batch: int, seed: int) -> Tensor:
    """Return the mean loss of Masked over a whole step in a plain loop. Only the data order is distrib's."""
    tokens, targets = plain_batch(data, step, batch, seed)
    return F.cross_entropy(model(tokens).flatten(0, 1), targets.flatten(), ignore_index=-100)


def plain_batch(data: TensorDataset, step: int, batch: int, seed: int) -> tuple[Tensor, ...]:
    """Return the samples of a whole step, in distrib's order."""
    positions = np.arange(step * batch, (step + 1) * batch, dtype=np.uint64)
    return data[sample_indices(positions, len(data), seed).tolist()]


class Numbered(Task):
    """Has an evaluation set whose samples are their own indices, and metrics that depend on the order of rows."""

    def __init__(self, samples: int = 20) -> None:
        self.samples = samples

    def train_dataset(self) -> TensorDataset:
        return TensorDataset(torch.randn(64, 3))

    def eval_dataset(self) -> TensorDataset:
        index = torch.arange(self.samples)
        return TensorDataset(torch.sin(index[:, None] * torch.tensor([1.0, 2.0, 3.0])), index)

    def model(self) -> nn.Module:
        return nn.Linear(3, 1)

    def loss(self, output: Tensor, batch: Any) -> Loss:
        return Loss((output**2).sum(), len(output))

    def predict(self, output: Tensor, batch: Any) -> dict[str, Tensor]:
        return {"output": output.bfloat16(), "exact": output, "index": batch[1], "even": batch[1] % 2 == 0}

    def metrics(self, rows: dict[str, Tensor]) -> dict[str, float]:
        assert rows["index"].tolist() == list(range(self.samples))
        assert rows["even"].dtype == torch.bool
        assert rows["output"].dtype == torch.bfloat16
        running = 0.0  # a sum that rounds differently in another order
        for value in rows["exact"].flatten().tolist():
            running = running * 0.9 + value
        return {"running": running, "samples": float(len(rows["index"]))}


def _gone_wrong(output: Tensor, how: str) -> Tensor:
    if how == "nan":
        return output * float("nan")
    if how == "inf":  # a finite loss with a gradient that is not
        return output + (output.detach() * 0 + torch.finfo(output.dtype).max) * (output - output.detach())
    return output


HOW = ("inf", "", "", "nan", "", "nothing", "", "")  # what is wrong with each step of Uneven


class Uneven(Masked):
    """Makes steps of 8 samples, some of which are skipped: because one sample is not finite, or because nothing
    counts."""

    def _data(self, seed: int) -> TensorDataset:
        size = self.samples
        self.positions = sample_indices(np.arange(8 * len(HOW), dtype=np.uint64), size, seed=0).tolist()
        return TensorDataset(*super()._data(seed).tensors, torch.arange(size))

    def loss(self, output: Tensor, batch: Any) -> Loss:
        tokens, targets, numbers = batch
        step, place = divmod(self.positions.index(numbers.numpy()[0]), 8)  # reads no tensor's value
        how = HOW[step] if place == 7 or HOW[step] == "nothing" else ""
        if how == "nothing":
            targets = torch.full_like(targets, -100)
        return super().loss(_gone_wrong(output, how), (tokens, targets))


class Misbehaving(Masked):
    """Goes wrong on one rank, in the `at`-th micro-batch that a process trains on."""

    def __init__(self, how: str, on_rank: int = 1, at: int = 5) -> None:
        super().__init__()
        self.how, self.here, self.at = how, int(os.environ.get("RANK", 0)) == on_rank, at
        self.seen = 0

    def forward(self, model: nn.Module, batch: Any) -> Any:
        self.seen += model.training
        output = super().forward(model, batch)
        if not self.here or not model.training or self.seen != self.at:
            return output
        if self.how == "raise":
            raise ZeroDivisionError("the task divided by zero")
        if self.how == "memory":  # more than there is on any machine
            return output + torch.zeros(10**15)[0]
        if self.how == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if self.how == "sleep":
            time.sleep(600)
        return _gone_wrong(output, self.how)


class Broken(Dataset[Any]):
    """Raises an exception in a worker process."""

    def __len__(self) -> int:
        return 64

    def __getitem__(self, index: int) -> Any:
        if index == 40:
            raise ValueError("sample 40 is broken")
        return torch.zeros(LENGTH, dtype=torch.long), torch.ones(LENGTH, dtype=torch.long)


class BrokenData(Masked):
    def train_dataset(self) -> Any:
        return Broken()


class Groups(Masked):
    """Returns an optimizer with two groups at different rates."""

    def __init__(self) -> None:
        super().__init__()
        self.made: list[torch.optim.Optimizer] = []

    def optimizer(self, params: list[tuple[str, nn.Parameter]]) -> torch.optim.Optimizer:
        biases = [item for item in params if item[0].endswith("bias")]
        others = [item for item in params if not item[0].endswith("bias")]
        self.made.append(torch.optim.SGD([{"params": others}, {"params": biases, "lr": 0.02}], lr=0.1))
        return self.made[-1]


class Lars(torch.optim.Optimizer):
    """Divides by the norm of each parameter's gradient. Counts its updates in a number, not in a tensor."""

    def __init__(self, params: Any, lr: float) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    state = self.state[parameter]
                    state["updates"] = state.get("updates", 0) + 1
                    rate = group["lr"] / (parameter.grad.norm() + 0.1) / state["updates"] ** 0.5
                    parameter.sub_(parameter.grad * rate)


class WithLars(Masked):
    def optimizer(self, params: list[tuple[str, nn.Parameter]]) -> torch.optim.Optimizer:
        return Lars([parameter for _, parameter in params], lr=0.1)


class Halving(Masked):
    """Computes its own learning rate."""

    def learning_rate(self, update: int, num_updates: int) -> float:
        return 0.5 ** (update + 1)


class Centred(nn.Module):
    """Subtracts a running mean, which it assigns as a new tensor in each forward."""

    mean: Tensor

    def __init__(self, size: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(size))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.mean = 0.9 * self.mean + 0.1 * x.mean((0, 1))
        return x - self.mean


class Twice(nn.Module):
    """Uses one normalisation layer twice in a forward."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(LENGTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x) + self.norm(x * 0.5)  # type: ignore[no-any-return]


class WithBuffers(Masked):
    """A model with every kind of buffer that a training forward may change. One sample is not finite."""

    def __init__(self, centred: bool = True) -> None:
        super().__init__()
        self.centred = centred

    def _data(self, seed: int) -> TensorDataset:
        tokens, targets = super()._data(seed).tensors
        features = F.one_hot(tokens, VOCABULARY).float()
        if seed == 4:
            features[5] = torch.nan
            targets[5] = 1
        return TensorDataset(features, targets, tokens)

    def model(self) -> nn.Module:
        return nn.Sequential(
            nn.Linear(VOCABULARY, 16),
            Centred(16) if self.centred else nn.Identity(),
            nn.Sequential(nn.Linear(16, 32), nn.BatchNorm1d(LENGTH), nn.GELU()),
            nn.Sequential(nn.Linear(32, 32), nn.BatchNorm1d(LENGTH, momentum=None), nn.GELU()),
            Twice(),
            nn.InstanceNorm1d(LENGTH, momentum=0.3, track_running_stats=True),
            nn.Linear(32, VOCABULARY),
        )

    def predict(self, output: Tensor, batch: Any) -> dict[str, Tensor]:
        return {"score": output.double().square().mean((1, 2))}

    def metrics(self, rows: dict[str, Tensor]) -> dict[str, float]:
        return {"score": rows["score"].mean().item()}


class Formats(Masked):
    """A convolution in channels_last, and a scale that is a scalar or a vector with one element."""

    def __init__(self, scalar: bool = True) -> None:
        super().__init__()
        self.scalar = scalar

    def model(self) -> nn.Module:
        return Scaled(self.scalar)


class Scaled(nn.Module):
    def __init__(self, scalar: bool) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, 8)
        self.mix = nn.Conv2d(2, 2, 3, padding=1).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.head = nn.Linear(8, VOCABULARY)
        self.scale = nn.Parameter(torch.tensor(0.1) if scalar else torch.tensor([0.1]))

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens).unflatten(2, (2, 4)).transpose(1, 2)
        logits: Tensor = self.head(self.mix(x).transpose(1, 2).flatten(2)) * self.scale.exp()
        return logits


class NoEvaluation(Masked):
    def eval_dataset(self) -> None:
        return None


class NoLength(Masked):
    def train_dataset(self) -> Any:
        return iter([1, 2, 3])


class Empty(Masked):
    """Has a count of 0 in the step that holds sample 0 of the first epoch."""

    def loss(self, output: Tensor, batch: Any) -> Loss:
        loss = super().loss(output, batch)
        return Loss(loss.total * 0, loss.count * 0)


class Either(nn.Module):
    """Uses two models in its first micro-batch, and then one of them, depending on the batch."""

    def __init__(self, left: nn.Module, right: nn.Module) -> None:
        super().__init__()
        self.left, self.right = left, right
        self.first = True

    def forward(self, tokens: Tensor) -> Tensor:
        if self.first:
            self.first = False
            both: Tensor = self.left(tokens) + self.right(tokens)
            return both
        output: Tensor = (self.left if tokens.sum() % 2 else self.right)(tokens)
        return output


class Unused(Masked):
    def model(self) -> nn.Module:
        return Either(super().model(), super().model())


class Large(Task):
    """21 million parameters in 10 blocks."""

    def __init__(self, blocks: int = 10) -> None:
        self.num_blocks = blocks

    def train_dataset(self) -> TensorDataset:
        return TensorDataset(torch.randn(8, 512))

    def model(self) -> nn.Module:
        blocks = [
            nn.Sequential(nn.LayerNorm(512), nn.Linear(512, 2048), nn.GELU(), nn.Linear(2048, 512))
            for _ in range(self.num_blocks)
        ]
        return nn.Sequential(*blocks, nn.Linear(512, 3))

    def loss(self, output: Tensor, batch: Any) -> Loss:
        return Loss((output**2).sum(), len(output))


class Stacked(Masked):
    """Two equal blocks."""

    def model(self) -> nn.Module:
        return nn.Sequential(
            nn.Embedding(VOCABULARY, 16),
            nn.Sequential(*(nn.Sequential(nn.Linear(16, 16), nn.GELU(), nn.Dropout(self.dropout)) for _ in range(2))),
            nn.Linear(16, VOCABULARY),
        )


class Asking(Masked):
    """Reads a tensor's value in forward, which a compiled graph cannot contain."""

    def model(self) -> nn.Module:
        return nn.Sequential(super().model(), Answer())


class Answer(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * 2 if x.sum().item() > 0 else x


class Counting(Masked):
    """Has a forward that depends on how often it was called."""

    def model(self) -> nn.Module:
        torch._dynamo.config.recompile_limit = 1  # not 8, to save the time
        return nn.Sequential(nn.Embedding(VOCABULARY, VOCABULARY), Counter())

    def blocks(self, model: nn.Module) -> list[nn.Module]:
        return [model[1]]  # type: ignore[index]


class Counter(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return x * self.calls


class Slow(Masked):
    """Sleeps in each micro-batch."""

    def forward(self, model: nn.Module, batch: Any) -> Any:
        time.sleep(0.01)
        return super().forward(model, batch)


class Held(Masked):
    """Trains after its first evaluation (not the trial of one) only when the file `go` exists."""

    def __init__(self, go: str) -> None:
        super().__init__()
        self.go, self.evaluated = Path(go), False

    def metrics(self, rows: dict[str, Tensor]) -> dict[str, float]:
        self.evaluated |= len(rows["right"]) == self.samples
        return super().metrics(rows)

    def forward(self, model: nn.Module, batch: Any) -> Any:
        while model.training and self.evaluated and not self.go.exists():
            time.sleep(0.01)
        return super().forward(model, batch)


class Tokens(IterableDataset[Any]):
    """A stream of Masked's samples that is split between ranks and workers, and has a state_dict."""

    def __init__(self, samples: TensorDataset, split: bool) -> None:
        self.samples, self.place = samples, 0
        rank, ranks = (int(os.environ.get(name, default)) for name, default in (("RANK", 0), ("WORLD_SIZE", 1)))
        self.rank, self.ranks = (rank, ranks) if split else (0, 1)

    def __iter__(self) -> Iterator[Any]:
        worker = get_worker_info()
        own, readers = (
            (self.rank, self.ranks)
            if worker is None
            else (self.rank * worker.num_workers + worker.id, self.ranks * worker.num_workers)
        )
        for place in range(self.place, len(self.samples)):
            self.place = place + 1
            if place % readers == own:
                yield self.samples[place]
        self.place = 0

    def state_dict(self) -> dict[str, int]:
        return {"place": self.place}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.place = state["place"]


class Streamed(Masked):
    """Trains on a stream that is shorter than the run."""

    def __init__(self, dropout: float = 0.0, split: bool = True) -> None:
        super().__init__(dropout=dropout)
        self.split = split

    def train_dataset(self) -> Any:
        return Tokens(super().train_dataset(), self.split)


class Phased(Slow):
    """Writes a file into `folder` when rank 0 is in `start-up` or `evaluation`, and then waits for a while. Its
    checkpoints are large enough to be caught while they are written."""

    def __init__(self, folder: str, dropout: float = 0.1) -> None:
        super().__init__(dropout=dropout)
        self.folder = Path(folder)

    def model(self) -> nn.Module:
        self._mark("start-up")
        model = super().model()
        model.register_buffer("ballast", torch.arange(4_000_000.0))
        return model

    def forward(self, model: nn.Module, batch: Any) -> Any:
        if not model.training:
            self._mark("evaluation")
        return super().forward(model, batch)

    def _mark(self, phase: str) -> None:
        if os.environ.get("RANK", "0") == "0" and not (self.folder / phase).exists():
            (self.folder / phase).touch()
            time.sleep(1)


class OtherSums(Masked):
    """Gives its sums another name on rank 1."""

    def loss(self, output: Tensor, batch: Any) -> Loss:
        loss = super().loss(output, batch)
        return Loss(loss.total, loss.count, {f"on-{os.environ['RANK']}": (1, 2)})


class Shown(Masked):
    """Shows what it predicts, in each form that samples have. `at`: kills its process in this evaluation's."""

    def __init__(self, at: int = 0, markup: str = "") -> None:
        super().__init__(sums=True)
        self.at, self.markup, self.seen = at, markup, 0

    def samples(self, rows: dict[str, Tensor]) -> dict[str, Any]:
        self.seen += 1
        if self.seen == self.at and not Path("killed").exists():
            Path("killed").touch()
            os.kill(os.getpid(), signal.SIGKILL)
        right = rows["right"].float() / LENGTH
        grey = right[:96].reshape(8, 12)
        pairs = zip(rows["token"].tolist(), rows["right"].tolist(), strict=True)
        return {
            "grey": Image(grey),
            "colours": Image((torch.stack([grey, 1 - grey, grey * 0]) * 255).byte()),
            "tokens": Table(["token", "right"], list(pairs)),
            "note": Text(f"{self.markup}{int(rows['right'].sum())} are right, {np.random.rand()} was drawn"),
        }
