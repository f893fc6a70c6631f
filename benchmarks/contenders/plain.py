"""The DDP loop of the PyTorch tutorial: pytorch.org/tutorials/beginner/ddp_series_multigpu.html

It saves snapshots as in the next tutorial, ddp_series_fault_tolerance.html, with the optimizer and the step in
addition.
"""

from itertools import islice
from pathlib import Path

import torch
import torch.distributed as dist
from numbered import Numbered
from saves import Part, Saves
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grad_norm_
from torch.utils.data import DataLoader, DistributedSampler, Subset
from turns import Length, Turns
from workload import Workload


def run(work: Workload, length: Length, folder: Path) -> None:
    dist.init_process_group("gloo")
    rank, world_size = dist.get_rank(), dist.get_world_size()
    batch_size = work.global_batch_size // world_size
    sampler = DistributedSampler(work.train, shuffle=False)
    loader = DataLoader(work.train, batch_size, sampler=sampler, drop_last=True)
    own = range(rank, len(work.eval), world_size)
    eval_loader = DataLoader(Subset(work.eval, own), batch_size)
    module = work.model()
    model = DistributedDataParallel(module) if world_size > 1 else module
    optimizer = work.optimizer(model.parameters())
    turns = Turns(length, rank)

    def evaluate() -> float:
        module.eval()
        total = torch.zeros(2, dtype=torch.float64)
        with torch.no_grad():
            for batch in eval_loader:
                size = len(batch[0])
                total += torch.tensor([work.loss(module(work.inputs(batch)), batch).item() * size, size])
        dist.all_reduce(total)
        return (total[0] / total[1]).item()

    epoch = 0
    while not turns.over:
        sampler.set_epoch(epoch)
        for batch in loader:
            optimizer.zero_grad()
            output = model(work.inputs(batch))
            loss = work.loss(output, batch)
            loss.backward()
            if work.max_grad_norm is not None:
                clip_grad_norm_(model.parameters(), work.max_grad_norm)
            optimizer.step()
            turns.stepped(loss.item)
            if turns.over:
                break
        epoch += 1
    turns.finish(evaluate)
    dist.destroy_process_group()


def save(work: Numbered, part: Part) -> None:
    dist.init_process_group("gloo")
    rank, world_size = dist.get_rank(), dist.get_world_size()
    saves = Saves(work, rank, part)
    sampler = DistributedSampler(work.train)
    loader = DataLoader(work.train, work.global_batch_size // world_size, sampler=sampler, drop_last=True)
    model = DistributedDataParallel(work.model())
    optimizer = work.optimizer(model.parameters())
    path, step = part.folder / "snapshot.pt", 0
    if part.resumed:
        snapshot = torch.load(path)
        model.module.load_state_dict(snapshot["model"])
        optimizer.load_state_dict(snapshot["optimizer"])
        step = snapshot["step"]
    epoch, seen = divmod(step, len(loader))
    sampler.set_epoch(epoch)
    for batch in islice(loader, seen, None):
        optimizer.zero_grad()
        loss = work.loss(model(work.inputs(batch)), batch)
        loss.backward()
        optimizer.step()
        step += 1
        saves.stepped()
        if saves.due:
            saves.asked()
            if rank == 0:
                snapshot = {"model": model.module.state_dict(), "optimizer": optimizer.state_dict(), "step": step}
                torch.save(snapshot, path)
            dist.barrier()
            saves.saved()


def renumber(folder: Path, step: int) -> None:
    """Change a checkpoint so that it claims to be made after `step` steps."""
    snapshot = torch.load(folder / "snapshot.pt")
    torch.save({**snapshot, "step": step}, folder / "snapshot.pt")
