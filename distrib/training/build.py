"""The parts of a run, made from its task and its config: what training, evaluating and explaining have in common."""

from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.utils.data import Dataset

from distrib import targets
from distrib.config import Config
from distrib.data.fingerprint import fingerprint
from distrib.data.limit import limited
from distrib.data.order import Order
from distrib.data.prints import Fingerprint
from distrib.data.seeding import seeded
from distrib.errors import ConfigError, DistribError
from distrib.monitor.observer import Observer
from distrib.plan import Memory
from distrib.processes import temporary
from distrib.processes.world import World
from distrib.run_folder import decisions
from distrib.strategies import registry
from distrib.strategies.base import Strategy
from distrib.strategies.memory import MakeOptimizer, averaged_dtype
from distrib.strategies.parameters import trainable
from distrib.task import Task, load_task, method_of, own_method
from distrib.tracebacks import first_line
from distrib.training import cross_rank_checks, evaluation, orders
from distrib.training.engine import Engine
from distrib.training.freezing import AT_THE_END, freeze, trained_later
from distrib.training.optimizers import build_optimizer
from distrib.training.orders import check_weights
from distrib.training.task_checks import check_blocks, check_dataset, check_eval_datasets, check_model, check_optimizer


def task(config: Config) -> Task:
    """The config's task. Raises ConfigError."""
    with seeded("task", config.seed):
        return load_task(config.task)


def observers(config: Config, given: Sequence[Observer] = ()) -> list[Observer]:
    """Make the config's observers, to follow those `given` to Trainer. Raises ConfigError."""
    for observer in given:
        if not isinstance(observer, Observer):
            raise ConfigError(f"observers: {observer!r} is not an Observer; derive its class from distrib.Observer")
    with seeded("observers", config.seed):
        named = enumerate(config.observers)
        return [*given, *(targets.build(o.target, o.arguments, f"observers.{i}", Observer) for i, o in named)]


def require_observers(config: Config) -> None:
    """Raises ConfigError if one that the config names cannot be made; makes none."""
    for number, observer in enumerate(config.observers):
        key = f"observers.{number}"
        targets.require_arguments(targets.find(observer.target, f"{key}.target", Observer), observer.arguments, key)


def prepare(task: Task, config: Config, world: World) -> None:
    """Let the task make its files, before any rank reads them. Joins the processes if the task has something to do."""
    if (own := own_method(task, "prepare")) is not None:
        world.connect(config.strategy.timeout)
        with seeded("prepare", config.seed):
            cross_rank_checks.on_each_machine(world, own)


def model(task: Task, config: Config, steps_done: int = 0) -> nn.Module:
    """With the initial weights that belong to the config's seed, and what is frozen after so many steps. Raises
    ConfigError."""
    with seeded("model", config.seed):
        module = check_model(task.model())
    freeze(module, config, steps_done)
    return module


def blocks(task: Task, module: nn.Module, strategy: Strategy) -> list[nn.Module]:
    """The task's blocks. Raises ConfigError if something is to be done to each and there are none, and LaunchError if
    accelerate launch names others."""
    found, config = check_blocks(method_of(task, "blocks")(module)), strategy.config
    needed = {
        "strategy.activation_checkpointing": config.strategy.activation_checkpointing,
        "train.compile": config.train.compile,
    }
    for key, value in needed.items():
        if value in (True, "blocks") and not found:
            raise ConfigError(
                f"{key}: {type(module).__name__} has no repeated blocks that distrib finds; name them in "
                "Task.blocks(model)"
            )
    registry.check_wrapped(strategy.world, found)
    return found


def train_dataset(task: Task, config: Config) -> tuple[Dataset[Any], Order | None]:
    """And the order in which a run reads its samples; None for a stream (an IterableDataset). Raises ConfigError."""
    with seeded("train_dataset", config.seed):
        dataset = check_dataset(task.train_dataset(), "train_dataset")
    with seeded("sample_weights", config.seed):
        weights = check_weights(method_of(task, "sample_weights")(), dataset)
    return dataset, orders.order(dataset, weights, config)


def eval_datasets(task: Task, config: Config) -> dict[str, Dataset[Any]]:
    """Return the evaluation sets by name; that of `Task.eval_dataset` has the name "". Raises ConfigError if one has no
    length or no samples."""
    with seeded("eval_dataset", config.seed):
        found = check_eval_datasets(task.eval_datasets())
    for name, dataset in found.items():
        method = f"eval_datasets: {name}" if name else "eval_dataset"
        if len(check_dataset(dataset, method)) == 0:  # type: ignore[arg-type]
            raise ConfigError(f"task.{method}: it has no samples; {'leave it out' if name else 'return None'}")
    return {name: limited(dataset, config.eval.limit, config.seed) for name, dataset in found.items()}


def require_evaluations(config: Config, sets: Collection[str], task: Task) -> None:
    """Raise ConfigError if the config needs evaluations that there are not. `sets`: the names of the task's."""
    evaluation = config.eval
    needs = {
        f"eval.every_steps: {evaluation.every_steps}": evaluation.every_steps,
        "eval.at_start: true": evaluation.at_start,
        **decisions.criteria(config),
    }
    for key, value in needs.items():
        if value and not sets:
            raise ConfigError(
                f"{key}, but {type(task).__name__} has no evaluation set (Task.eval_dataset); leave the key out"
            )
    averages = config.train.ema is not None and evaluation.weights != "model"
    if evaluation.weights == "ema" and not averages:
        raise ConfigError(
            "eval.weights: ema, but the run keeps no average of the weights; add train.ema, or leave it out"
        )
    if averages and "ema" in sets:
        raise ConfigError(
            "task.eval_datasets: a set is named ema, but eval/ema/… are the metrics of the average of the weights "
            "(train.ema); give the set another name, or set eval.weights: model"
        )
    for name in evaluation.sets:
        if name not in sets:
            known = ", ".join(sets) if all(sets) else "only one, without a name"
            raise ConfigError(f"eval.sets.{name}: there is no such set, but {known or 'none'}")
    every_steps = [evaluation.every_steps, *(one.every_steps for one in evaluation.sets.values())]
    for key in ("train.stop", "optim.plateau"):
        if needs[key] is not None and not any(every_steps):
            raise ConfigError(
                f"{key}: the run is evaluated at its end only, where it has no effect; set eval.every_steps"
            )


def fingerprints(
    train: Dataset[Any], order: Order | None, sets: dict[str, Dataset[Any]], config: Config
) -> dict[str, Fingerprint | None]:
    """Of all sets, by the name of the method that returned them; None for a stream and for no evaluation. That of the
    training set holds its `order` too, if that is no permutation."""
    found: dict[str, Dataset[Any] | None] = {"train_dataset": train}
    for name, dataset in sets.items():
        found[f"eval_datasets {name}" if name else "eval_dataset"] = dataset
    if not sets:
        found["eval_dataset"] = None
    prints = {name: fingerprint(dataset, config.seed, config.data.num_workers) for name, dataset in found.items()}
    if (own := prints["train_dataset"]) is not None and order is not None and (record := order.record()) is not None:
        own["order"] = record
    return prints


def optimizer_maker(task: Task, config: Config) -> MakeOptimizer:
    """Makes the task's own optimizer, or the config's, over the parameters that it is given."""

    def make(params: list[tuple[str, nn.Parameter]]) -> Optimizer:
        with seeded("optimizer", config.seed):
            own = check_optimizer(method_of(task, "optimizer")(params))
            later = [name for name, _ in params if trained_later(config, name)]
            return own or build_optimizer(config.optim, params, method_of(task, "decays"), later)

    return make


def model_on_meta(
    task: Task, config: Config, make_optimizer: MakeOptimizer, warn: Callable[[str], None] = lambda _: None
) -> nn.Module:
    """Return the task's model on torch's meta device, where nothing is allocated.

    It has what is trained at the end of the run, which is all that ever is. If the model or the optimizer looks at
    values, it cannot be built there; it is built on the CPU, and `warn` is told first.
    """
    try:
        with torch.device("meta"):
            module = task.model()
        freeze(module, config, AT_THE_END)
        make_optimizer(trainable(module))
    except DistribError:
        raise
    except Exception as error:
        warn(f"the model is built in memory, as it cannot be built on torch's meta device: {first_line(error)}")
        module = task.model()
        freeze(module, config, AT_THE_END)
    return module


def memory(module: nn.Module, task: Task, strategy: Strategy, make_optimizer: MakeOptimizer) -> Memory:
    """Return the bytes that a rank holds of a module. Raises ConfigError if the strategy cannot train it."""
    strategy.check_model(module, method_of(task, "blocks")(module))
    trained = sum(parameter.numel() for _, parameter in trainable(module))
    frozen = sum(parameter.numel() for parameter in module.parameters()) - trained
    found = replace(strategy.memory(module, make_optimizer), trained=trained, frozen=frozen)
    if strategy.config.train.ema is None:
        return found
    shards = strategy.largest_shards(module).values()
    return replace(found, average=sum(shard.numel() * averaged_dtype(shard.dtype).itemsize for shard in shards))


def loading(config: Config, world: World, task: Task) -> dict[str, Any]:
    """How a DataLoader reads. Raises ConfigError if its workers could not be reached."""
    temporary.check_length(config.data.num_workers)
    if config.data.num_workers:
        temporary.put_worker_sockets_there()
    return {
        "num_workers": config.data.num_workers,
        "prefetch_factor": config.data.prefetch_factor,
        "pin_memory": not world.use_cpu,
        "collate": own_method(task, "collate"),
    }


def engine(
    strategy: Strategy, config: Config, warn: Callable[[str], None], asked_to_stop: Callable[[], bool]
) -> Engine:
    """Return the engine that trains as the config says. `strategy`: has wrapped its model."""
    return Engine(
        strategy,
        mixed_precision=config.train.mixed_precision,
        max_grad_norm=config.train.max_grad_norm,
        seed=config.seed,
        ema=config.train.ema,
        own_schedules=[number for number, group in enumerate(config.optim.groups) if group.schedule is not None],
        warn=warn,
        asked_to_stop=asked_to_stop,
    )


def evaluate(
    engine: Engine,
    task: Task,
    dataset: Dataset[Any],
    config: Config,
    name: str = "",
    ema: bool = False,
    keep: Callable[[Callable[[], dict[str, bytes]]], None] | None = None,
) -> dict[str, float]:
    """Return the metrics of the evaluation set `name` under the names that the run folder has for them. Collective.

    `ema`: whether the model has the average of the weights. `keep`: called on rank 0 with a function that
    returns the files of the task's samples.
    """
    batch_size, options = config.data.micro_batch_size, loading(config, engine.world, task)
    metrics = evaluation.evaluate(engine, task, dataset, batch_size, name, keep, **options)
    return {metric_name(name, key, ema): value for key, value in metrics.items()}


def metric_name(name: str, key: str, ema: bool = False) -> str:
    """Return the name of a metric of the evaluation set `name`: eval/KEY, or eval/NAME/KEY; of the average of the
    weights eval/ema/KEY, or eval/ema/NAME/KEY."""
    return "/".join(["eval", *(["ema"] if ema else []), *([name] if name else []), key])
