"""The program that `distrib launch` runs on each rank of a world: it makes all runs that the tests check."""

import gc
import json
import shutil
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import initial
import torch
from adapted import Adapted
from cases import EVERY, HSDP, LATE_WORLDS, SHARDED_WORLDS, cases, moved, resumed
from conftest import interrupted
from own_loops import run_own_loops
from tasks import HOW, Large, Masked, Numbered, Uneven
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import Dataset

from distrib import Config, Task, Trainer, World
from distrib.data.loader import Window, train_windows
from distrib.data.sampler import DistributedSampler
from distrib.init_options import InitConfig
from distrib.run_folder import checkpoint
from distrib.run_folder.initial_weights import compare
from distrib.strategies import registry
from distrib.task import load_task
from distrib.training import build
from distrib.training.engine import Engine
from distrib.training.evaluation import evaluate
from distrib.training.loop import train_step


def train_cases(folder: Path, world: World) -> None:
    for name, values in cases(world.world_size).items():
        config = Config.from_dict(values)
        Trainer(load_task(config.task), config, folder / name).fit()


def go_on_with_cases(folder: Path, world: World) -> None:
    for name in resumed(world.world_size):
        config, copy = Config.from_dict(cases(world.world_size)[name]), folder / f"{name}-resumed"
        if world.is_rank_0:
            interrupted(folder / name, copy, after=EVERY)
        world.barrier()
        Trainer(load_task(config.task), config, copy).fit()


def go_on_under_another_strategy(folder: Path, world: World) -> None:
    for before, after in moved(world.world_size):
        config, copy = Config.from_dict(cases(world.world_size)[f"{after}-no"]), folder / f"{before}-to-{after}"
        if world.is_rank_0:
            interrupted(folder / f"{before}-no", copy, after=EVERY)
        world.barrier()
        Trainer(load_task(config.task), config, copy).fit()


def engine(task: Task, config: Config, world: World, *, training: bool, max_grad_norm: float | None = None) -> Engine:
    strategy = registry.resolve(config, world)
    module = build.model(task, config)
    make_optimizer = build.optimizer_maker(task, config) if training else None
    strategy.wrap(module, task.blocks(module), make_optimizer)
    ema = config.train.ema if training else None
    return Engine(strategy, max_grad_norm=max_grad_norm, ema=ema)


def evaluations(world: World) -> dict[str, dict[str, str]]:
    """Evaluate sets of 1 to 39 samples, so that some ranks have no batch. Return metrics as hexadecimal floats."""
    found = {}
    for strategy, batch_sizes in {"auto": (1, 4, 7), "zero3": (4,), "fsdp2": (4,)}.items():
        config = Config.from_dict({"train": {"steps": 1}, "strategy": {"name": strategy}, "data": _data(world)})
        evaluator = engine(Numbered(), config, world, training=False)
        for samples in range(1, 40):
            for batch_size in batch_sizes:
                task = Numbered(samples)
                metrics = evaluate(evaluator, task, task.eval_dataset(), batch_size)
                named = {key: value.hex() for key, value in metrics.items()}
                found[f"{strategy}: {samples} in batches of {batch_size}"] = named
    return found


def memory(world: World) -> dict[str, dict[str, int]]:
    """Return the bytes that the plan estimates, and those that this rank holds between two steps."""
    found = {}
    for name in ("ddp", "zero0", "zero1", "zero2", "zero3", "fsdp2", *(["hsdp"] if world.world_size == 4 else [])):
        strategy: dict[str, Any] = HSDP if name == "hsdp" else {"name": name}
        if name in ("zero1", "zero2", "zero3"):  # otherwise DeepSpeed's default bucket of 2 GB would dominate
            strategy["deepspeed"] = {"zero_optimization": {"reduce_bucket_size": 100_000}}
        config = Config.from_dict({"train": {"steps": 2, "ema": {}}, "strategy": strategy, "data": _data(world)})
        task = Large(blocks=3)
        dataset = task.train_dataset()
        before = live_bytes()
        trained = engine(task, config, world, training=True)
        for window in windows(dataset, config, world):
            train_step(trained, task, window, 0.001)
        del window
        trained.strategy.zero_grad()
        make_optimizer = build.optimizer_maker(task, config)
        module = build.model_on_meta(task, config, make_optimizer)
        plan = build.memory(module, task, registry.resolve(config, world), make_optimizer)
        found[name] = {
            "planned_parameters": plan.parameters,
            "planned_gradients": plan.gradients,
            "planned_optimizer_state": plan.optimizer_state,
            "planned_average": plan.average,
            "parameters": parameter_bytes(trained),
            "average": average_bytes(trained),
            "all": live_bytes() - before,
        }
        del trained
        gc.collect()
    return found


def frozen_bytes(world: World) -> dict[str, int]:
    """Return the bytes that this rank holds of the frozen parameters under an adapter."""
    found = {}
    for strategy in ("ddp", "zero3", "fsdp2"):
        for dtype in (None, "bf16"):
            options = {"zero_optimization": {"stage3_param_persistence_threshold": 0, "reduce_bucket_size": 10**6}}
            section = {"name": strategy, **({"deepspeed": options} if strategy == "zero3" else {})}
            config = Config.from_dict({"train": {"steps": 1}, "strategy": section, "data": _data(world)})
            trained = engine(Adapted(base_dtype=dtype), config, world, training=True)
            frozen = [parameter for parameter in trained.module.parameters() if not parameter.requires_grad]
            found[f"{strategy}-{dtype or 'fp32'}"] = storage_bytes([held(parameter) for parameter in frozen])
    return found


def held(parameter: Any) -> Tensor:
    """Return what this rank holds of a parameter: all, or a shard."""
    return parameter.ds_tensor if hasattr(parameter, "ds_tensor") else local(parameter)


class Calls(TorchDispatchMode):
    """Counts the calls of an operator."""

    def __init__(self, operator: Any) -> None:
        super().__init__()
        self.operator, self.count = operator, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is self.operator
        return func(*args, **(kwargs or {}))


def gathers(world: World) -> list[int]:
    """Return how often zero3 gathers parameters in a fifth step, if an evaluation came before the first, the second, or
    no step."""
    found = []
    strategy = {"name": "zero3", "deepspeed": {"zero_optimization": {"stage3_param_persistence_threshold": 0}}}
    config = Config.from_dict({"train": {"steps": 5}, "strategy": strategy, "data": _data(world)})
    task = Masked()
    for evaluated_before in (0, 1, None):
        trained = engine(task, config, world, training=True)
        for step, window in enumerate(windows(task.train_dataset(), config, world)):
            if step == evaluated_before:
                evaluate(trained, task, task.eval_dataset(), 1)
            with Calls(torch.ops.c10d._allgather_base_.default) as calls:
                train_step(trained, task, window, 0.05)
        found.append(calls.count)
    return found


def late(world: World) -> dict[str, dict[str, Any]]:
    """Make steps, of which some are skipped, with the decision on the host and, as on a GPU, on the device.

    Return each step's verdict, loss and norm, the sum of squares of the final parameters, and the number of reads of
    values.
    """
    found = {}
    with Calls(torch.ops.aten._local_scalar_dense.default) as agreement:
        world.all_gather_object([])  # as in the first step, on the CPU: the names of the task's own numbers
    for strategy in ("ddp", "zero0", "fsdp2"):
        for optimizer in ({"name": "adamw"}, {"name": "sgd", "momentum": 0.9}):
            for waits in (True, False):
                config = Config.from_dict(
                    {
                        "train": {"steps": len(HOW)},
                        "strategy": {"name": strategy},
                        "data": {"global_batch_size": 8, "micro_batch_size": 1},
                        "optim": {**optimizer, "lr": 0.05},
                    }
                )
                task = Uneven()
                trained = engine(task, config, world, training=True, max_grad_norm=0.5)
                trained.waits = waits
                steps: list[list[Any]] = []
                reads = Calls(torch.ops.aten._local_scalar_dense.default)  # on a GPU each read waits for the device
                for window in windows(task.train_dataset(), config, world):
                    with reads:
                        step = train_step(trained, task, window, 0.05)
                    result = step.read()
                    steps.append([result.verdict, result.loss, result.grad_norm])
                squares = sum(float(local(p.detach()).double().square().sum()) for p in trained.module.parameters())
                name = f"{strategy} {optimizer['name']} {'host' if waits else 'device'}"
                found[name] = {"steps": steps, "squares": squares, "reads": reads.count - agreement.count}
    return found


def bytes_read(world: World) -> dict[str, list[int]]:
    """Return how many bytes of initial weights this rank reads, and how many it holds, if they are in fp32."""
    found = {}
    torch.save(Masked().model().state_dict(), f"rank-{world.rank}.pt")
    for name in ("hsdp",) if world.world_size == 4 else ("ddp", "zero2", "zero3", "fsdp2"):
        strategy: dict[str, Any] = HSDP if name == "hsdp" else {"name": name}
        if name.startswith("zero"):
            strategy["deepspeed"] = {"zero_optimization": {"reduce_bucket_size": 10**6}}
        config = Config.from_dict({"train": {"steps": 1}, "strategy": strategy, "data": _data(world)})
        shards = engine(Masked(), config, world, training=True).strategy.shards()
        options = InitConfig.model_validate({"from": f"rank-{world.rank}.pt"})
        weights = compare(options, Masked().model())
        assert weights.source is not None
        read = checkpoint.load(weights.source.folder, weights.manifest(), shards)
        held = sum(4 * own.tensor.numel() for key, own in shards.items() if key.startswith("model."))
        found[name] = [read, held]
    return found


def windows(dataset: Dataset[Any], config: Config, world: World) -> Iterator[Window]:
    """Yield the windows of a whole run."""
    sampler = DistributedSampler(
        dataset,
        global_batch_size=config.data.global_batch_size,
        micro_batch_size=config.data.micro_batch_size,
        num_replicas=world.world_size,
        rank=world.rank,
        stop=config.train.steps or 0,
    )
    return train_windows(sampler)


def parameter_bytes(trained: Engine) -> int:
    """Return the bytes of the module's own parameters: whole tensors and this rank's shards."""
    parameters = list(trained.module.parameters())
    shards = [parameter.ds_tensor for parameter in parameters if hasattr(parameter, "ds_tensor")]
    return storage_bytes([local(parameter) for parameter in parameters] + shards)


def average_bytes(trained: Engine) -> int:
    """Return the bytes of what this rank holds of the average of the weights."""
    assert trained.average is not None
    return storage_bytes([shard.tensor for shard in trained.average.shards().values()])


def local(tensor: Tensor) -> Tensor:
    return getattr(tensor, "_local_tensor", tensor)


def live_bytes() -> int:
    """Return the bytes of all tensors that the garbage collector tracks."""
    gc.collect()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # some objects warn that they are deprecated
        tensors = [o for o in gc.get_objects() if isinstance(o, Tensor)]
    return storage_bytes([local(tensor) for tensor in tensors])


def storage_bytes(tensors: list[Tensor]) -> int:
    """Return the bytes of the tensors' storages, each counted once."""
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors if t.device.type == "cpu"}
    return sum(storages.values())


def _data(world: World) -> dict[str, Any]:
    return {"global_batch_size": world.world_size, "micro_batch_size": 1}


def main() -> None:
    folder = Path(sys.argv[1])
    world = World.detect()
    world.connect()
    if world.is_rank_0:
        initial.write(folder)
    world.barrier()
    train_cases(folder, world)
    if world.is_rank_0:  # a resumed run needs them no more
        (folder / initial.FILE).unlink()
        (folder / initial.PICKLE).unlink()
        shutil.rmtree(folder / initial.FOLDER)
    go_on_with_cases(folder, world)
    go_on_under_another_strategy(folder, world)
    results: dict[str, Any] = {"evaluations": evaluations(world)}
    if world.world_size in SHARDED_WORLDS:
        results["own_loops"] = run_own_loops(folder, world)
    if world.world_size in SHARDED_WORLDS[1:]:
        results["memory"] = memory(world)
    if world.world_size in (2, 4):
        results["bytes_read"] = bytes_read(world)
    if world.world_size == 2:
        results["gathers"] = gathers(world)
        results["frozen_bytes"] = frozen_bytes(world)
    if world.world_size in LATE_WORLDS:
        results["late"] = late(world)
    (folder / f"rank-{world.rank}.json").write_text(json.dumps(results))
    world.barrier()


if __name__ == "__main__":
    main()
