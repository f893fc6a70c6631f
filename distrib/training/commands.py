"""What can be done with a config or a run besides training it."""

import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TextIO

from torch import nn
from torch.optim import Optimizer
from torch.utils.data import Dataset

from distrib.config import Config
from distrib.data.order import Order
from distrib.data.seeding import seeded
from distrib.data.shards import ShardedStream
from distrib.data.source import require_stream_reader
from distrib.errors import ConfigError, DistribError, RunDirError
from distrib.monitor.explain import print_plan, print_sources
from distrib.monitor.progress import format_metrics
from distrib.optim_groups import own_factors
from distrib.plan import RunPlan
from distrib.processes.world import World
from distrib.run_folder import frozen, verify
from distrib.run_folder.checkpoint import averaged
from distrib.run_folder.earlier_starts import where_it_began
from distrib.run_folder.export import export, export_over
from distrib.run_folder.folder import RunDir
from distrib.run_folder.identity import data_changes
from distrib.run_folder.initial_weights import compare
from distrib.run_folder.ledger import to_json
from distrib.run_folder.resume import ResumePoint, chosen
from distrib.strategies import registry
from distrib.targets import find
from distrib.task import Task, method_of, own_method
from distrib.tasks import adapters
from distrib.tracebacks import is_ours
from distrib.training import build, freezing
from distrib.training.engine import Engine
from distrib.training.learning_rates import learning_rate
from distrib.training.model_checks import refuse_optimizer
from distrib.training.optimizers import describe_optimizer, ignored_keys


def explain_run(config: Config, processes: int, sources: Sequence[tuple[str, Any, str]] = ()) -> None:
    """Print the plan for so many processes, and what the strategy adds to it. Raises ConfigError where a run would.

    `sources`: key, value and source of what bases and overrides set.
    """
    task = build.task(config)
    build.require_observers(config)
    strategy = registry.resolve(config, World(world_size=processes, launcher="distrib"))
    config = strategy.config
    build.prepare(task, config, World())
    dataset, order = build.train_dataset(task, config)
    if order is None and not isinstance(dataset, ShardedStream):
        require_stream_reader()
    build.require_evaluations(config, build.eval_datasets(task, config), task)
    plan = RunPlan.complete(config, strategy.batches, None if order is None else order.size)
    rate_of = learning_rate(task, config, plan.num_steps)
    own_factors(config.optim.groups, config.optim.warmup_steps, plan.num_steps)  # refuses a schedule that does not fit
    freezing.unfreezing_step(config, plan.num_steps)
    make, made = build.optimizer_maker(task, config), []
    own = own_method(task, "optimizer") is not None

    def make_optimizer(params: list[tuple[str, nn.Parameter]]) -> Optimizer:
        made.append(make(params))
        refuse_optimizer(made[-1], strategy, own)  # before it is asked for its state
        return made[-1]

    def warn(line: str) -> None:
        print(f"warning: {line}", file=sys.stderr, flush=True)

    with seeded("model", config.seed):
        module = build.model_on_meta(task, config, make_optimizer, warn)
        memory = build.memory(module, task, strategy, make_optimizer)
    initial = None if config.init is None else compare(config.init, module)
    if own and (ignored := ignored_keys(config.optim, made[-1])):
        raise ConfigError(ignored)
    optimizer = describe_optimizer(made[-1])
    base_rate = made[-1].param_groups[0]["lr"]
    plan = replace(plan, memory=memory)
    print_plan(config, strategy.name, plan, optimizer, lambda update: rate_of(update, base_rate))
    for line in () if initial is None else initial.lines():
        print(line)
    if further := strategy.describe():
        print(further)
    if sources:
        print_sources(sources)


def evaluate_run(
    run_dir: str | Path, as_json: bool = False, which: str = "newest", weights: str = "model"
) -> dict[str, float]:
    """Evaluate a run's checkpoint, newest, best or of a step, and print the metrics; changes nothing in its folder.

    `weights`: model, or ema for their average. Raises RunDirError, ConfigError and CheckpointError.
    """
    run, ema = RunDir(Path(run_dir).absolute()), _is_average(weights)
    with where_it_began(run):
        return _evaluate(run, Path(run_dir), as_json, which, ema)


def _evaluate(run: RunDir, shown: Path, as_json: bool, which: str, ema: bool) -> dict[str, float]:
    config = run.read_config()
    if config.task is None:
        raise ConfigError(f"{run.path}: the run's task was given in Python, so its config does not name it")
    task, world = build.task(config), World.detect()
    build.prepare(task, config, world)
    sets = build.eval_datasets(task, config)
    if not sets:
        raise ConfigError(f"task.target: {config.task.target} has no eval_dataset, so there is nothing to evaluate on")
    strategy = registry.for_evaluation(config, world)
    module = build.model(task, config)
    world.connect()
    strategy.wrap(module, method_of(task, "blocks")(module), None)
    engine = Engine(strategy, mixed_precision=config.train.mixed_precision, seed=config.seed)
    found = _chosen(run, world, which, sys.stderr if as_json else sys.stdout)
    engine.load(found.path, averaged(found.path, found.manifest) if ema else found.manifest)
    metrics: dict[str, float] = {}
    for name, dataset in sets.items():
        metrics.update(build.evaluate(engine, task, dataset, config, name, ema))
    if world.is_rank_0:
        shown = shown / found.path.relative_to(run.path)
        samples = sum(len(dataset) for dataset in sets.values())  # type: ignore[arg-type, misc]
        entry = {"checkpoint": str(shown), "step": found.manifest["step"], "count": samples, "metrics": metrics}
        print(to_json(entry) if as_json else f"{shown}: {format_metrics(metrics)}  ({samples} samples)", flush=True)
    world.barrier()
    return metrics


def verify_run(run_dir: str | Path) -> None:
    """Check a run's ledger, checkpoints and data, and say so. Raises LedgerError, CheckpointError, RunDirError."""
    run = RunDir(Path(run_dir).absolute())
    training_set = _TrainingSet(run)
    with where_it_began(run):
        order = _order_of_task(run, training_set)
    found = verify.verify_run(Path(run_dir), order)
    with where_it_began(run):
        data = _check_data(run, training_set)
    if found.unknown:
        data = f"the samples of {found.unknown:,} steps not checked, {data}"
    ended = "all" if found.steps == found.of_steps else "so far"
    print(
        f"{run_dir}: {found.steps} of {found.of_steps} steps, {ended} in order, {found.samples:,} samples where they "
        f"belong, chain intact, {found.checkpoints} checkpoint(s) whole, {data}"
    )
    if found.set_aside:
        print(f"{run_dir}: found damaged and set aside when the run went on: {', '.join(found.set_aside)}")


class _TrainingSet:
    """The training set that a run's task makes. It is made once, when it is first asked for: that may take long."""

    def __init__(self, run: RunDir) -> None:
        self._run = run
        self._made: tuple[Task, Dataset[Any], Order | None] | Exception | None = None

    def make(self) -> tuple[Task, Dataset[Any], Order | None]:
        """Return task, training set and order. Raises what the task raises, each time."""
        if self._made is None:
            try:
                config = self._run.read_config()
                task = build.task(config)
                self._made = (task, *build.train_dataset(task, config))
            except Exception as error:
                self._made = error
        if isinstance(self._made, Exception):
            raise self._made
        return self._made


def _order_of_task(run: RunDir, training_set: _TrainingSet) -> Order | None:
    """Return the order of the samples that the task gives, if the run needs it, can be made here and is the run's."""
    recorded = (run.environment_or_nothing().get("data") or {}).get("train_dataset") or {}
    if (recorded.get("order") or {}).get("by") != "weights":
        return None
    try:
        _, _, order = training_set.make()
    except Exception:  # _check_data reports it
        return None
    return order if order is not None and order.record() == recorded["order"] else None


def _check_data(run: RunDir, training_set: _TrainingSet) -> str:
    """Compare the data with those that the run began with; returns what was found. Raises RunDirError if they differ.

    That the data cannot be read here is no fault of the run's.
    """
    config, recorded = run.read_config(), run.environment_or_nothing()
    if not any((recorded.get("data") or {}).values()):
        return "data not checked: the run has no fingerprint of them"
    if config.task is None:
        return "data not checked: the task was given in Python"
    try:
        task, train, order = training_set.make()
        data = build.fingerprints(train, order, build.eval_datasets(task, config), config)
    except Exception as error:
        if not isinstance(error, DistribError | OSError) and is_ours(error):
            raise
        reason = (str(error).splitlines() or [""])[0]
        return f"data not checked: {type(error).__name__}: {reason}"
    if changes := data_changes(recorded, data):
        raise RunDirError(f"{run.path}: the data have changed: {'; '.join(changes)}")
    return "data as at the run's start"


def export_run(
    run_dir: str | Path, out: Path, which: str = "newest", weights: str = "model", merged: bool = False
) -> None:
    """Write the weights of a run's checkpoint to `out` in the form that its task gives them, and name the files.

    A run with an adapter is written as peft's own files, or `merged` as whole weights. `weights`: model, or ema for
    their average. Raises RunDirError, ConfigError and CheckpointError.
    """
    run, folder, ema = RunDir(Path(run_dir).absolute()), out.absolute(), _is_average(weights)
    with where_it_began(run):
        config, found = run.read_config(), _chosen(run, World(), which)
        if frozen.KEY in found.manifest:
            files = _export_adapter(config, found.path, folder, ema, merged)
        elif merged:
            raise ConfigError(f"--merged: {found.path} is of a run without an adapter, so leave --merged out")
        else:
            files = export(found.path, folder, _exporter(config), ema)
        for file in files:
            print(out / file.relative_to(folder))


def _export_adapter(config: Config, path: Path, folder: Path, ema: bool, merged: bool) -> list[Path]:
    """Build the base model again, because the checkpoint has only what was trained."""
    if config.task is None:
        raise ConfigError(
            f"{path}: has an adapter alone; the base model is from the task, which was given in Python, so the run's "
            "config does not name it"
        )
    task = build.task(config)
    module = build.model(task, config)
    return export_over(module, path, folder, adapters.exporter(module, task, merged), ema)


def _is_average(weights: str) -> bool:
    """Raises ConfigError for other weights than there are."""
    if weights not in ("model", "ema"):
        raise ConfigError(f"--weights: {weights} is not model or ema")
    return weights == "ema"


def _exporter(config: Config) -> Task:
    """The run's task, built only where it has an export of its own: the data that it looks for need not be here."""
    if config.task is None:
        return Task()
    found: Any = find(config.task.target, "task.target", Task)
    return Task() if found.export is Task.export else build.task(config)


def _chosen(run: RunDir, world: World, which: str, out: TextIO | None = None) -> ResumePoint:
    """Return the checkpoint, and print which damaged ones were passed over. Raises CheckpointError. Collective."""
    found = chosen(run, world, which)
    if world.is_rank_0:
        for problem in found.passed_over:
            print(f"passed over: {problem}", file=out, flush=True)
        for line in run.take_trouble():
            print(f"warning: {line}", file=sys.stderr, flush=True)
    return found
