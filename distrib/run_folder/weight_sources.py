"""Finds the tensors of `init.from`: in the checkpoint of a run, in a folder of safetensors files, or in one file."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from distrib.errors import CheckpointError, ConfigError, DistribError, and_more
from distrib.init_options import BEST, NEWEST, InitConfig
from distrib.processes.world import World
from distrib.run_folder import checkpoint, decisions
from distrib.run_folder.folder import RunDir
from distrib.run_folder.manifest import MANIFEST, read_manifest, step_of, steps_of
from distrib.run_folder.tensor_files import OF_TORCH, open_tensors
from distrib.sha256 import sha256_of

_WHOLE, _INDEX, _SAFETENSORS = "model.safetensors", "model.safetensors.index.json", ".safetensors"
_MODEL = "model."  # what the names of weights begin with in a checkpoint
_MOST_SHOWN = 5


@dataclass(frozen=True)
class WeightSource:
    """Tensors by name, each with an entry as in a checkpoint's manifest, and the files that hold them."""

    folder: Path  # of the files
    sizes: dict[str, int]  # of each file, in bytes
    tensors: dict[str, dict[str, Any]]
    step: int | None = None  # of a run's checkpoint

    @property
    def place(self) -> Path:
        """The checkpoint, the folder or the file."""
        alone = self.step is None and len(self.sizes) == 1
        return self.folder / next(iter(self.sizes)) if alone else self.folder

    def digest(self, world: World) -> str:
        """Return the SHA-256 of the file, or of the sorted digests of several files, and check that every rank sees
        them.

        The ranks share the work. If it is a checkpoint, they compare with its manifest. Collective. Raises ConfigError.
        """
        found: dict[str, str] = {}
        problem = None
        try:
            for place, (name, size) in enumerate(self.sizes.items()):
                file = self.folder / name
                if file.stat().st_size != size:
                    raise ConfigError(f"init.from: {file}: {world.name} sees another file than rank 0")
                if place % world.world_size == world.rank:
                    found[name] = sha256_of(file)
        except OSError as error:
            problem = ConfigError(f"init.from: {file}: {world.name} cannot read it: {error.strerror}")
        except ConfigError as error:
            problem = error
        digests: dict[str, str] = {}
        for other, theirs in world.all_gather_object((problem, found)):
            if other is not None:
                raise other
            digests |= theirs
        if self.step is not None:
            expected = read_manifest(self.folder)["files"]
            for name, digest in digests.items():
                if digest != expected[name]["sha256"]:
                    raise ConfigError(
                        f"init.from: {self.folder / name}: damaged: its content is not what the manifest says; choose "
                        "another with init.checkpoint"
                    )
        if len(digests) == 1:
            return next(iter(digests.values()))
        return hashlib.sha256("\n".join(sorted(digests.values())).encode()).hexdigest()


def find(options: InitConfig, step: int | None = None) -> WeightSource:
    """Find the source's tensors. Reads no values. `step`: of a run's checkpoint, in place of `init.checkpoint`.

    Raises ConfigError.
    """
    try:
        path = Path(options.source).expanduser()
        if _is_run(path):
            return _of_run(path, options, step)
        if (path / MANIFEST).is_file():
            found = _of_checkpoint(path)
        elif path.is_dir():
            found = _of_folder(path)
        else:
            found = _of_files(path.parent, [_require_file(path).name])
    except OSError as error:
        raise ConfigError(f"init.from: {options.source}: cannot be read: {error.strerror}") from None
    except (CheckpointError, RuntimeError) as error:  # the latter: ~NAME of an unknown user
        raise ConfigError(f"init.from: {error}") from None
    if options.checkpoint != NEWEST:
        raise ConfigError(
            f"init.checkpoint: {options.checkpoint} is for a run folder, and {path} is none; leave it out"
        )
    return found


def _is_run(path: Path) -> bool:
    return (path / "checkpoints").is_dir() or (path / "config.yaml").is_file()


def _of_run(path: Path, options: InitConfig, step: int | None) -> WeightSource:
    run, which = RunDir(path), options.checkpoint
    if step is None:
        step = which if isinstance(which, int) else _best(run) if which == BEST else None
    there = {step_of(found): found for found in steps_of(run.checkpoints)}
    if step is not None and step not in there:
        listed = and_more([str(one) for one in there], _MOST_SHOWN) or "none"
        raise ConfigError(f"init.checkpoint: {path} has no checkpoint of step {step}; it has: {listed}")
    problems = []
    for found in there.values() if step is None else [there[step]]:
        try:
            return _of_checkpoint(found)
        except CheckpointError as error:
            problems.append(str(error))
    if problems:
        raise ConfigError(f"init.from: {'; '.join(problems)}")
    raise ConfigError(f"init.from: {path} is a run folder that has no checkpoint yet")


def _best(run: RunDir) -> int | None:
    try:
        return decisions.chosen_step(run, BEST, "init.checkpoint")
    except ConfigError:
        raise
    except DistribError as error:
        raise ConfigError(f"init.from: {error}") from None


def _of_checkpoint(path: Path) -> WeightSource:
    manifest = checkpoint.verify(path, contents=False)
    tensors = {
        name.removeprefix(_MODEL): {**entry, "name": name}
        for name, entry in manifest["tensors"].items()
        if name.startswith(_MODEL)
    }
    if not tensors:
        raise ConfigError(f"init.from: {path} has no weights of a model; it is of a loop of one's own")
    tensors |= {name: tensors[first] for name, first in manifest["tied"].items()}
    sizes = {name: file["bytes"] for name, file in manifest["files"].items()}
    return WeightSource(path, sizes, tensors, manifest["step"])


def _of_folder(path: Path) -> WeightSource:
    if (path / _WHOLE).is_file():
        return _of_files(path, [_WHOLE])
    if not (path / _INDEX).is_file():
        files = sorted(file.name for file in path.iterdir() if file.suffix in (_SAFETENSORS, *OF_TORCH))
        hint = f"; give one of its files: {and_more(files, _MOST_SHOWN)}" if files else ""
        raise ConfigError(f"init.from: {path} is no run folder and has no {_WHOLE} or {_INDEX}{hint}")
    index = path / _INDEX
    try:
        placed = json.loads(index.read_text())["weight_map"]
        if not all(isinstance(file, str) and Path(file).name == file for file in placed.values()):
            raise ValueError
    except (ValueError, LookupError, TypeError, AttributeError):
        raise ConfigError(f"init.from: {index}: has no weight_map from names to files in this folder") from None
    found = _of_files(path, sorted(set(placed.values())))
    for name, file in placed.items():
        if name not in found.tensors or found.tensors[name]["stretches"][0][0] != file:
            raise ConfigError(f"init.from: {index}: names {name} in {file}, which is not there")
    return found


def _of_files(folder: Path, names: Sequence[str]) -> WeightSource:
    tensors: dict[str, dict[str, Any]] = {}
    for file in names:
        with open_tensors(folder / file) as opened:
            for name, entry in opened.entries().items():
                tensors[name] = {**entry, "name": name, "stretches": [[file, 0, prod(entry["shape"])]]}
    if not tensors:
        raise ConfigError(f"init.from: {folder / names[0]} holds no tensors by name")
    return WeightSource(folder, {name: (folder / name).stat().st_size for name in names}, tensors)


def _require_file(path: Path) -> Path:
    if not path.is_file():
        raise ConfigError(f"init.from: {path}: no such file or folder, and nothing is downloaded")
    if path.suffix not in (_SAFETENSORS, *OF_TORCH):
        suffixes = ", ".join((_SAFETENSORS, *OF_TORCH))
        raise ConfigError(
            f"init.from: {path}: give a run folder, a folder with {_WHOLE}, or a file that ends with {suffixes}"
        )
    return path
