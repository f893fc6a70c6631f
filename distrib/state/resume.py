"""Which checkpoint a run goes on from: the newest that is whole and that the ledger leads to."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from distrib.errors import CheckpointError
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
        problems = [problem for problem in world.from_all(_problem(path, run, world)) if problem]
        if not problems:
            return Found(path, checkpoint.read_manifest(path), passed_over)
        passed_over.append(problems[0])
    if passed_over:
        raise CheckpointError(f"{run.path}: none of its checkpoints can be used: {'; '.join(passed_over)}")
    return None


def _problem(path: Path, run: RunDir, world: World) -> str | None:
    """What this rank finds wrong in its share of the files, rank 0 also in the ledger."""
    try:
        manifest = checkpoint.verify(path, world.rank, world.world_size)
    except CheckpointError as error:
        return str(error)
    if world.is_rank_0 and ledger.chain_after(run.steps, manifest["step"]) != manifest["chain"]:
        return f"{path}: {run.steps.name} does not lead to it"
    return None
