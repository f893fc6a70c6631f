"""Kills runs with other orders of samples, and starts them again on the same and on other numbers of processes.

test_crashes runs this program: `data_crashes.py FOLDER SEEDS TASK`.
"""

import json
import random
import shutil
import sys
from pathlib import Path

import data_tasks
import numpy as np
import torch
from conftest import lines, losses, tensors
from crashes import CONFIG, RANKS, STEPS, killed, start, wait

from distrib import Config, Trainer
from distrib.run_folder.verify import verify_run
from distrib.training import build


def main() -> None:
    base, seeds, task = Path(sys.argv[1]), int(sys.argv[2]), getattr(data_tasks, sys.argv[3])
    torch.set_num_threads(1)
    config = Config.from_dict(CONFIG)
    Trainer(task(), config, base / "not-begun")  # to trigger torch's late imports
    _, order = build.train_dataset(task(), config)
    undisturbed = base / "undisturbed"
    assert wait(start(undisturbed, task)) == [0] * RANKS
    worlds, expected = [], tensors(undisturbed)
    for seed in range(seeds):
        chance, folder = random.Random(seed), base / "killed"
        world, then = ((RANKS, RANKS), (RANKS, 1), (4, RANKS), (1, 4))[seed % 4]
        killed(folder, chance.randint(4, STEPS - 1), chance.uniform(0, 0.02), [chance.randrange(world)], task, world)
        assert wait(start(folder, task, then)) == [0] * then, f"seed {seed}: it did not go on"
        assert verify_run(folder, order).samples == STEPS * 16
        assert [line["samples"] for line in lines(folder)] == [line["samples"] for line in lines(undisturbed)]
        np.testing.assert_allclose(losses(folder), losses(undisturbed), rtol=1e-5)
        if (world, then) == (RANKS, RANKS):
            found = tensors(folder)
            for name, value in expected.items():
                assert (found[name] == value).all(), f"seed {seed}: {name} is another"
        worlds.append([world, then])
        shutil.rmtree(folder)
    print(json.dumps(worlds))


if __name__ == "__main__":
    main()
