"""accelerate's idiomatic loop: huggingface.co/docs/accelerate/basic_tutorials/migration

It saves and resumes as in accelerate's examples/by_feature/checkpointing.py.
"""

from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from numbered import Numbered
from saves import Part, Saves
from torch.utils.data import DataLoader
from turns import Length, Turns
from workload import SEED, Workload


def run(work: Workload, length: Length, folder: Path) -> None:
    accelerator = Accelerator(cpu=True)
    batch_size = work.global_batch_size // accelerator.num_processes
    module = work.model()
    model, optimizer, loader, eval_loader = accelerator.prepare(
        module,
        work.optimizer(module.parameters()),
        DataLoader(work.train, batch_size, drop_last=True),
        DataLoader(work.eval, batch_size),
    )
    turns = Turns(length, accelerator.process_index)

    def evaluate() -> float:
        model.eval()
        losses = []
        for batch in eval_loader:
            with torch.no_grad():
                loss = work.loss(model(work.inputs(batch)), batch)
            losses.append(accelerator.gather_for_metrics(loss.repeat(len(batch[0]))))
        return torch.cat(losses).double().mean().item()

    model.train()
    while not turns.over:
        for batch in loader:
            optimizer.zero_grad()
            output = model(work.inputs(batch))
            loss = work.loss(output, batch)
            accelerator.backward(loss)
            if work.max_grad_norm is not None:
                accelerator.clip_grad_norm_(model.parameters(), work.max_grad_norm)
            optimizer.step()
            turns.stepped(loss.item)
            if turns.over:
                break
    turns.finish(evaluate)
    accelerator.end_training()


def save(work: Numbered, part: Part) -> None:
    accelerator = Accelerator(cpu=True)
    saves = Saves(work, accelerator.process_index, part)
    set_seed(SEED)
    module = work.model()
    batch_size = work.global_batch_size // accelerator.num_processes
    model, optimizer, loader = accelerator.prepare(
        module,
        work.optimizer(module.parameters()),
        DataLoader(work.train, batch_size, shuffle=True, drop_last=True),
    )
    step, active = 0, loader
    if part.resumed:
        path = max(part.folder.glob("step_*"), key=lambda path: path.stat().st_ctime)
        accelerator.load_state(path)
        step = int(path.name.removeprefix("step_"))
        active = accelerator.skip_first_batches(loader, step % len(loader))
    model.train()
    for batch in active:
        optimizer.zero_grad()
        loss = work.loss(model(work.inputs(batch)), batch)
        accelerator.backward(loss)
        optimizer.step()
        step += 1
        saves.stepped()
        if saves.due:
            saves.asked()
            accelerator.save_state(part.folder / f"step_{step}")
            saves.saved()


def renumber(folder: Path, step: int) -> None:
    """Change a checkpoint so that it claims to be made after `step` steps."""
    next(folder.glob("step_*")).rename(folder / f"step_{step}")
