"""Assembles a run from its config, runs the training loop, and decides when to evaluate, save and stop."""

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from distrib.config import Config
from distrib.data.loader import Window
from distrib.data.prints import Fingerprint
from distrib.data.source import source
from distrib.errors import ConfigError
from distrib.monitor.alerts import require_url
from distrib.monitor.observer import Observer
from distrib.monitor.progress import Verbosity, format_summary
from distrib.monitor.run_log import RunLog
from distrib.monitor.trackers.trackers import in_sweep, require_trackers
from distrib.optim_groups import own_factors
from distrib.plan import RunPlan
from distrib.processes.signals import when_asked_to_stop
from distrib.processes.world import World
from distrib.run_folder import initial_weights
from distrib.run_folder.async_save import Saver
from distrib.run_folder.earlier_starts import what_to_do_now
from distrib.run_folder.environment import describe, describe_task
from distrib.run_folder.folder import RunDir
from distrib.run_folder.identity import moved_keys
from distrib.run_folder.ledger import GENESIS
from distrib.run_folder.resume import ResumePoint, requested, require_steps_left, where_to_begin
from distrib.strategies import compile, registry
from distrib.strategies.parameters import trainable
from distrib.task import Task, own_method
from distrib.training import build, cross_rank_checks, freezing, probe, timing
from distrib.training.engine import Engine
from distrib.training.evaluations import Evaluations
from distrib.training.learning_rates import learning_rate, tried_updates
from distrib.training.loop import train_step
from distrib.training.model_checks import check_module, refuse_optimizer
from distrib.training.optimizers import ignored_keys
from distrib.training.preemption import Preemption
from distrib.training.step_log import PendingStep, StepLog


class Trainer:
    """Trains a task as its config says, in the processes that the launcher started.

    The constructor checks all input and raises ConfigError or LaunchError, before anything is written and, unless the
    task has a `prepare`, before the processes join. The run folder is `run_dir` or runs/NAME; in a wandb sweep,
    runs/sweep-ID/RUN. `source` gives the windows and may be replaced before `fit`; `engine` and `saver` exist in `fit`.
    """

    def __init__(
        self,
        task: Task,
        config: Config,
        run_dir: str | Path | None = None,
        *,
        resume: str = "auto",
        fork: bool = False,
        reset_optimizer: bool = False,
        moved: Sequence[str] = (),
        observers: Sequence[Observer] = (),
        verbosity: Verbosity = "normal",
    ) -> None:
        """`resume`: auto, never or a checkpoint's path. `fork`: begin a new run from another run's checkpoint.
        `reset_optimizer`: fork without the optimizer's state. `moved`: config keys like task.data that may have changed
        since earlier starts, if the data have the same fingerprint. `observers`: called on rank 0, in addition to those
        in the config. `verbosity`: what rank 0 prints."""
        self.task, self.resume = task, resume
        self.written = config  # for the run folder; training reads `self.config`, in which the strategy is resolved
        path = Path(run_dir) if run_dir is not None else Path("runs", *(in_sweep() or [config.name]))
        self.run = RunDir(path, moved_keys(moved))
        self.checkpoint, self.origin = requested(resume, self.run, fork, reset_optimizer)
        self.world = World.detect()
        if self.world.is_rank_0:
            require_trackers(config.tracking)
            require_url(config.alerts)
        all_observers = build.observers(config, observers) if self.world.is_rank_0 else []
        self.strategy = registry.resolve(config, self.world)
        self.config = config = self.strategy.config
        build.prepare(task, config, self.world)
        self.train_dataset, self.order = build.train_dataset(task, config)
        eval_datasets = build.eval_datasets(task, config)
        build.require_evaluations(config, eval_datasets, task)
        self.plan = RunPlan.complete(config, self.strategy.batches, None if self.order is None else self.order.size)
        require_steps_left(self.origin, self.plan.num_steps)
        self.learning_rate = learning_rate(task, config, self.plan.num_steps)
        self.own_factors = own_factors(config.optim.groups, config.optim.warmup_steps, self.plan.num_steps)
        loading = build.loading(config, self.world, task)
        self.source = source(self.train_dataset, self.plan, self.world, config.seed, loading, self.order)
        self.unfreezing_step = freezing.unfreezing_step(config, self.plan.num_steps)
        self.module = build.model(task, config, freezing.AT_THE_END)
        self.blocks = build.blocks(task, self.module, self.strategy)
        check_module(self.module, self.strategy, self.blocks)
        if config.train.compile:
            compile.require_tools(config.train.compile, self.world)
        is_rank_0, forked = self.world.is_rank_0, self.origin is not None
        self.initial = initial_weights.check(config.init, self.run, self.module, forked) if is_rank_0 else None
        self.make_optimizer = build.optimizer_maker(task, config)
        optimizer = self.make_optimizer(trainable(self.module))  # checks the config; another one trains
        own = own_method(task, "optimizer") is not None
        refuse_optimizer(optimizer, self.strategy, own)
        self.ignored_keys = ignored_keys(config.optim, optimizer) if own else None
        if self.ignored_keys and not self.run.has_begun():  # older versions allowed it, and such a run may resume
            raise ConfigError(self.ignored_keys)
        self.run_log = RunLog(self.run, self.world, config, self.plan, all_observers, verbosity)
        self.evaluations = Evaluations(task, eval_datasets, config, self.plan, self.run_log)
        self.preemption = Preemption(self.world)
        self.first_step = 0  # of this process
        self.unfrozen_at: int | None = None  # by this process
        self.step_log = StepLog(self.run_log, self.plan, self.strategy.name, config.train)

    def fit(self) -> dict[str, Any]:
        """Train, evaluate and save. Return the summary, the same on every rank.

        If the run folder holds this run and it has finished, its summary is returned at once. If it has not, training
        resumes from the newest valid checkpoint.
        """
        self.world.connect(self.config.strategy.timeout)
        cross_rank_checks.require_same_config(self.world, self.config)
        data = build.fingerprints(self.train_dataset, self.order, self.evaluations.sets, self.config)
        cross_rank_checks.require_same_data(self.world, data)
        if own_method(self.task, "learning_rate") is not None:
            updates = tried_updates(self.plan.num_steps)
            cross_rank_checks.require_same_rates(self.world, updates, self.learning_rate)
        self.initial = self.world.on_rank_0(lambda: self.initial) if self.config.init is not None else None
        init = None if self.initial is None else self.initial.record(self.world)
        summary = self.world.on_rank_0(lambda: self._start(data, init))
        try:
            cross_rank_checks.require_shared(self.world, self.run.environment)
            what = "finished" if summary is None else f"had finished before; {what_to_do_now(self.run, self.written)}"
            if summary is None:
                with self.run_log.failures():
                    while (summary := self._train()) is None:
                        self._build_again()
        finally:
            self.run.release()
            vars(self).pop("engine", None)  # it holds the last window, and that the loader, whose workers must end
        self.world.shutdown()
        self.run_log.close("finished")  # only rank 0 waits for trackers
        self.run_log.say(format_summary(self.run.path, summary, what))
        return summary

    def _start(self, data: dict[str, Fingerprint | None], init: dict[str, Any] | None) -> dict[str, Any] | None:
        work = timing.work(self.task, self.module, self.source, self.config.train.mixed_precision, self.run.report)
        environment = describe(self.world, self.strategy, self.plan.num_samples, self.task, work)
        environment.update(task=describe_task(self.task, self.module), data=data)
        if init is not None:
            environment["init"] = init
        summary = self.run.start(self.written, environment, self.resume, self.origin)
        self.run_log.trouble(finished=summary is not None)
        return summary

    def _train(self) -> dict[str, Any] | None:
        """Train to the end of the run, or to `train.unfreeze_at`; then None, and a checkpoint has been saved."""
        found, reset_optimizer = where_to_begin(self.run, self.world, self.checkpoint, self.origin)
        self.first_step = 0 if found is None else found.manifest["step"]
        freezing.freeze(self.module, self.config, self.first_step)
        if self.config.train.compile:
            compile.keep_in(self.run.compiled)
            self.run_log.event("compiling", what=self.config.train.compile)
        self.strategy.wrap(self.module, self.blocks, self.make_optimizer)
        if self.strategy.optimizer is None:
            raise ConfigError(f"strategy.name: {self.strategy.name}: its wrap made no optimizer; call use_optimizer")
        warn = self.run_log.warn
        engine = self.engine = build.engine(self.strategy, self.config, warn, lambda: self.preemption.asked)
        for doubt in filter(None, [self.ignored_keys, *self.plan.doubts(self.config)]):
            warn(doubt)
        chain = self._resume(engine, found, reset_optimizer)
        freezing.set_training_mode(self.module, self.config, self.first_step)
        if engine.strategy.learns_from_its_first_backward and 0 < self.first_step < self.plan.num_steps:
            probe.warm_up_ddp_buckets(engine, self.task, next(self.source.windows(self.first_step)))
        keep, keep_every = self.config.checkpoint.keep, self.config.checkpoint.keep_every
        saver = self.saver = Saver(self.run.checkpoints, self.world, keep, keep_every, [self.run.steps, self.run.evals])
        with ExitStack() as stack:
            stack.enter_context(when_asked_to_stop(self.preemption.take_note))
            stack.enter_context(self.run_log.open(chain, self.first_step))
            stack.callback(self.step_log.close)
            self.evaluations.begin(engine, self.first_step)
            if self.first_step in self.evaluations.best_steps and not saver.has(self.first_step):
                self._save(engine, saver, self.first_step)
            windows = self.source.windows(self.first_step, engine.prefetcher)
            engine.clock.start()
            for window in windows if self.evaluations.stopped is None else ():
                steps_done = window.step + 1
                step = self._step(engine, window)
                stop = self.step_log.flush()  # the previous step's result, read while the device computes this step
                evaluate = self.evaluations.due(steps_done)
                save = self._save_is_due(steps_done)
                if evaluate or save or stop:
                    step.wait()  # count the wait in this step's time
                seconds = engine.clock.seconds()
                if (window.step - self.first_step) % timing.EVERY_STEPS == 1:
                    seconds |= timing.sampled(engine)
                self.step_log.submit(window.step, step, seconds)
                if evaluate or save or stop:
                    stop |= self.step_log.flush()
                if save:  # before the evaluation, so that an error there loses no training
                    self._save(engine, saver, steps_done)
                if evaluate:
                    with saver.completed_first():
                        self.evaluations.evaluate(engine, steps_done, evaluate)
                    ends = self.evaluations.stopped is not None
                    if (ends or steps_done in self.evaluations.best_steps) and not save:
                        self._save(engine, saver, steps_done)
                        save = True
                    if ends:
                        break
                self._report_saves(saver)
                if stop and steps_done < self.plan.num_steps:
                    self._stop(engine, saver, steps_done, saved=save)
                if steps_done == self.unfreezing_step:
                    saver.wait()
                    self._report_saves(saver)
                    return None
                engine.clock.start()
            steps_done = self.plan.num_steps
            if (stopped := self.evaluations.stopped) is not None:
                steps_done = stopped["step"]
                with saver.completed_first():
                    self.evaluations.end(engine, steps_done)
                self.run_log.event("stopped", **stopped)
            saver.wait()
            self._report_saves(saver)
            return self.world.on_rank_0(lambda: self._finish(steps_done))

    def _build_again(self) -> None:
        """Build the model anew, of which more is trained from now on; its checkpoint is loaded afterwards."""
        del self.engine, self.saver
        self.strategy = registry.resolve(self.written, self.world)
        self.module = build.model(self.task, self.config, freezing.AT_THE_END)
        self.blocks = build.blocks(self.task, self.module, self.strategy)
        self.step_log = StepLog(self.run_log, self.plan, self.strategy.name, self.config.train)
        self.unfrozen_at = self.unfreezing_step
        self.checkpoint, self.origin = self.run.checkpoints / f"step-{self.unfrozen_at:08d}", None
        self.run_log.event("unfrozen", step=self.unfrozen_at, patterns=list(self.config.train.freeze))

    def _resume(self, engine: Engine, found: ResumePoint | None, reset_optimizer: bool) -> str:
        """Load the checkpoint, if there is one. Return the ledger's chain at its step. Collective."""
        if found is None and self.initial is not None:
            assert self.initial.source is not None, "the run has no checkpoint"
            engine.load_weights(self.initial.source.folder, self.initial.manifest())
            self.run_log.event("initialized", lines=self.initial.lines())
        if found is not None:
            if not found.ours and self.config.init is not None:
                self.run_log.warn("init: not used, because a fork begins with the weights of its checkpoint")
            engine.load(found.path, found.manifest, reset_optimizer)
            self.source.load(found.manifest["stream"])
            self.step_log.load(found.manifest)
        if self.first_step != self.unfrozen_at:
            self.world.on_rank_0(lambda: self.run_log.rewind(found, self.first_step))
        return GENESIS if found is None else str(found.manifest["chain"])

    def _step(self, engine: Engine, window: Window) -> PendingStep:
        update, plateau = self.step_log.num_updates, self.evaluations.plateau_factor
        rate = self.learning_rate(update, engine.base_rate) * plateau
        engine.own_factors = {place: factor(update) * plateau for place, factor in self.own_factors.items()}
        if window.step == self.first_step:
            return probe.first_step(engine, self.task, window, rate, self.plan.micro_batch_size)
        return train_step(engine, self.task, window, rate)

    def _save(self, engine: Engine, saver: Saver, steps_done: int) -> None:
        manifest = {
            **self.run_log.state(),
            "world_size": self.world.world_size,
            "strategy": self.strategy.name,
            "stream": self.source.state(),
            **self.step_log.state(),
            **engine.state(),
        }
        shards = engine.shards()
        if not type(self.strategy).__module__.startswith("distrib."):  # distrib's own are tested, and this takes time
            cross_rank_checks.require_same_copies(self.world, self.strategy.name, shards)
        saver.save(steps_done, shards, manifest, self.evaluations.best_steps)

    def _stop(self, engine: Engine, saver: Saver, steps_done: int, saved: bool) -> None:
        """Save, where that is not just done, have the job requeued, and end with exit code 75."""
        if not saved:
            self._save(engine, saver, steps_done)
        saver.wait()
        self._report_saves(saver)
        self.preemption.end(self.run_log, steps_done)

    def _report_saves(self, saver: Saver) -> None:
        for saved in saver.completed():
            self.run_log.event("checkpoint", **saved)
            seconds = saved["seconds"] + saved["stall"]
            if (reason := self.preemption.too_long(seconds, self.evaluations.longest_seconds)) is not None:
                self.run_log.warn(reason)

    def _save_is_due(self, steps_done: int) -> bool:
        every_steps = self.config.checkpoint.every_steps
        always = (self.plan.num_steps, self.unfreezing_step)
        return steps_done in always or (every_steps > 0 and steps_done % every_steps == 0)

    def _finish(self, steps_done: int) -> dict[str, Any]:
        summary = self.step_log.summary(self.config.name, self.first_step, steps_done) | self.evaluations.summary()
        self.run_log.draw_curves()
        self.run_log.finish(summary)
        return summary
