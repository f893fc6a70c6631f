"""Ranks whose data differ, and Task.prepare, in one launch of two processes: `data_cases.py FOLDER`."""

import json
import random
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tasks import Masked
from torch.utils.data import Dataset, Subset, TensorDataset, random_split

from distrib import Config, DistribError, Trainer, World
from distrib.errors import ConfigError
from distrib.training import build


class Parts(Masked):
    """Returns a different part of the data on each rank."""

    def __init__(self, sizes: tuple[int, int]) -> None:
        super().__init__(samples=101)
        self.sizes = sizes

    def train_dataset(self) -> Any:
        rank = World.detect().rank
        first = self.sizes[0] * rank
        return Subset(super()._data(4), range(first, first + self.sizes[rank]))


class Cached(Masked):
    """Reads a file that rank 0 writes slowly, in two halves."""

    def __init__(self, cache: str) -> None:
        super().__init__()
        self.cache = Path(cache)

    def write(self) -> None:
        if self.cache.exists():
            return
        rows = torch.randint(0, 11, (60, 6)).tolist()
        with self.cache.open("a") as file:
            for half in (rows[:30], rows[30:]):
                file.writelines(json.dumps(row) + "\n" for row in half)
                file.flush()
                time.sleep(0.5)

    def train_dataset(self) -> Any:
        if World.detect().is_rank_0:
            self.write()
        else:
            while not self.cache.exists() or not self.cache.read_text().count("\n"):
                time.sleep(0.01)
        return self.read()

    def read(self) -> Any:
        rows = [json.loads(line) for line in self.cache.read_text().splitlines()]
        return TensorDataset(torch.tensor(rows), torch.tensor(rows))


class Prepared(Cached):
    def prepare(self) -> None:
        with Path(f"{self.cache}.ranks").open("a") as file:
            file.write(f"{World.detect().rank}\n")
        self.write()

    def train_dataset(self) -> Any:
        return self.read()


class Refusing(Masked):
    def prepare(self) -> None:
        raise ConfigError("task.url: cannot be reached")


class Split(Masked):
    """Splits its data without a seed, as tutorials do, with each kind of generator."""

    def __init__(self) -> None:
        super().__init__()
        self.order = random.sample(range(97), 97)

    def _splits(self) -> list[Subset[Any]]:
        mixed = Subset(super()._data(4), [self.order[place] for place in np.random.permutation(97)])
        return random_split(mixed, [77, 20])

    def train_dataset(self) -> Dataset[Any]:
        return self._splits()[0]

    def eval_dataset(self) -> Any:
        return Subset(super()._data(2), torch.randperm(97)[:20].tolist())


SPLIT = {"task": {"target": "data_cases:Split"}}


def config(**more: Any) -> Config:
    values = {"data": {"global_batch_size": 8, "micro_batch_size": 4}, "train": {"epochs": 1}, **more}
    return Config.from_dict({"name": "run", **values})


def main() -> None:
    folder = Path(sys.argv[1])
    world = World.detect()
    outcomes: dict[str, Any] = {}

    def attempt(name: str, make: Any, **more: Any) -> None:
        try:
            summary = Trainer(make(), config(**more), folder / name).fit()
            outcomes[name] = f"trained {summary['steps']} steps"
        except DistribError as error:
            outcomes[name] = str(error)
        (folder / f"outcomes-{world.rank}.json").write_text(json.dumps(outcomes))

    attempt("unequal", lambda: Parts((51, 50)))
    attempt("unequal-steps", lambda: Parts((51, 50)), train={"steps": 3})
    attempt("parts", lambda: Parts((48, 48)))
    attempt("half-written", lambda: Cached(str(folder / "slow.jsonl")))
    attempt("prepared", lambda: Prepared(str(folder / "cache.jsonl")))
    attempt("refused", Refusing)
    attempt("split", lambda: build.task(config(**SPLIT)), **SPLIT)


if __name__ == "__main__":
    main()
