"""`distrib verify`: checks that the files of a run folder match its config and each other."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from distrib.config import Config
from distrib.data.order import digest, sample_indices
from distrib.errors import CheckpointError, DamagedFileError, LedgerError, and_more
from distrib.plan import RunPlan
from distrib.run_folder import checkpoint, decisions, formats, ledger, repair
from distrib.run_folder.files import read_lines
from distrib.run_folder.folder import RunDir
from distrib.run_folder.manifest import steps_of

_MOST_SHOWN = 5


@dataclass(frozen=True)
class Verified:
    """The counts of what was verified. `set_aside`: damaged files that a resume has renamed."""

    steps: int
    of_steps: int  # number of steps in the config, or after which the run has stopped
    samples: int
    checkpoints: int
    set_aside: list[str]


def verify_run(path: Path) -> Verified:
    """Compare each line of the ledger with the data order of the config, and each checkpoint with the ledger.

    Raises LedgerError with all problems, CheckpointError if only checkpoints have problems, RunDirError if the path is
    not a run folder.
    """
    run = RunDir(path)
    try:
        config = repair.saved_config(run) or run.read_config()
        num_samples = run.num_samples()
    except DamagedFileError as error:
        raise LedgerError(f"{error}; no checkpoint holds a copy, so nothing can be verified") from None
    plan = RunPlan.create(config, 1, num_samples)
    problems = _check_small_files(run, config)
    manifests, damaged = _check_checkpoints(run)
    chains = run.anchors()
    steps, in_order = min(chains), 0
    try:
        for line in ledger.walk(run.steps, run.anchors()):
            problem = line.problem
            if line.entry is not None and line.entry["step"] >= steps:
                steps = line.entry["step"] + 1
                chains[steps] = line.entry.get("chain", "")
                in_order += 1
                problem = problem or _check_position(line.entry, plan, config)
            if problem:
                problems.append(f"{run.steps} line {line.number}: {problem}")
    except DamagedFileError as error:
        problems.append(str(error))
    lost = [(gap["first"], gap["next"]) for gap in run.environment_or_nothing().get("lost_steps", ())]
    problems += [f"{run.steps}: {ledger.steps(*gap)} not there: the file was damaged and set aside" for gap in lost]
    for at, manifest in manifests:
        if chains.get(manifest["step"]) != manifest["chain"]:
            problems.append(f"{at}: the ledger's chain after step {manifest['step']} is not the one it was saved with")
    stopped = decisions.stopped(decisions.read_evaluations(run), config.train.stop)
    end = plan.num_steps if stopped is None else stopped["step"]
    if os.path.lexists(run.summary) and steps != end:
        problems.append(f"{run.steps}: ends after {steps} steps, but the run has ended after {end}")
    if problems or damaged:
        message = and_more(problems + damaged, _MOST_SHOWN, "; ", "; and")
        raise (LedgerError if problems else CheckpointError)(message)
    aside = sorted(file.name for file in path.glob("*.damaged-*"))
    return Verified(steps, end, in_order * plan.global_batch_size, len(manifests), aside)


def _check_small_files(run: RunDir, config: Config) -> list[str]:
    """Return what is wrong with the files other than ledger and checkpoints."""
    problems = [repair.config_damage(run, config), repair.environment_damage(run)]
    found = [problem for problem in problems if problem]
    found += repair.evaluations_damage(run)
    for _ in read_lines(run.events, formats.EVENT, found):
        pass
    try:
        run.read_summary()
    except DamagedFileError as error:
        found.append(str(error))
    return found


def _check_checkpoints(run: RunDir) -> tuple[list[tuple[Path, dict[str, Any]]], list[str]]:
    """Return the valid checkpoints with their manifests, and what is wrong with the others."""
    whole, damaged = [], []
    try:
        for at in steps_of(run.checkpoints):
            try:
                whole.append((at, checkpoint.verify(at)))
            except CheckpointError as error:
                damaged.append(str(error))
    except CheckpointError as error:
        damaged.append(str(error))
    return whole, damaged


def _check_position(entry: dict[str, Any], plan: RunPlan, config: Config) -> str | None:
    """Compare the samples and epoch of a ledger line with the config. Return what is wrong, or None."""
    step = entry["step"]
    expected = _expected_digest(step, plan, config.seed)
    if entry["samples"] != expected:
        return f"step {step} read samples with the digest {entry['samples']}; by the config it is {expected}"
    if entry["epoch"] != plan.epoch(step):
        return f"step {step} is in epoch {plan.epoch(step)}, not {entry['epoch']}"
    return None


def _expected_digest(step: int, plan: RunPlan, seed: int) -> str:
    """Return the digest of the samples of a step, over all ranks."""
    positions = np.arange(plan.global_batch_size, dtype=np.uint64) + np.uint64(step * plan.global_batch_size)
    # A sample of a stream has no index, so its position is used.
    indices = positions if plan.num_samples is None else sample_indices(positions, plan.num_samples, seed)
    return f"{digest(positions, indices):016x}"
