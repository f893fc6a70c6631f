"""distrib's own Trainer, with all that a user's run has: ledger, progress, agreement, checkpoint."""

from collections.abc import Iterator
from pathlib import Path

from turns import Length, Turns
from workload import LEARNING_RATE, SEED, WEIGHT_DECAY, Workload

from distrib import Config, Trainer
from distrib.data.loader import Window
from distrib.training import assembly
from distrib.training.engine import Engine
from distrib.world import World


class Timed(Trainer):
    turns: Turns

    def _windows(self, engine: Engine) -> Iterator[Window]:
        for number, window in enumerate(super()._windows(engine)):
            if number:
                self.turns.stepped(self._loss)
            yield window

    def _loss(self) -> float:
        """Of the last step, on all ranks; read before the next, which only the checked steps do."""
        self.account.read()
        return self.record.metrics["train/loss"]

    def _evaluate(self, engine: Engine, steps_done: int) -> None:
        self.turns.stepped(self._loss)
        self.turns.finish(lambda: assembly.evaluate(engine, self.task, self.eval_dataset, self.config)["eval/loss"])


def run(work: Workload, length: Length, folder: Path) -> None:
    world = World.detect()
    config = Config.from_dict(
        {
            "name": "benchmark",
            "seed": SEED,
            "data": {
                "global_batch_size": work.global_batch_size,
                "micro_batch_size": work.global_batch_size // world.world_size,
            },
            "optim": {"name": "adamw", "lr": LEARNING_RATE, "weight_decay": WEIGHT_DECAY},
            "train": {"steps": length.total, "max_grad_norm": work.max_grad_norm},
            "tracking": {"wandb": "off"},
        }
    )
    trainer = Timed(work.task, config, folder / "run")
    trainer.turns = Turns(length, world.rank)
    trainer.fit()
