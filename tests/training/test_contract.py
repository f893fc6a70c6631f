"""Checks of what a task's methods return, and the trial before training, in one process."""

import re
from collections.abc import Callable
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import lines
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from distrib import Config, Loss, Task, Trainer
from distrib.errors import ConfigError
from distrib.processes.world import World
from distrib.strategies import registry
from distrib.strategies.base import Strategy
from distrib.training.own_sums import OwnSums
from distrib.training.probe import MeanLossCheck

CONFIG = {"data": {"global_batch_size": 8, "micro_batch_size": 4}, "train": {"steps": 2}}


class Classes(Task):
    """A correct task. Each test changes one method."""

    def train_dataset(self) -> Any:
        return TensorDataset(torch.randn(16, 3), torch.arange(16) % 2)

    def eval_dataset(self) -> Any:
        return self.train_dataset()

    def model(self) -> Any:
        return nn.Linear(3, 2)

    def loss(self, output: Any, batch: Any) -> Any:
        return Loss(F.cross_entropy(output, batch[1], reduction="sum"), len(output))

    def predict(self, output: Any, batch: Any) -> Any:
        return {"right": output.argmax(1) == batch[1]}

    def metrics(self, rows: Any) -> Any:
        return {"right": rows["right"].sum()}


def with_sums(*each: Any) -> Callable[..., Loss]:
    """A loss method that returns these sums in turn."""
    turn = cycle(each)
    return lambda self, output, batch: Loss(output.sum(), len(output), next(turn))


def unwrapped(module: nn.Module) -> Strategy:
    """The strategy of one process, which holds the module as it is."""
    config = Config.from_dict({"train": {"steps": 1}, "strategy": {"name": "single"}})
    strategy = registry.create(config, World())
    strategy.module = strategy.model = strategy.evaluation_model = module
    return strategy


def fit(folder: Path, changed: dict[str, Callable[..., Any]], **config: Any) -> None:
    task = type("Changed", (Classes,), changed)()
    Trainer(task, Config.from_dict({**CONFIG, **config}), folder).fit()


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Any:
        return iter(samples(3))

    def __len__(self) -> int:
        return 16


def samples(*sizes: int) -> list[Any]:
    return [(torch.randn(size), 1) for size in sizes * 16]


@pytest.mark.parametrize(
    ("method", "change", "said"),
    [
        ("train_dataset", lambda self: None, "task.train_dataset: returned None; return a Dataset"),
        ("train_dataset", lambda self: DataLoader(samples(3)), "task.train_dataset: returned a DataLoader; return its"),
        ("train_dataset", lambda self: (torch.ones(8), torch.ones(8)), "returned (Tensor (8) float32, Tensor (8) fl"),
        ("train_dataset", lambda self: iter(samples(3)), "task.train_dataset: returned list_iterator; return a Data"),
        ("train_dataset", lambda self: {"train": 1}, "task.train_dataset: returned {'train': int}; return a Dataset"),
        ("train_dataset", lambda self: samples(3, 5), "one is (Tensor (3) float32, int), another (Tensor (5) float32"),
        ("train_dataset", lambda self: [{"x": x} for x, _ in samples(3)], "calls model(batch[0]), which raised KeyErr"),
        ("train_dataset", lambda self: [([1.0, 2.0], 1)] * 16, "must be Tensor, not list; the batch is [[Tensor (4)"),
        ("eval_dataset", lambda self: DataLoader(samples(3)), "task.eval_dataset: returned a DataLoader"),
        ("eval_dataset", lambda self: Stream(), "task.eval_dataset: Stream is an IterableDataset; return a Dataset"),
        ("model", lambda self: nn.Linear, "task.model: returned the class Linear, not an instance; return a torch.nn"),
        ("model", lambda self: nn.Linear(7, 2), "task.forward: the default calls model(batch[0]), which raised Runti"),
        ("optimizer", lambda self, params: ([], []), "task.optimizer: returned ([], []); return a torch.optim.Optimiz"),
        ("loss", lambda self, output, batch: output.sum(), "task.loss: returned Tensor () float32; return distrib.Lo"),
        ("loss", lambda self, output, batch: (output.sum(), 4), "task.loss: returned (Tensor () float32, int); return"),
        ("loss", lambda self, output, batch: Loss(output, 4), "the total of the Loss is Tensor (4, 2) float32, not a"),
        ("loss", lambda self, output, batch: Loss(output.sum(), batch[1]), "count of the Loss is Tensor (4) int64, no"),
        ("loss", lambda self, output, batch: Loss(output.sum(), -1), "the count of the Loss is -1, not 0 or more"),
        ("loss", lambda self, output, batch: Loss(output.sum().detach(), 4), "does not depend on the model's param"),
        ("loss", with_sums([1, 2]), "task.loss: the sums of the Loss are [int, int]; give each name two numbers, such"),
        ("loss", with_sums({"right": 3}), "task.loss: the sum 'right' is int; give each name two numbers, such as"),
        ("loss", with_sums({"right": (1, 2, 3)}), "task.loss: the sum 'right' is (int, int, int); give each name two"),
        ("loss", with_sums({"right": (torch.ones(4), 4)}), "the sum 'right' is (Tensor (4) float32, int); give each"),
        ("loss", with_sums({"right": ("3", None)}), "the sum 'right' is (str, None); give each name two numbers"),
        ("loss", with_sums({"grad_norm": (1, 2)}), "task.loss: 'grad_norm' cannot be the name of a sum; give letters"),
        ("loss", with_sums({"top 5": (1, 2)}), "task.loss: 'top 5' cannot be the name of a sum; give letters, digits"),
        ("predict", lambda self, output, batch: output, "task.predict: returned Tensor (4, 2) float32; return a dict"),
        ("predict", lambda self, output, batch: {"a": output.sum()}, "task.predict: 'a' is Tensor () float32; give"),
        ("predict", lambda self, output, batch: {"a": np.ones(4)}, "task.predict: 'a' is ndarray (4) float64; give a"),
        ("predict", lambda self, output, batch: {"a": {"b": output}}, "'a' is {'b': Tensor (4, 2) float32}; give a t"),
        ("predict", lambda self, output, batch: {"a": output[:3]}, "'a' has 3 rows for a batch of 4 samples; give a"),
        ("metrics", lambda self, rows: 0.5, "task.metrics: returned float; return a dict"),
    ],
)
def test_wrong_return_values_are_refused(tmp_path: Path, method: str, change: Callable[..., Any], said: str) -> None:
    with pytest.raises(ConfigError) as error:
        fit(tmp_path / "run", {method: change})
    assert said in str(error.value)
    assert "\n" not in str(error.value)
    assert not lines(tmp_path / "run", "steps.jsonl") if (tmp_path / "run" / "steps.jsonl").exists() else True


def test_names_of_sums_that_change(tmp_path: Path) -> None:
    """The first two micro-batches have one: of the trial evaluation, and of the first step."""
    sums = with_sums(*[{"right": (1, 2)}] * 3, None)
    said = (
        "task.loss: the names of the Loss's sums are none in a later micro-batch, but in the first one right; give the "
        "same names each time, with (0, 0) where there is nothing to count"
    )
    with pytest.raises(ConfigError, match=re.escape(said)):
        fit(tmp_path / "run", {"loss": sums})


@given(st.lists(st.tuples(st.integers(-(2**52), 2**52), st.integers(1, 2**52)), min_size=1, max_size=4))
def test_sums_of_whole_numbers_are_exact(pairs: list[tuple[int, int]]) -> None:
    """Also those that float32 cannot hold, as Python's numbers, as tensors, and one of each."""
    sums = OwnSums(World(), ["a", "b", "c"])
    for number, (total, count) in enumerate(pairs):
        total, count = total // 4, count // 4  # no sum of four exceeds 2^52
        first, second = torch.tensor(total), torch.tensor(count, dtype=torch.float64)
        sums.add({"a": (total, count), "b": (first, second), "c": (first, count)}, last=number == len(pairs) - 1)
    expected = [float(sum(pair[place] // 4 for pair in pairs)) for place in (0, 1)]
    assert sums.result()[1].tolist() == [expected] * 3


def test_rows_of_other_length_in_each_batch(tmp_path: Path) -> None:
    lengths = iter(range(1, 99))
    change = {"predict": lambda self, output, batch: {"tokens": torch.ones(len(output), next(lengths))}}
    with pytest.raises(
        ConfigError, match=r"'tokens' has rows of shape \(1,\) in one batch and \(2,\) in another; give"
    ):
        fit(tmp_path / "run", change)


def test_an_error_in_user_code_shows_the_users_lines(tmp_path: Path) -> None:
    def predict(self: Task, output: Any, batch: Any) -> Any:
        return {"right": output.argmax(1) == batch["label"]}

    with pytest.raises(ConfigError) as error:
        fit(tmp_path / "run", {"predict": predict})
    first, header, frame, code, *_, last = str(error.value).splitlines()
    assert first.startswith("task.predict failed on its first batch; the batch is (Tensor (4, 3) float32, Tensor (4)")
    assert header == "Traceback (most recent call last):"
    assert frame.startswith(f'  File "{__file__}", line ')
    assert code == '    return {"right": output.argmax(1) == batch["label"]}'
    assert last == "TypeError: tuple indices must be integers or slices, not str"


def test_metrics_that_fail_on_few_samples_are_a_warning(tmp_path: Path) -> None:
    def metrics(self: Task, rows: Any) -> Any:
        if len(rows["right"]) < 16:
            raise ValueError("too few")
        return {"right": rows["right"].sum()}

    fit(tmp_path / "run", {"metrics": metrics})
    (warning,) = [event["reason"] for event in lines(tmp_path / "run", "events.jsonl") if event["event"] == "warning"]
    assert warning.startswith(f"task.metrics failed on a trial with 8 samples: ValueError: too few at {__file__}:")
    assert len(lines(tmp_path / "run", "evals.jsonl")) == 1


def test_a_metric_that_is_none_on_few_samples_is_a_warning(tmp_path: Path) -> None:
    fit(tmp_path / "run", {"metrics": lambda self, rows: {"auc": 1.0 if len(rows["right"]) == 16 else None}})
    (warning,) = [event["reason"] for event in lines(tmp_path / "run", "events.jsonl") if event["event"] == "warning"]
    assert warning.startswith("task.metrics failed on a trial with 8 samples: 'auc' is None; give each name one number")
    with pytest.raises(ConfigError, match=r"task.metrics: 'auc' is None; give each name one number"):
        fit(tmp_path / "never", {"metrics": lambda self, rows: {"auc": None}})
    assert len(lines(tmp_path / "never", "steps.jsonl")) == 2


def test_a_numpy_count_keeps_its_value(tmp_path: Path) -> None:
    """Weights that sum to 7.5 have the count 7.5, also as float32."""
    found = []
    for number in (float, np.float32, np.array):

        def loss(self: Task, output: Any, batch: Any, number: Any = number) -> Loss:
            weights = np.full(len(output), 1.875, dtype=np.float32)
            losses = F.cross_entropy(output, batch[1], reduction="none")
            return Loss((torch.from_numpy(weights) * losses).sum(), number(weights.sum()))

        fit(tmp_path / number.__name__, {"loss": loss})
        found.append([(step["loss"], step["count"]) for step in lines(tmp_path / number.__name__, "steps.jsonl")])
    assert found[0] == found[1] == found[2]
    assert [count for _, count in found[0]] == [15.0, 15.0]


def mean(self: Task, output: Any, batch: Any) -> Loss:
    return Loss(F.cross_entropy(output, batch[1]), len(output))


@pytest.mark.parametrize("strategy", ["single", "zero2", "zero3", "fsdp2"])
def test_a_mean_with_the_batch_size_as_count_is_refused(tmp_path: Path, strategy: str) -> None:
    with pytest.raises(
        ConfigError, match=r"task.loss: its total is a mean over the batch, but its count is the number"
    ):
        fit(tmp_path / "run", {"loss": mean}, strategy={"name": strategy})


class WithLoss(nn.Module):
    """Computes the loss itself, as Hugging Face models do."""

    def __init__(self, reduction: str) -> None:
        super().__init__()
        self.layers, self.reduction = nn.Sequential(nn.Linear(3, 2), nn.Dropout(0.5)), reduction

    def forward(self, inputs: Tensor, targets: Tensor) -> dict[str, Tensor]:
        logits = self.layers(inputs)
        return {"loss": F.cross_entropy(logits, targets, reduction=self.reduction), "logits": logits}


def by_the_model(reduction: str) -> dict[str, Callable[..., Any]]:
    return {
        "model": lambda self: WithLoss(reduction),
        "forward": lambda self, model, batch: model(*batch),
        "loss": lambda self, output, batch: Loss(output["loss"], len(batch[1])),
        "predict": lambda self, output, batch: {"right": output["logits"].argmax(1) == batch[1]},
    }


def test_a_mean_that_the_model_computes_is_refused(tmp_path: Path) -> None:
    fit(tmp_path / "sum", by_the_model("sum"))
    with pytest.raises(ConfigError, match=r"task.loss: its total is a mean over the batch"):
        fit(tmp_path / "mean", by_the_model("mean"))


def contrastive(output: Tensor, batch: Any) -> Loss:
    similar = output @ torch.roll(output, 1, 0).T
    return Loss(F.cross_entropy(similar, torch.arange(len(output)), reduction="sum"), len(output))


# Each is correct, or cannot be distinguished from a correct loss.
RIGHT: dict[str, Callable[[Tensor, Any], Loss]] = {
    "sum": lambda output, batch: Loss(F.cross_entropy(output, batch[1], reduction="sum"), len(output)),
    "sum of squares": lambda output, batch: Loss(output.square().sum(), output.numel()),
    "mean, counted as one": lambda output, batch: Loss(F.cross_entropy(output, batch[1]), 1),
    "mean times count": lambda output, batch: Loss(F.cross_entropy(output, batch[1]) * len(output), len(output)),
    "masked": lambda output, batch: Loss(
        F.cross_entropy(output, torch.where(batch[1] > 0, batch[1], -100), reduction="sum"), (batch[1] > 0).sum()
    ),
    "regularised": lambda output, batch: Loss(
        1e6 * (output.detach() * 0 + 1).mean() + F.cross_entropy(output, batch[1], reduction="sum"), len(output)
    ),
    "contrastive": contrastive,
    "zero": lambda output, batch: Loss(output.sum() * 0, len(output)),
    "not a number": lambda output, batch: Loss(output.sum() * float("nan"), len(output)),
}


@given(
    name=st.sampled_from(sorted(RIGHT)),
    size=st.integers(1, 6),
    scale=st.sampled_from([1e-6, 1.0, 1e6]),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
    seed=st.integers(0, 999),
)
def test_correct_losses_are_accepted(name: str, size: int, scale: float, dtype: torch.dtype, seed: int) -> None:
    class Right(Task):
        def loss(self, output: Tensor, batch: Any) -> Loss:
            return RIGHT[name](output, batch)

    generator = torch.Generator().manual_seed(seed)
    module = nn.Linear(3, 2)
    inputs, targets = torch.randn(size, 3, generator=generator), torch.arange(size) % 2
    strategy = unwrapped(module)
    check = MeanLossCheck(Right(), strategy, size)
    output = (scale * module(inputs)).to(dtype)
    check.loss(output, (inputs, targets))


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_mean_is_detected_at_any_size_and_precision(size: int, dtype: torch.dtype) -> None:
    module = nn.Linear(3, 2)
    strategy = unwrapped(module)
    check = MeanLossCheck(type("Mean", (Classes,), {"loss": mean})(), strategy, size)
    output = module(torch.randn(size, 3)).to(dtype)
    with pytest.raises(ConfigError, match="is a mean"):
        check.loss(output, (torch.randn(size, 3), torch.arange(size) % 2))


def test_a_mean_over_one_sample_is_accepted(tmp_path: Path) -> None:
    one = {"global_batch_size": 2, "micro_batch_size": 1}
    fit(tmp_path / "run", {"loss": mean}, data=one)
    changed = {**by_the_model("mean"), "loss": lambda self, output, batch: Loss(output["loss"], len(batch[1]))}
    fit(tmp_path / "by the model", changed, data=one)


@pytest.mark.parametrize("elements", [10_000_000, 10_000_002])
def test_a_very_large_output_is_not_copied(elements: int) -> None:
    """The task's loss is computed once, and the model is not called."""
    calls = []

    def loss(self: Task, output: Tensor, batch: Any) -> Loss:
        calls.append(len(output))
        return Loss(output[:, :3].sum(), len(output))

    strategy = unwrapped(nn.Identity())
    task = type("Large", (Classes,), {"loss": loss})()
    output = torch.zeros(1, dtype=torch.float16).expand(2, elements // 2).requires_grad_()
    MeanLossCheck(task, strategy, 2).loss(output, (torch.zeros(2), torch.zeros(2)))
    assert calls == ([2] if elements > 10_000_000 else [2, 2, 4])


def test_the_check_does_not_change_buffers(tmp_path: Path) -> None:
    """With a model that computes its own loss, for which the check runs additional forwards."""

    class Counting(WithLoss):
        forwards: Tensor

        def __init__(self) -> None:
            super().__init__("sum")
            self.register_buffer("forwards", torch.zeros((), dtype=torch.int64))

        def forward(self, inputs: Tensor, targets: Tensor) -> dict[str, Tensor]:
            self.forwards += 1
            return super().forward(inputs, targets)

    task = type("Changed", (Classes,), {**by_the_model("sum"), "model": lambda self: Counting()})()
    data, checkpoint = {"global_batch_size": 4, "micro_batch_size": 4}, {"every_steps": 2}
    config = Config.from_dict({"data": data, "train": {"steps": 4}, "checkpoint": checkpoint})
    whole = Trainer(task, config, tmp_path / "whole")
    whole.fit()
    assert whole.module.forwards == 4
    begun = str(tmp_path / "whole" / "checkpoints" / "step-00000002")
    resumed = Trainer(task, config, tmp_path / "resumed", resume=begun, fork=True)
    resumed.fit()
    assert resumed.module.forwards == 4
