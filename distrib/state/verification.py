"""`distrib verify`: is what lies in the run folder the run that its config means?"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from distrib.config import Config
from distrib.data.order import digest, sample_indices
from distrib.errors import LedgerError
from distrib.plan import RunPlan
from distrib.state import checkpoint
from distrib.state.ledger import link
from distrib.state.run_dir import RunDir


@dataclass(frozen=True)
class Verified:
    """What was found in order."""

    steps: int
    of_steps: int  # that the config means
    samples: int
    checkpoints: int


def verify_run(path: Path) -> Verified:
    """Compare each line of the ledger with the order that the config means, and each checkpoint with the ledger.

    Raises LedgerError for the first line that is not as it must be, CheckpointError for a checkpoint that is damaged,
    RunDirError and ConfigError where it is no run folder.
    """
    run = RunDir(path)
    config = run.read_config()
    plan = RunPlan.create(config, 1, run.num_samples())
    manifests = [(at, checkpoint.verify(at)) for at in checkpoint.steps_of(run.checkpoints)]
    first, chain = run.beginning()
    steps = first
    chains: dict[int, str] = dict.fromkeys((manifest["step"] for _, manifest in manifests), chain)
    if run.steps.exists():
        with run.steps.open(encoding="utf-8", errors="replace", newline="\n") as file:
            for number, text in enumerate(file, start=1):
                chain = _check(text, steps, chain, plan, config, f"{run.steps} line {number}")
                steps += 1
                if steps in chains:
                    chains[steps] = chain
    for at, manifest in manifests:
        if manifest["step"] > steps or chains[manifest["step"]] != manifest["chain"]:
            raise LedgerError(f"{at}: the ledger's chain after step {manifest['step']} is not the one it was saved at")
    if run.summary.exists() and steps != plan.num_steps:
        raise LedgerError(f"{run.steps}: ends after {steps} steps, and the run has ended after {plan.num_steps}")
    return Verified(steps, plan.num_steps, (steps - first) * plan.global_batch_size, len(manifests))


def _check(text: str, step: int, chain: str, plan: RunPlan, config: Config, where: str) -> str:
    """The chain after a line, which must be that of `step`."""
    body, _, tail = text.partition(',"chain":"')
    try:
        line: dict[str, Any] = json.loads(text)
        found = int(line["step"])
    except (ValueError, KeyError, TypeError):
        raise LedgerError(f"{where}: cannot be read as a step") from None
    if found != step:
        what = "is missing before it" if found > step else "stands there already"
        raise LedgerError(f"{where}: is of step {found}, where step {step} belongs; step {min(found, step)} {what}")
    if tail != f'{(chain := link(chain, body + "}"))}"}}\n':
        raise LedgerError(f"{where}: the chain breaks: this line (step {step}), or one before it, was changed")
    expected = _samples_of(step, plan, config.seed)
    if line.get("samples") != expected:
        raise LedgerError(
            f"{where}: step {step} read samples with the digest {line.get('samples')}, the config means {expected}"
        )
    if line.get("epoch") != plan.epoch(step):
        raise LedgerError(f"{where}: step {step} lies in epoch {plan.epoch(step)}, not {line.get('epoch')}")
    return chain


def _samples_of(step: int, plan: RunPlan, seed: int) -> str:
    """The digest of what a step reads, on however many ranks."""
    positions = np.arange(plan.global_batch_size, dtype=np.uint64) + np.uint64(step * plan.global_batch_size)
    # A stream's samples have no index but their place.
    indices = positions if plan.num_samples is None else sample_indices(positions, plan.num_samples, seed)
    return f"{digest(positions, indices):016x}"
