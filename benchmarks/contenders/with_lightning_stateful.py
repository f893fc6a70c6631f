"""Lightning with torchdata's stateful loader, whose state Lightning restores if a run resumes within an epoch.

The sampler is torchdata's too, because Lightning replaces `shuffle=True` by a sampler whose order changes on resume.
"""

from pathlib import Path

import torch
from lightning_fabric.plugins.environments import TorchElasticEnvironment
from numbered import Numbered
from saves import Part
from torchdata.stateful_dataloader import StatefulDataLoader
from torchdata.stateful_dataloader.sampler import StatefulDistributedSampler
from with_lightning import fit
from with_lightning import renumber as renumber_loops


def save(work: Numbered, part: Part) -> None:
    environment = TorchElasticEnvironment()
    sampler = StatefulDistributedSampler(work.train, environment.world_size(), environment.global_rank())
    batch_size = work.global_batch_size // environment.world_size()
    fit(work, part, StatefulDataLoader(work.train, batch_size, sampler=sampler, drop_last=True))


def renumber(folder: Path, step: int) -> None:
    """Change a checkpoint so that it claims to be made after `step` steps."""
    renumber_loops(folder, step)
    checkpoint = torch.load(folder / "last.ckpt")
    for state in checkpoint["loops"]["fit_loop"]["state_dict"]["combined_loader"]:
        read = state["_sampler_iter_state"]
        batch_size = read["samples_yielded"] // state["_num_yielded"]
        read["samples_yielded"] = read["sampler_state"]["yielded"] = step * batch_size
        state["_sampler_iter_yielded"] = state["_num_yielded"] = step
    torch.save(checkpoint, folder / "last.ckpt")
