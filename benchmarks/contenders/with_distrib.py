"""distrib's own Trainer with everything that a user's run has: ledger, progress, checks between ranks, checkpoints."""

from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from numbered import Numbered, Numbers
from saves import EVERY, Part, Saves
from torch import Tensor, nn
from turns import Length, Turns
from workload import LEARNING_RATE, SEED, WEIGHT_DECAY, Workload

from distrib import Config, Loss, Task, Trainer
from distrib.data.loader import Window
from distrib.processes.world import World
from distrib.run_folder.async_save import Saver
from distrib.training import build
from distrib.training.engine import Engine
from distrib.training.pending_step import PendingStep


class Timed(Trainer):
    turns: Turns

    def _windows(self, engine: Engine) -> Iterator[Window]:
        for number, window in enumerate(super()._windows(engine)):
            if number:
                self.turns.stepped(self._loss)
            yield window

    def _loss(self) -> float:
        """Return the last step's loss on all ranks. Only the checked steps read it, before the next step."""
        self.step_log.flush()
        return self.run_log.metrics["train/loss"]

    def _evaluate(self, engine: Engine, steps_done: int) -> None:
        self.turns.stepped(self._loss)
        self.turns.finish(lambda: build.evaluate(engine, self.task, self.eval_dataset, self.config)["eval/loss"])


def config(work: Workload, world: World, steps: int, **sections: Any) -> Config:
    return Config.from_dict(
        {
            "name": "benchmark",
            "seed": SEED,
            "data": {
                "global_batch_size": work.global_batch_size,
                "micro_batch_size": work.global_batch_size // world.world_size,
            },
            "optim": {"name": "adamw", "lr": LEARNING_RATE, "weight_decay": WEIGHT_DECAY},
            "train": {"steps": steps, "max_grad_norm": work.max_grad_norm},
            "tracking": {"wandb": "off"},
            **sections,
        }
    )


def run(work: Workload, length: Length, folder: Path) -> None:
    world = World.detect()
    trainer = Timed(work.task, config(work, world, length.total), folder / "run")
    trainer.turns = Turns(length, world.rank)
    trainer.fit()


class Regression(Task):
    def __init__(self, work: Numbered) -> None:
        self.work = work

    def train_dataset(self) -> Numbers:
        return self.work.train

    def model(self) -> nn.Module:
        return self.work.network()

    def forward(self, model: nn.Module, batch: Any) -> Tensor:
        return model(self.work.inputs(batch))

    def loss(self, output: Tensor, batch: Any) -> Loss:
        return Loss(self.work.loss(output, batch) * len(output), len(output))


def note_steps(trainer: Trainer, engine: Engine, windows: Iterator[Window]) -> None:
    """Write ledger lines for these steps, as if they had been made."""
    for window in windows:
        sums = [1.0, 0.0, 64.0, 0.0, 0.0, *[float(window.step % 4096)] * 6]
        trainer.step_log.submit(window.step, PendingStep(sums, 1.0, 0.001, None), engine.clock.seconds())
        trainer.step_log.flush()


class Saving(Trainer):
    """Saves in the background, and waits for it, so that it does not disturb other contenders."""

    saves: Saves
    passed = 0  # steps that nobody makes, which come first
    saver: Saver | None = None  # where a save was just begun

    def _windows(self, engine: Engine) -> Iterator[Window]:
        windows = super()._windows(engine)
        note_steps(self, engine, islice(windows, self.passed))
        for number, window in enumerate(windows):
            if self.saver is not None:
                self.saves.saved(self.saver.wait)
                self.saver = None
            if number:
                self.saves.stepped()
            yield window

    def _is_due(self, every_steps: int, steps_done: int) -> bool:
        self.saves.asked()  # what a save waits for, beside the copying, is part of it
        return super()._is_due(every_steps, steps_done)

    def _save(self, engine: Engine, saver: Saver, steps_done: int) -> None:
        super()._save(engine, saver, steps_done)
        self.saver = saver


def save(work: Numbered, part: Part) -> None:
    world = World.detect()
    saves = Saves(work, world.rank, part)
    steps = len(work.train) // work.global_batch_size
    chosen = config(work, world, steps, checkpoint={"every_steps": EVERY})
    trainer = Saving(Regression(work), chosen, part.folder / "run")
    trainer.saves = saves
    trainer.passed = max(0, part.step - EVERY)
    trainer.fit()
