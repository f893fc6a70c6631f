"""Run as a member by `distrib launch`: evaluates sets of 1 to 39 samples, and writes what rank 0 found."""

import json
import sys
from pathlib import Path

import torch
from tasks import Numbered

from distrib import World
from distrib.training.engine import Engine
from distrib.training.evaluation import evaluate

world = World.detect()
world.connect()
found = {}
for samples in range(1, 40):
    task = Numbered(samples)
    torch.manual_seed(0)
    engine = Engine(world, task.model())
    for batch_size in (1, 4, 7):
        metrics = evaluate(engine, task, task.eval_dataset(), batch_size)
        found[f"{samples} in batches of {batch_size}"] = {key: value.hex() for key, value in metrics.items()}
if world.is_rank_0:
    Path(sys.argv[1]).write_text(json.dumps(found))
world.wait_for_all()
