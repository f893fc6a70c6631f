"""Which checkpoint a run goes on from: the newest that is whole and that the ledger leads to."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from distrib.errors import CheckpointError, ConfigError
from distrib.state import checkpoint, ledger
from distrib.state.run_dir import RunDir
from distrib.world import World


@dataclass(frozen=True)
class Found:
    """A checkpoint, with its manifest; and what is wrong with the newer ones."""

    path: Path
    manifest: dict[str, Any]
    passed_over: list[str] = field(default_factory=list)


def newest_whole(run: RunDir, world: World) -> Found | None:
    """None where there is no checkpoint at all. The ranks share the reading, and all find the same. Collective.

    Raises CheckpointError where there are some, and none of them can be used.
    """
    passed_over: list[str] = []
    for path in world.on_rank_0(lambda: list(checkpoint.steps_of(run.checkpoints))):
        if not (problem := _problem(path, world, run)):
            return Found(path, checkpoint.read_manifest(path), passed_over)
        passed_over.append(problem)
    if passed_over:
        raise CheckpointError(f"{run.path}: none of its checkpoints can be used: {'; '.join(passed_over)}")
    return None


def whole(path: Path, world: World, run: RunDir | None = None) -> Found:
    """This checkpoint, to which the ledger of `run` leads. Raises CheckpointError. Collective."""
    if problem := _problem(path, world, run):
        raise CheckpointError(problem)
    return Found(path, checkpoint.read_manifest(path))


def named(resume: str, run: RunDir, fork: bool) -> tuple[Path | None, dict[str, Any] | None]:
    """The checkpoint that `--resume` names, if it does, and the origin of a run that `--fork`s from it.

    Raises ConfigError, CheckpointError.
    """
    if resume in ("auto", "never"):
        if fork:
            raise ConfigError("--fork: needs a checkpoint to begin from, --resume PATH --fork")
        return None, None
    path = Path(resume)
    if not (path / checkpoint.MANIFEST).exists():
        raise ConfigError(f"--resume: {resume} is no checkpoint; give auto, never, or a folder RUN/checkpoints/step-…")
    own = path.resolve().parent == run.checkpoints.resolve()
    if own and fork:
        raise ConfigError(f"--fork: {resume} is a checkpoint of the run folder itself; choose another with --run-dir")
    if not own and not fork:
        raise ConfigError(f"--resume: {resume} is of another run than {run.path}; --fork begins a new run from it")
    manifest = checkpoint.read_manifest(path)
    origin = {"path": str(path.resolve()), "step": manifest["step"], "chain": manifest["chain"]}
    return path, origin if fork else None


def require_steps_left(origin: dict[str, Any] | None, num_steps: int) -> None:
    """Raises ConfigError if a run that begins at `origin` would have no step to make."""
    if origin is not None and num_steps <= origin["step"]:
        raise ConfigError(
            f"--fork: the run has {num_steps} steps, and {origin['path']} already has {origin['step']} done; set "
            f"train.steps, or train.epochs, to more than {origin['step']} steps"
        )


def _problem(path: Path, world: World, run: RunDir | None) -> str | None:
    """The first that a rank finds wrong in its share of the files, or rank 0 in the ledger."""
    problem = None
    try:
        manifest = checkpoint.verify(path, world.rank, world.world_size)
        if world.is_rank_0 and run is not None:
            chain = ledger.chain_after(run.steps, manifest["step"], run.beginning())
            if chain != manifest["chain"]:
                problem = f"{path}: {run.steps.name} does not lead to it"
    except CheckpointError as error:
        problem = str(error)
    return next((found for found in world.from_all(problem) if found), None)
