"""accelerate's idiomatic loop: huggingface.co/docs/accelerate/basic_tutorials/migration"""

from pathlib import Path

import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader
from turns import Length, Turns
from workload import Workload


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
