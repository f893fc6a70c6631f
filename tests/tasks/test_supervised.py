from typing import Any

import pytest
import torch
from torch import nn

from distrib.errors import ConfigError
from distrib.tasks.supervised import Supervised

DATA = {"target": "distrib.tasks.diabetes:Diabetes", "split": "train"}
MODEL = {"target": "torch.nn:Linear", "in_features": 10, "out_features": 3}


def task(loss: Any, **more: Any) -> Supervised:
    return Supervised(**{"model": MODEL, "train_dataset": DATA, "loss": loss, **more})


GENERATOR = torch.Generator().manual_seed(0)


def classes(*shape: int) -> torch.Tensor:
    return torch.randint(0, 3, shape, generator=GENERATOR)


def floats(*shape: int) -> torch.Tensor:
    return torch.rand(shape, generator=GENERATOR)


CASES: list[tuple[Any, torch.Tensor, torch.Tensor]] = [
    ("MSELoss", floats(6, 3), floats(6, 3)),
    ("L1Loss", floats(6), floats(6)),
    ("SmoothL1Loss", floats(6, 2), floats(6, 2)),
    ({"name": "HuberLoss", "delta": 0.1}, floats(6), floats(6)),
    ("BCELoss", floats(6, 3), floats(6, 3)),
    ({"name": "BCEWithLogitsLoss", "pos_weight": [1.0, 2.0, 3.0]}, floats(6, 3), floats(6, 3)),
    ("KLDivLoss", floats(6, 3).log(), floats(6, 3)),
    ("PoissonNLLLoss", floats(6), floats(6)),
    ("SoftMarginLoss", floats(6, 3), classes(6, 3).float().sign() * 2 - 1),
    ("MultiLabelSoftMarginLoss", floats(6, 3), classes(6, 3).float().sign()),
    ("MultiMarginLoss", floats(6, 3), classes(6)),
    ("CrossEntropyLoss", floats(6, 3), classes(6)),
    ("CrossEntropyLoss", floats(6, 3), floats(6, 3).softmax(1)),
    ("CrossEntropyLoss", floats(6, 3, 4), classes(6, 4)),
    ({"name": "CrossEntropyLoss", "ignore_index": 1}, floats(9, 3), classes(9)),
    ({"name": "CrossEntropyLoss", "label_smoothing": 0.1}, floats(6, 3), classes(6)),
    ({"name": "CrossEntropyLoss", "weight": [1.0, 2.0, 4.0], "ignore_index": 0}, floats(9, 3), classes(9)),
    ({"name": "CrossEntropyLoss", "weight": [1.0, 2.0, 4.0], "label_smoothing": 0.2}, floats(9, 3), classes(9)),
    ({"name": "NLLLoss", "weight": [1.0, 2.0, 4.0]}, floats(9, 3).log_softmax(1), classes(9)),
]


@pytest.mark.parametrize(("loss", "output", "target"), CASES, ids=[f"{n}-{c[0]}" for n, c in enumerate(CASES)])
def test_total_divided_by_count_is_torchs_mean(loss: Any, output: torch.Tensor, target: torch.Tensor) -> None:
    arguments = dict(loss) if isinstance(loss, dict) else {"name": loss}
    name = arguments.pop("name")
    tensors = {k: torch.tensor(v) if isinstance(v, list) else v for k, v in arguments.items()}
    expected = getattr(nn, name)(**tensors)(output, target)
    got = task(loss).loss(output, (None, target))
    torch.testing.assert_close(got.total / got.count, expected)


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        ({"loss": "MSEloss"}, ["task.loss: 'MSEloss'", "did you mean MSELoss?"]),
        ({"loss": "Linear"}, ["task.loss: 'Linear' is not a Loss in torch.nn"]),
        ({"loss": "CTCLoss"}, ["CTCLoss takes more than (output, target)"]),
        ({"loss": {"name": "MSELoss", "reduction": "mean"}}, ["task.loss.reduction: is decided by distrib"]),
        ({"loss": {"name": "MSELoss", "delta": 1}}, ["task.loss: MSELoss", "'delta'"]),
        ({"loss": "torch.nn:Linear"}, ["task.loss: torch.nn:Linear is not a _Loss but a class Linear"]),
        ({"loss": "MSELoss", "metrics": {"x": "os.system"}}, ["os:system is a part of Python itself"]),
        ({"loss": "MSELoss", "metrics": {"x": "torchmetrics.R2score"}}, ["did you mean torchmetrics:R2Score?"]),
        ({"loss": "MSELoss", "metrics": {"r2": "R2score"}}, ["task.metrics.r2: 'R2score'", "R2Score?"]),
        ({"loss": "MSELoss", "model": "Net"}, ["task.model: 'Net'", "target: module:Class"]),
        ({"loss": "MSELoss", "model": {"target": "torch.nn:Linaer"}}, ["task.model.target", "torch.nn:Linear?"]),
        ({"loss": "MSELoss", "eval_dataset": {"target": "nope:X"}}, ["task.eval_dataset.target", "'nope'"]),
    ],
)
def test_errors_in_the_config_are_named(arguments: dict[str, Any], parts: list[str]) -> None:
    with pytest.raises(ConfigError) as error:
        task(**arguments)
    assert [part for part in parts if part not in str(error.value)] == [], error.value


def test_a_dataset_is_not_a_model() -> None:
    with pytest.raises(ConfigError, match=r"task.model.target: .* is not a Module but a class Diabetes"):
        task("MSELoss", model=DATA).model()


def test_shapes_that_torch_would_broadcast_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"output of shape \(6, 1\) and a target of shape \(6,\)"):
        task("MSELoss").loss(floats(6, 1), (None, floats(6)))


def test_metrics_are_torchmetrics_over_all_rows() -> None:
    supervised = task(
        "CrossEntropyLoss",
        metrics={"accuracy": {"name": "Accuracy", "task": "multiclass", "num_classes": 3}},
    )
    by_path = {"name": "torchmetrics.classification:MulticlassAccuracy", "num_classes": 3, "average": "micro"}
    further = task("torch.nn.CrossEntropyLoss", metrics={"accuracy": by_path})
    rows = {"output": torch.eye(3)[[0, 1, 2, 0]], "target": torch.tensor([0, 1, 2, 2])}
    assert supervised.metrics(rows) == {"accuracy": 0.75}
    assert further.metrics(rows) == {"accuracy": 0.75}
    assert supervised.metrics(rows) == {"accuracy": 0.75}  # nothing is kept from one evaluation to the next
