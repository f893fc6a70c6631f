"""transformers.Trainer, without its work besides training: huggingface.co/docs/transformers/trainer"""

import json
import warnings
from pathlib import Path
from typing import Any

import torch.distributed as dist
from numbered import Numbered
from saves import Part, Saves
from torch import Tensor, nn
from torch.utils.data import Sampler, SequentialSampler, default_collate
from transformers import Trainer, TrainerCallback, TrainerControl, TrainingArguments
from turns import Length, Turns
from workload import LEARNING_RATE, WEIGHT_DECAY, Workload


class WithLoss(nn.Module):
    """Returns the loss as part of the output, as the models for transformers.Trainer do."""

    def __init__(self, work: Workload) -> None:
        super().__init__()
        self.work = work
        self.model = work.model()

    def forward(self, **tensors: Tensor) -> dict[str, Tensor]:
        batch = list(tensors.values())
        return {"loss": self.work.loss(self.model(self.work.inputs(batch)), batch)}


class Unshuffled(Trainer):
    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[int]:
        return SequentialSampler(train_dataset or self.train_dataset)

    def compute_loss(self, model: nn.Module, inputs: Any, *arguments: Any, **options: Any) -> Any:
        result = super().compute_loss(model, inputs, *arguments, **options)
        self.latest = result[0] if isinstance(result, tuple) else result
        return result


class Report(TrainerCallback):
    def __init__(self, turns: Turns) -> None:
        self.turns = turns

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.turns.stepped(lambda: self.trainer.latest.item())


def collate(samples: list[tuple[Tensor, ...]]) -> dict[str, Tensor]:
    return {f"part_{number}": part for number, part in enumerate(default_collate(samples))}


def training_arguments(work: Workload, folder: Path, **chosen: Any) -> TrainingArguments:
    warnings.simplefilter("ignore")
    arguments = TrainingArguments(
        str(folder),
        use_cpu=True,
        per_device_train_batch_size=work.global_batch_size,
        learning_rate=LEARNING_RATE,
        weight_decay=WEIGHT_DECAY,
        lr_scheduler_type="constant",
        max_grad_norm=work.max_grad_norm or 0.0,
        save_strategy="no",
        logging_strategy="no",
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_pin_memory=False,
        dataloader_drop_last=True,
        prediction_loss_only=True,
        ddp_find_unused_parameters=False,
        label_names=["part_0"],
        **chosen,
    )
    size = work.global_batch_size // arguments.world_size
    arguments.per_device_train_batch_size = arguments.per_device_eval_batch_size = size
    return arguments


def run(work: Workload, length: Length, folder: Path) -> None:
    arguments = training_arguments(work, folder, max_steps=length.total)
    turns = Turns(length, arguments.process_index)
    report = Report(turns)
    trainer = Unshuffled(
        WithLoss(work),
        arguments,
        data_collator=collate,
        train_dataset=work.train,
        eval_dataset=work.eval,
        callbacks=[report],
    )
    report.trainer = trainer
    trainer.train()
    turns.finish(lambda: float(trainer.evaluate().get("eval_loss", float("nan"))))
    if dist.is_initialized():
        dist.destroy_process_group()


class Save(TrainerCallback):
    def __init__(self, saves: Saves) -> None:
        self.saves = saves

    def on_step_end(self, _: Any, __: Any, control: TrainerControl, **___: Any) -> None:
        self.saves.stepped()
        if self.saves.due:
            control.should_save = True
            self.saves.asked()

    def on_save(self, *_: Any, **__: Any) -> None:
        self.saves.saved()


def save(work: Numbered, part: Part) -> None:
    arguments = training_arguments(work, part.folder, num_train_epochs=1)
    saves = Saves(work, arguments.process_index, part)
    trainer = Trainer(
        WithLoss(work), arguments, data_collator=collate, train_dataset=work.train, callbacks=[Save(saves)]
    )
    trainer.train(resume_from_checkpoint=part.resumed)


def renumber(folder: Path, step: int) -> None:
    """Change a checkpoint so that it claims to be made after `step` steps."""
    path = next(folder.glob("checkpoint-*")).rename(folder / f"checkpoint-{step}")
    state = json.loads((path / "trainer_state.json").read_text())
    (path / "trainer_state.json").write_text(json.dumps({**state, "global_step": step}))
