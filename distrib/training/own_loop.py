"""What surrounds a training loop of the user's own: data order, engines, ledger, checkpoints. See docs/own-loop.md."""

import re
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any

from torch import nn
from torch.optim import Optimizer
from torch.utils.data import Dataset, IterableDataset

from distrib.config import Config
from distrib.data.loader import Window
from distrib.data.source import source
from distrib.errors import ConfigError
from distrib.monitor.progress import format_summary
from distrib.monitor.run_log import RunLog
from distrib.plan import RunPlan
from distrib.processes.signals import when_asked_to_stop
from distrib.processes.world import World
from distrib.run_folder.async_save import Saver
from distrib.run_folder.environment import describe
from distrib.run_folder.folder import RunDir
from distrib.run_folder.ledger import GENESIS
from distrib.run_folder.manifest import part_of
from distrib.run_folder.resume import latest_valid
from distrib.strategies import registry
from distrib.strategies.ddp import DDP
from distrib.task import Task
from distrib.training import build, cross_rank_checks
from distrib.training.engine import Engine
from distrib.training.model_checks import check_module, refuse_optimizer
from distrib.training.optimizers import build_optimizer
from distrib.training.orders import order
from distrib.training.preemption import Preemption
from distrib.training.step_log import PendingStep, StepLog
from distrib.training.task_checks import check_dataset

_WHOLE = ("single", "ddp")  # strategies under which each rank holds each model whole
MakeOptimizer = Callable[[list[tuple[str, nn.Parameter]]], Optimizer]


class OwnLoop:
    """Gives your loop its windows of micro-batches and an engine for each model; logs, saves and resumes.

    with OwnLoop(config, dataset, {"model": module}) as loop:
        for window in loop:
            ...  # forward, loss and backward of each micro-batch, in loop.engines["model"].microbatch
            loop.record(loop.engines["model"].step(lr=0.1))

    All models are in one checkpoint, so a resumed run has them from the same step. After a kill, start it again.
    """

    def __init__(
        self,
        config: Config,
        dataset: Dataset[Any],
        models: Mapping[str, nn.Module],
        run_dir: str | Path | None = None,
        optimizers: Mapping[str, MakeOptimizer] | None = None,
    ) -> None:
        """Join the other processes, and resume if the run folder holds this run. Collective.

        `config`: without a task; `data`, `train`, `optim`, `strategy` and `checkpoint` count. `dataset`: as a task's
        training set. `models`: by name, with the initial weights, the same on every rank. `optimizers`: by the model's
        name, makes its optimizer from (name, parameter) pairs; by default the config's. Raises ConfigError and
        LaunchError.
        """
        self.world = World.detect()
        self.run = RunDir(Path(run_dir) if run_dir is not None else Path("runs", config.name))
        _check(config, models, optimizers or {})
        resolved = {name: registry.resolve(config, self.world) for name in models}
        first = self._first = next(iter(resolved.values()))
        self.config = first.config
        if len(models) > 1 and first.name not in _WHOLE:
            raise ConfigError(
                f"strategy.name: {first.name} cuts models, and the loop has {len(models)} that use each other; take ddp"
            )
        self.dataset = check_dataset(dataset, "train_dataset")
        if isinstance(self.dataset, IterableDataset):
            raise ConfigError("OwnLoop: the dataset is a stream; give one with __len__ and __getitem__")
        samples = order(self.dataset, None, self.config)
        assert samples is not None, "only a stream has none"
        self.plan = RunPlan.complete(self.config, first.batches, samples.size)
        loading = build.loading(self.config, self.world, Task())
        self.source = source(self.dataset, self.plan, self.world, config.seed, loading, samples)
        for name, module in models.items():
            check_module(module, resolved[name], [])
        self.run_log = RunLog(self.run, self.world, self.config, self.plan)
        self.step_log = StepLog(self.run_log, self.plan, first.name, self.config.train, list(models))
        self._preemption = Preemption(self.world)
        self._strategies, self._models, self._optimizers = resolved, models, optimizers or {}
        self._stack = ExitStack()
        self._window: Window | None = None  # the one that is not recorded yet
        self._stop = False
        self.summary = self._start(config, build.fingerprints(self.dataset, samples, {}, self.config))
        self.engines = {name: self._engine(name) for name in models}
        self._chain = self._resume()
        keep, keep_every = self.config.checkpoint.keep, self.config.checkpoint.keep_every
        self._saver = Saver(self.run.checkpoints, self.world, keep, keep_every, [self.run.steps, self.run.evals])

    def __enter__(self) -> "OwnLoop":
        self._stack.callback(self.run.release)
        if self.summary is None:
            self._stack.enter_context(self.run_log.failures())
            self._stack.enter_context(when_asked_to_stop(self._preemption.take_note))
            self._stack.enter_context(self.run_log.open(self._chain, self.first_step))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.__exit__(kind, error, trace)
        if error is None:
            self.world.shutdown()

    def __iter__(self) -> Iterator[Window]:
        """Yield the window of each step that is left: this rank's micro-batches. Call `record` before the next one."""
        if self.summary is not None:
            self.run_log.say(format_summary(self.run.path, self.summary, "had finished before"))
            return
        first = next(iter(self.engines.values()))
        windows = self.source.windows(self.first_step, first.prefetcher)
        self._began = time.perf_counter()
        for window in windows:
            self._window = window
            yield window
            if self._window is not None:
                raise ConfigError(f"OwnLoop: step {window.step + 1} is not recorded; call loop.record(engine.step(lr))")
            steps_done, every_steps = window.step + 1, self.config.checkpoint.every_steps
            if steps_done == self.plan.num_steps or self._stop or (every_steps and steps_done % every_steps == 0):
                self._save(steps_done)
            self._report_saves()
            if self._stop and steps_done < self.plan.num_steps:
                self._saver.wait()
                self._report_saves()
                self._preemption.end(self.run_log, steps_done)
            self._began = time.perf_counter()
        self._saver.wait()
        self._report_saves()
        self.summary = self.world.on_rank_0(self._finish)
        self.run_log.close("finished")
        self.run_log.say(format_summary(self.run.path, self.summary, "finished"))

    def record(self, step: PendingStep, **others: PendingStep) -> None:
        """Write the step into the ledger. On a GPU this waits for its result.

        `step`: of the first model's engine, whose loss and norm the line has. `others`: those of other models by name;
        what they have is `train/NAME_loss`, `train/NAME_grad_norm` and so on. Raises TrainingError if a model's step
        was skipped and the run cannot go on (`train.on_nonfinite`, `train.max_skipped`).
        """
        window, self._window = self._window, None
        if window is None:
            raise ConfigError("OwnLoop: record was called twice in a step, or outside of the loop")
        if {next(iter(self.engines)), *others} != self.engines.keys():
            first, *rest = self.engines
            wanted = ", ".join([f"the step of {first}", *(f"{name}=…" for name in rest)])
            raise ConfigError(f"OwnLoop: record needs {wanted}; it got {', '.join(['a step', *others])}")
        seconds = {"seconds": round(time.perf_counter() - self._began, 6)}
        self.step_log.submit(window.step, step, seconds, others)
        self._stop = self.step_log.flush()

    def _start(self, config: Config, data: dict[str, Any]) -> dict[str, Any] | None:
        """Join the others and begin the run folder. Return the summary if the run has finished before. Collective."""
        self.world.connect(self.config.strategy.timeout)
        cross_rank_checks.require_same_config(self.world, self.config)
        cross_rank_checks.require_same_data(self.world, data)
        parameters = {
            f"{name}.{key}": list(parameter.shape)
            for name, module in self._models.items()
            for key, parameter in module.named_parameters()
        }

        def start() -> dict[str, Any] | None:
            environment = describe(self.world, self._first, self.plan.num_samples, None, {})
            environment.update(
                data=data, task={"class": "OwnLoop", "file": None, "arguments": {}, "parameters": parameters}
            )
            summary = self.run.start(config, environment)
            self.run_log.trouble(finished=summary is not None)
            return summary

        summary = self.world.on_rank_0(start)
        cross_rank_checks.require_shared(self.world, self.run.environment)
        return summary

    def _engine(self, name: str) -> Engine:
        strategy, module = self._strategies[name], self._models[name]
        make = self._optimizers.get(name)
        strategy.wrap(module, [], make or (lambda params: build_optimizer(self.config.optim, params, lambda *_: True)))
        assert strategy.optimizer is not None, "wrap makes one"
        if isinstance(strategy, DDP):
            strategy.fix_bucket_order()
        refuse_optimizer(strategy.optimizer, strategy, own=make is not None)
        module.train()
        return build.engine(strategy, self.config, self.run_log.warn, lambda: self._preemption.asked)

    def _resume(self) -> str:
        """Load the newest checkpoint, if there is one. Return the ledger's chain at that step. Collective."""
        found = latest_valid(self.run, self.world)
        self.first_step = 0 if found is None else found.manifest["step"]
        if found is not None:
            parts = {name: part_of(found.manifest, name) for name in self.engines}
            for name, engine in self.engines.items():
                engine.load(found.path, parts[name])
            self.step_log.load(found.manifest, parts)
        if self.summary is None:
            self.world.on_rank_0(lambda: self.run_log.rewind(found, self.first_step))
        return GENESIS if found is None else str(found.manifest["chain"])

    def _save(self, steps_done: int) -> None:
        shards = {f"{name}/{key}": own for name, engine in self.engines.items() for key, own in engine.shards().items()}
        manifest = {
            **self.run_log.state(),
            "world_size": self.world.world_size,
            "strategy": self._first.name,
            "stream": None,
            **self.step_log.state(),
            "loss_scale": None,
            "numbers": {},
            "tied": {},
            "engines": {
                name: {**engine.state(), **self.step_log.state_of(name)} for name, engine in self.engines.items()
            },
        }
        self._saver.save(steps_done, shards, manifest)

    def _report_saves(self) -> None:
        for saved in self._saver.completed():
            self.run_log.event("checkpoint", **saved)

    def _finish(self) -> dict[str, Any]:
        summary = self.step_log.summary(self.config.name, self.first_step, self.plan.num_steps)
        self.run_log.draw_curves()
        self.run_log.finish(summary)
        return summary


def _check(config: Config, models: Mapping[str, nn.Module], optimizers: Mapping[str, MakeOptimizer]) -> None:
    """Raises ConfigError."""
    if not models or not all(isinstance(module, nn.Module) for module in models.values()):
        raise ConfigError('OwnLoop: give its models by name, {"model": module}')
    for name in models:
        if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
            raise ConfigError(f"OwnLoop: {name!r} cannot be the name of a model; give letters, digits and '_'")
    if unknown := optimizers.keys() - models.keys():
        raise ConfigError(f"OwnLoop: an optimizer for {', '.join(sorted(unknown))}, of which there is no model")
    given = {
        "task": config.task,
        "init": config.init,
        "eval.every_steps": config.eval.every_steps,
        "eval.at_start": config.eval.at_start,
        "train.stop": config.train.stop,
        "train.ema": config.train.ema,
        "train.compile": config.train.compile,
        "checkpoint.best": config.checkpoint.best,
        "optim.plateau": config.optim.plateau,
        "optim.groups": config.optim.groups,
        "strategy.activation_checkpointing": config.strategy.activation_checkpointing,
        "observers": config.observers,
    }
    for key, value in given.items():
        if value:
            raise ConfigError(f"{key}: is not for a loop of one's own, which does that itself; leave it out")
    if config.optim.schedule != "constant" or config.optim.warmup_steps:
        raise ConfigError("optim.schedule: is not for a loop of one's own; give engine.step the rate of each step")
