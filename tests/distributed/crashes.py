"""Kills a run on two ranks at random moments, and starts it again, for many seeds. test_crashes runs this program.

Ranks are forked from a process that has imported everything, so a start takes a tenth of a second.
"""

import json
import os
import random
import shutil
import signal
import socket
import sys
import time
from pathlib import Path
from typing import Any

import accelerate  # noqa: F401
import matplotlib.pyplot  # noqa: F401
import torch
from conftest import lines, tensors
from tasks import Masked

from distrib import Config, Trainer
from distrib.decision_options import BestConfig
from distrib.errors import DistribError
from distrib.run_folder import checkpoint, decisions
from distrib.run_folder.folder import RunDir
from distrib.run_folder.manifest import step_of, steps_of
from distrib.run_folder.verify import verify_run

RANKS, STEPS = 2, 40
CONFIG: dict[str, Any] = {
    "seed": 1,
    "data": {"global_batch_size": 16, "micro_batch_size": 4},
    "train": {"steps": STEPS, "max_grad_norm": 1.0, "ema": {"decay": 0.9, "every_steps": 2, "start_step": 5}},
    "eval": {"every_steps": 5},
    "checkpoint": {"every_steps": 3, "keep": 2, "best": {"metric": "eval/ema/loss"}},
}


def start(folder: Path, task: type[Masked] = Masked, ranks: int = RANKS) -> list[int]:
    """Fork the ranks, and return their process ids."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    pids = []
    for rank in range(ranks):
        pid = os.fork()
        if pid == 0:
            os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(ranks))
            os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
            silent = os.open(os.devnull, os.O_WRONLY)
            os.dup2(silent, 1)
            os.dup2(silent, 2)
            try:
                Trainer(task(dropout=0.1), Config.from_dict(CONFIG), folder).fit()
            except (DistribError, RuntimeError):  # it lost the other rank
                os._exit(1)
            os._exit(0)
        pids.append(pid)
    return pids


def wait(pids: list[int]) -> list[int]:
    return [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]


def killed(
    folder: Path, steps: int, moment: float, ranks: list[int], task: type[Masked] = Masked, of: int = RANKS
) -> None:
    """Start the run on `of` ranks, and kill these `moment` seconds after `steps` steps. Then kill the others, as a
    launcher does."""
    pids, ledger = start(folder, task, of), folder / "steps.jsonl"
    deadline = time.monotonic() + 60
    while not ledger.exists() or ledger.read_bytes().count(b"\n") < steps:
        assert time.monotonic() < deadline, f"it does not reach step {steps}"
        time.sleep(0.001)
    time.sleep(moment)
    for rank in ranks:
        os.kill(pids[rank], signal.SIGKILL)
    time.sleep(0.05)
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
    wait(pids)


def check_best(folder: Path) -> None:
    """The best checkpoint is there, by the evaluations up to the newest checkpoint, after which the run goes on."""
    run = RunDir(folder)
    newest = next(steps_of(run.checkpoints), None)
    if newest is not None:
        before = [line for line in decisions.read_evaluations(run) if line["step"] <= step_of(newest)]
        if found := decisions.records(before, Config.from_dict(CONFIG).checkpoint.best or BestConfig()):
            checkpoint.verify(run.checkpoints / f"step-{found[-1][0]:08d}")


def main() -> None:
    base, seeds = Path(sys.argv[1]), int(sys.argv[2])
    torch.set_num_threads(1)
    Trainer(Masked(), Config.from_dict(CONFIG), base / "not-begun")  # to trigger torch's late imports
    assert wait(start(base / "undisturbed")) == [0] * RANKS
    expected = tensors(base / "undisturbed")
    best, places = json.loads((base / "undisturbed" / "summary.json").read_text())["best"], []
    for seed in range(seeds):
        chance, folder = random.Random(seed), base / "killed"
        steps = 0
        for _ in range(chance.choice([1, 1, 2])):
            steps = chance.randint(steps, STEPS - 1)
            killed(folder, steps, chance.uniform(0, 0.02), chance.choice([[0], [1], [0, 1]]))
            check_best(folder)
        assert wait(start(folder)) == [0] * RANKS, f"seed {seed}: it did not go on"
        verify_run(folder)
        check_best(folder)
        assert len(lines(folder)) == STEPS
        assert json.loads((folder / "summary.json").read_text())["best"] == best
        found = tensors(folder)
        for name, value in expected.items():
            assert (found[name] == value).all(), f"seed {seed}: {name} is another"
        places += [event["step"] for event in lines(folder, "events.jsonl") if event["event"] == "resumed"]
        shutil.rmtree(folder)
    print(json.dumps(places))


if __name__ == "__main__":
    main()
