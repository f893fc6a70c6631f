"""A LightningModule under Trainer, with what takes time beside training switched off: lightning.ai/docs"""

import logging
import warnings
from pathlib import Path
from typing import Any

import pytorch_lightning as lightning
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.data import DataLoader, DistributedSampler
from turns import Length, Turns
from workload import Workload


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


def run(work: Workload, length: Length, folder: Path) -> None:
    from lightning_fabric.plugins.environments import TorchElasticEnvironment

    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    environment = TorchElasticEnvironment()
    world_size = environment.world_size()
    turns = Turns(length, environment.global_rank())
    trainer = lightning.Trainer(
        accelerator="cpu",
        devices=world_size,
        strategy="ddp" if world_size > 1 else "auto",
        max_steps=length.total,
        gradient_clip_val=work.max_grad_norm,
        callbacks=[Report(turns)],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
        use_distributed_sampler=False,  # its own shuffles
    )
    batch_size = work.global_batch_size // world_size
    module = Module(work)
    train_sampler, eval_sampler = (
        DistributedSampler(dataset, world_size, environment.global_rank(), shuffle=False)
        for dataset in (work.train, work.eval)
    )
    trainer.fit(module, DataLoader(work.train, batch_size, sampler=train_sampler, drop_last=True))
    trainer.limit_val_batches = 1.0
    eval_loader = DataLoader(work.eval, batch_size, sampler=eval_sampler)
    turns.finish(lambda: trainer.validate(module, eval_loader, verbose=False)[0]["loss"])
    if dist.is_initialized():
        dist.destroy_process_group()
