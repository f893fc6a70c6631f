"""`distrib verify`: checks that the files of a run folder match its config and each other."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distrib.config import Config
from distrib.data.order import Order
from distrib.errors import CheckpointError, DamagedFileError, LedgerError, and_more
from distrib.plan import RunPlan
from distrib.run_folder import checkpoint, decisions, formats, ledger, orders, repair
from distrib.run_folder.files import read_lines
from distrib.run_folder.folder import RunDir
from distrib.run_folder.manifest import steps_of

_MOST_SHOWN = 5


@dataclass(frozen=True)
class Verified:
    """The counts of what was verified. `set_aside`: damaged files that a resume has renamed. `unknown`: steps whose
    samples do not follow from the run folder alone."""

    steps: int
    of_steps: int  # number of steps in the config, or after which the run has stopped
    samples: int
    checkpoints: int
    set_aside: list[str]
    unknown: int = 0


def verify_run(path: Path, order: Order | None = None) -> Verified:
    """Compare each line of the ledger with the data order of the config, and each checkpoint with the ledger.

    `order`: that of a run with weights, which the run folder does not hold. Without it, their samples are not compared.
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
    steps, in_order, unknown = min(chains), 0, 0
    order = order or orders.recorded(run, plan, config, [manifest for _, manifest in manifests])
    try:
        for line in ledger.walk(run.steps, run.anchors()):
            problem = line.problem
            if line.entry is not None and line.entry["step"] >= steps:
                steps = line.entry["step"] + 1
                chains[steps] = line.entry.get("chain", "")
                in_order += 1
                expected = None if order is None else orders.digest_of(order, plan, line.entry["step"])
                unknown += expected is None
                problem = problem or _check_position(line.entry, plan, expected)
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
    return Verified(steps, end, (in_order - unknown) * plan.global_batch_size, len(manifests), aside, unknown)


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


def _check_position(entry: dict[str, Any], plan: RunPlan, expected: str | None) -> str | None:
    """Compare the samples and epoch of a ledger line with the config. Return what is wrong, or None. `expected`: the
    digest of the samples; None if it is not known."""
    step = entry["step"]
    if expected is not None and entry["samples"] != expected:
        return f"step {step} read samples with the digest {entry['samples']}; by the config it is {expected}"
    if entry["epoch"] != plan.epoch(step):
        return f"step {step} is in epoch {plan.epoch(step)}, not {entry['epoch']}"
    return None
