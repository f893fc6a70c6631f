"""distrib's own Trainer with everything that a user's run has: ledger, progress, checks between ranks, checkpoints."""

from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from numbered import Numbered, Numbers
from paced import paced
from saves import EVERY, Part, Saves
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook
from turns import Length, Turns
from workload import LEARNING_RATE, SEED, WEIGHT_DECAY, Workload

from distrib import Config, Loss, Task, Trainer
from distrib.data.loader import Window
from distrib.processes.world import World
from distrib.training import build
from distrib.training.step_log import PendingStep


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
    turns = Turns(length, world.rank)
    # One more step follows the blocks, because Trainer evaluates after its last one. The save stays in a block.
    chosen = config(work, world, length.total + 1, checkpoint={"every_steps": length.total})
    trainer = Trainer(work.task, chosen, folder / "run")

    def loss() -> float:
        """Of the last step, on all ranks; read before the next, which only the checked steps do."""
        trainer.step_log.flush()
        return trainer.run_log.metrics["train/loss"]

    def evaluate() -> float:
        return build.evaluate(trainer.engine, trainer.task, trainer.evaluations.sets[""], trainer.config)["eval/loss"]

    def take_turns(windows: Iterator[Window]) -> Iterator[Window]:
        for number, window in enumerate(windows):
            if number:
                turns.stepped(loss)
            if turns.over:
                turns.finish(evaluate)
            yield window

    paced(trainer, take_turns).fit()


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


def note_steps(trainer: Trainer, windows: Iterator[Window]) -> None:
    """Leave the lines of these steps in the ledger, as if they had been made."""
    for window in windows:
        sums = [1.0, 0.0, 64.0, 0.0, 0.0, *[float(window.step % 4096)] * 6]
        trainer.step_log.submit(window.step, PendingStep(sums, 1.0, 0.001, None), trainer.engine.clock.seconds())
        trainer.step_log.flush()


def save(work: Numbered, part: Part) -> None:
    """Saves go on in the background, which is waited for, so that it disturbs nobody."""
    world = World.detect()
    saves = Saves(work, world.rank, part)
    steps = len(work.train) // work.global_batch_size
    chosen = config(work, world, steps, checkpoint={"every_steps": EVERY})
    trainer = Trainer(Regression(work), chosen, part.folder / "run")

    def stop_for_saves(windows: Iterator[Window]) -> Iterator[Window]:
        note_steps(trainer, islice(windows, max(0, part.step - EVERY)))  # steps that nobody makes
        for number, window in enumerate(windows):
            if number and window.step % EVERY == 0:  # a save has begun after the step before
                saves.saved(trainer.saver.wait)
            if number:
                saves.stepped()
            yield window

    # What a save waits for after the weights are updated, beside the copying, is part of it.
    register_optimizer_step_post_hook(lambda *_: saves.asked())
    paced(trainer, stop_for_saves).fit()
