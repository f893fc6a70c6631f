"""A LightningModule under Trainer, without its work besides training: lightning.ai/docs"""

import logging
import warnings
from pathlib import Path
from typing import Any

import pytorch_lightning as lightning
import torch
import torch.distributed as dist
from lightning_fabric.plugins.environments import TorchElasticEnvironment
from numbered import Numbered
from saves import Part, Saves
from torch import Tensor
from torch.utils.data import DataLoader, DistributedSampler
from turns import Length, Turns
from workload import SEED, Workload


class Module(lightning.LightningModule):
    def __init__(self, work: Workload) -> None:
        super().__init__()
        self.work = work
        self.model = work.model()

    def training_step(self, batch: Any, _: int) -> Tensor:
        return self.work.loss(self.model(self.work.inputs(batch)), batch)

    def validation_step(self, batch: Any, _: int) -> None:
        loss = self.work.loss(self.model(self.work.inputs(batch)), batch)
        self.log("loss", loss, sync_dist=True, batch_size=len(batch[0]))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return self.work.optimizer(self.parameters())


class Report(lightning.Callback):
    def __init__(self, turns: Turns) -> None:
        self.turns = turns

    def on_train_batch_end(self, _: Any, __: Any, outputs: Any, *___: Any) -> None:
        self.turns.stepped(outputs["loss"].item)


def trainer(work: Workload, world_size: int, **chosen: Any) -> lightning.Trainer:
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    return lightning.Trainer(
        accelerator="cpu",
        devices=world_size,
        strategy="ddp" if world_size > 1 else "auto",
        gradient_clip_val=work.max_grad_norm,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
        **chosen,
    )


def run(work: Workload, length: Length, folder: Path) -> None:
    environment = TorchElasticEnvironment()
    world_size = environment.world_size()
    turns = Turns(length, environment.global_rank())
    own_sampler = {"use_distributed_sampler": False}  # theirs shuffles
    fitting = trainer(work, world_size, max_steps=length.total, callbacks=[Report(turns)], **own_sampler)
    batch_size = work.global_batch_size // world_size
    module = Module(work)
    train_sampler, eval_sampler = (
        DistributedSampler(dataset, world_size, environment.global_rank(), shuffle=False)
        for dataset in (work.train, work.eval)
    )
    fitting.fit(module, DataLoader(work.train, batch_size, sampler=train_sampler, drop_last=True))
    fitting.limit_val_batches = 1.0
    eval_loader = DataLoader(work.eval, batch_size, sampler=eval_sampler)
    turns.finish(lambda: fitting.validate(module, eval_loader, verbose=False)[0]["loss"])
    if dist.is_initialized():
        dist.destroy_process_group()


class Save(lightning.Callback):
    def __init__(self, saves: Saves, path: Path) -> None:
        self.saves, self.path = saves, path

    def on_train_batch_end(self, trainer: lightning.Trainer, *_: Any) -> None:
        self.saves.stepped()
        if self.saves.due:
            self.saves.asked()
            trainer.save_checkpoint(self.path)
            self.saves.saved()


def save(work: Numbered, part: Part) -> None:
    batch_size = work.global_batch_size // TorchElasticEnvironment().world_size()
    fit(work, part, DataLoader(work.train, batch_size, shuffle=True, drop_last=True))


def fit(work: Numbered, part: Part, loader: DataLoader) -> None:
    lightning.seed_everything(SEED, verbose=False)
    environment = TorchElasticEnvironment()
    saves = Saves(work, environment.global_rank(), part)
    path = part.folder / "last.ckpt"
    fitting = trainer(work, environment.world_size(), max_epochs=1, callbacks=[Save(saves, path)])
    fitting.fit(Module(work), loader, ckpt_path=path if part.resumed else None)


def renumber(folder: Path, step: int) -> None:
    """Change a checkpoint so that it claims to be made after `step` steps."""
    checkpoint = torch.load(folder / "last.ckpt")
    further = step - checkpoint["global_step"]
    loops = checkpoint["loops"]["fit_loop"]
    loops["epoch_loop.state_dict"]["_batches_that_stepped"] += further
    for progress in ("epoch_loop.batch_progress", "epoch_loop.automatic_optimization.optim_progress"):
        _add(loops[progress], further)
    torch.save({**checkpoint, "global_step": step}, folder / "last.ckpt")


def _add(progress: dict[str, Any], further: int) -> None:
    for key, value in progress.items():
        if isinstance(value, dict):
            _add(value, further)
        elif not isinstance(value, bool):
            progress[key] = value + further
