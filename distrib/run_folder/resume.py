"""Chooses the checkpoint that a run resumes from: the newest valid one whose step the ledger leads to."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from distrib.errors import CheckpointError, ConfigError, and_more
from distrib.processes.world import World
from distrib.run_folder import checkpoint, decisions, ledger
from distrib.run_folder.folder import RunDir
from distrib.run_folder.manifest import MANIFEST, read_manifest, step_of, steps_of

_MOST_SHOWN = 10


@dataclass(frozen=True)
class ResumePoint:
    """The checkpoint to resume from, its manifest, and why newer checkpoints were passed over.

    `led`: whether the ledger leads to it. `ours`: whether it belongs to this run, not to the run it is forked from.
    """

    path: Path
    manifest: dict[str, Any]
    passed_over: list[str] = field(default_factory=list)
    led: bool = True
    ours: bool = True


def latest_valid(run: RunDir, world: World) -> ResumePoint | None:
    """Return the newest valid checkpoint that the ledger leads to. If it leads to none, return the newest valid one.

    Returns None if there is no checkpoint. The ranks share the work of reading, and all return the same. Collective.
    Raises CheckpointError if there are checkpoints, and none is valid.
    """
    passed_over: list[str] = []
    not_led: ResumePoint | None = None
    for path in world.on_rank_0(lambda: list(steps_of(run.checkpoints))):
        if problem := _damage(path, world):
            passed_over.append(problem)
        elif _ledger_leads_to(path, run, world):
            return ResumePoint(path, read_manifest(path), passed_over)
        else:
            not_led = not_led or ResumePoint(path, read_manifest(path), list(passed_over), led=False)
            passed_over.append(f"{path}: {run.steps.name} does not lead to it")
    if not_led is not None:
        return not_led
    if passed_over:
        raise CheckpointError(f"{run.path}: none of its checkpoints can be used: {'; '.join(passed_over)}")
    return None


def where_to_begin(
    run: RunDir, world: World, asked_for: Path | None, origin: dict[str, Any] | None
) -> tuple[ResumePoint | None, bool]:
    """Return the checkpoint that a run begins with, None if with nothing, and whether to leave out its optimizer's
    state. Collective. Raises CheckpointError.

    `asked_for` and `origin`: what `requested` returned.
    """
    if asked_for is not None and origin is None:
        return verified(asked_for, world, run), False
    if (found := latest_valid(run, world)) is not None:
        return found, False
    if (begun_from := world.on_rank_0(run.origin)) is not None:
        return verified(Path(begun_from["path"]), world), begun_from.get("reset_optimizer", False)
    return None, False


def chosen(run: RunDir, world: World, which: str) -> ResumePoint:
    """Return the checkpoint that `--checkpoint` names: newest, best or a step. Collective.

    Raises ConfigError if it names none, CheckpointError if the checkpoint is not there or damaged.
    """
    step = world.on_rank_0(lambda: decisions.chosen_step(run, which))
    if step is None:
        if (found := latest_valid(run, world)) is None:
            raise CheckpointError(f"{run.checkpoints}: no checkpoint there; the run has not saved one yet")
        return found
    path = world.on_rank_0(lambda: _path(run, step, which))
    if problem := _damage(path, world):
        raise CheckpointError(f"{problem}; choose another with --checkpoint")
    return ResumePoint(path, read_manifest(path))


def _path(run: RunDir, step: int, which: str) -> Path:
    """Return the checkpoint of a step. Raises ConfigError."""
    there = {step_of(path): path for path in steps_of(run.checkpoints)}
    if step not in there:
        listed = and_more([str(one) for one in there], _MOST_SHOWN) or "none"
        raise ConfigError(f"--checkpoint {which}: {run.checkpoints} has no checkpoint of step {step}; it has: {listed}")
    return there[step]


def verified(path: Path, world: World, run: RunDir | None = None) -> ResumePoint:
    """Verify a checkpoint, and check whether the ledger of `run` leads to it. Raises CheckpointError. Collective."""
    if problem := _damage(path, world):
        raise CheckpointError(f"{problem}; give another checkpoint with --resume")
    if run is None:
        return ResumePoint(path, read_manifest(path), ours=False)
    return ResumePoint(path, read_manifest(path), led=_ledger_leads_to(path, run, world))


def requested(
    resume: str, run: RunDir, fork: bool, reset_optimizer: bool = False
) -> tuple[Path | None, dict[str, Any] | None]:
    """Return the checkpoint that `--resume` names, or None; and the origin of a run forked from it with `--fork`.

    Raises ConfigError, CheckpointError.
    """
    if reset_optimizer and not fork:
        raise ConfigError("--reset-optimizer: is for a new run that begins from a checkpoint, --resume PATH --fork")
    if resume in ("auto", "never"):
        if fork:
            raise ConfigError("--fork: needs a checkpoint to begin from, --resume PATH --fork")
        return None, None
    path = _newest_in(Path(resume))
    if not (path / MANIFEST).exists():
        raise ConfigError(
            f"--resume: {resume} is not a checkpoint, and there is none in it; give auto, never, a run folder or "
            "RUN/checkpoints/step-…"
        )
    own = path.resolve().parent == run.checkpoints.resolve()
    if own and fork:
        raise ConfigError(f"--fork: {resume} is a checkpoint of the run folder itself; choose another with --run-dir")
    if not own and not fork:
        raise ConfigError(f"--resume: {resume} is of another run than {run.path}; add --fork to start a new run")
    manifest = read_manifest(path)
    origin = {"path": str(path.resolve()), "step": manifest["step"], "chain": manifest["chain"]}
    if reset_optimizer:
        origin["reset_optimizer"] = True
    return path, origin if fork else None


def _newest_in(path: Path) -> Path:
    """Return the newest checkpoint in a run folder or its `checkpoints` that has all its files; else `path` itself.

    Each rank does this on its own, before the ranks have joined. Afterwards they verify the files' contents together.
    """
    if (path / MANIFEST).exists():
        return path
    problems = []
    for folder in (path / "checkpoints", path):
        for found in steps_of(folder):
            try:
                checkpoint.verify(found, contents=False)
            except CheckpointError as error:
                problems.append(str(error))
            else:
                return found
    if problems:
        raise CheckpointError(f"{path}: none of its checkpoints can be used: {'; '.join(problems)}")
    return path


def require_steps_left(origin: dict[str, Any] | None, num_steps: int) -> None:
    """Raise ConfigError if a run that begins at `origin` would have no step left."""
    if origin is not None and num_steps <= origin["step"]:
        raise ConfigError(
            f"--fork: the run has {num_steps} steps, and {origin['path']} already has {origin['step']} done; set "
            f"train.steps, or train.epochs, to more than {origin['step']} steps"
        )


def _damage(path: Path, world: World) -> str | None:
    """Verify a checkpoint, each rank its share of the files. Return the first problem or None. Collective."""
    problem = None
    try:
        checkpoint.verify(path, world.rank, world.world_size)
    except CheckpointError as error:
        problem = str(error)
    return next((found for found in world.all_gather_object(problem) if found), None)


def _ledger_leads_to(path: Path, run: RunDir, world: World) -> bool:
    """Return whether the ledger has the line after which the checkpoint was saved. Collective."""
    manifest = read_manifest(path)
    return world.on_rank_0(
        lambda: ledger.chain_after(run.steps, manifest["step"], run.anchors()) == str(manifest["chain"])
    )
